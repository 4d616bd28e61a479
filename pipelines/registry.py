"""Feast's registry as a file that is always whole: replaced by one rename instead of rewritten in place.

Feast's own file store truncates the file and then writes it. A process killed in between, or one that reads in
between, would find no feature view at all: every version would be dark.
"""

from pathlib import Path

from feast.infra.registry.file import FileRegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry

from pipelines.contracts.durable import replacing_file, sweep_staging

__all__ = ["DurableRegistryStore"]


class DurableRegistryStore(FileRegistryStore):
    """`registry: {registry_store_type: pipelines.registry.DurableRegistryStore, path: …}`; one writer at a time."""

    def _write_registry(self, registry_proto: Registry) -> None:
        # the parent class adds a fresh version id and the time before it writes: let it, into the staged file
        target = Path(self._filepath)
        sweep_staging(target.parent)
        with replacing_file(target) as staging:
            self._filepath = staging
            try:
                super()._write_registry(registry_proto)
            finally:
                self._filepath = target
