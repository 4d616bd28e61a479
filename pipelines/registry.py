"""Feast's registry as a file that several processes may write: always whole, and no change is lost.

```
read    ─► a registry to change in memory, and a copy of it kept as it was read
commit  ─► lock ─► read what is there now ─► take over what was changed since the copy ─► replace the file ─► unlock
```

Feast's own file store rewrites the file in place with what its process has in memory. A process killed in between
would leave no feature view at all; of two that write at the same time, such as `feast apply` beside
`feast materialize`, one would undo what the other did.
"""

import uuid
from collections import OrderedDict
from itertools import chain
from pathlib import Path

from feast import FeatureViewState
from feast.infra.registry.file import FileRegistryStore
from feast.infra.registry.registry_store import RegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.repo_config import RegistryConfig

from pipelines.contracts.durable import replacing_file, sweep_staging
from pipelines.contracts.errors import VersionConflict
from pipelines.contracts.locks import locked
from pipelines.registry_merge import take_changes

__all__ = ["DurableRegistryStore"]

_REMEMBERED = 16


class DurableRegistryStore(RegistryStore):
    """`registry: {registry_store_type: pipelines.registry.DurableRegistryStore, path: …}`.

    The lock is on the folder of the file; it ends with its process, however that ends.

    It is no `FileRegistryStore`, though it writes such a file: Feast reads a file of that class anew as soon as it has
    changed, even between the first change of a `feast apply` and its commit, and what was changed until then is lost.
    """

    def __init__(self, registry_config: RegistryConfig, repo_path: Path | None) -> None:
        self._path = Path(repo_path or ".") / registry_config.path
        self._read: OrderedDict[str, Registry] = OrderedDict({"": Registry()})  # by version_id, new for each commit

    def get_registry_proto(self) -> Registry:
        if not self._path.exists():
            raise FileNotFoundError(f"no registry at {self._path}; run `feast apply`")
        registry = Registry.FromString(self._path.read_bytes())
        self._remember(registry)
        return registry

    def update_registry_proto(self, registry_proto: Registry) -> None:
        """Commit: write what changed in `registry_proto` since it was read; it then holds what others wrote, too.

        Raises:
            VersionConflict: it was read so long ago that what changed in it cannot be told.
        """
        base = self._read.get(registry_proto.version_id)
        if base is None:
            raise VersionConflict(
                f"registry {self._path}", expected="changes to a state that this process read lately",
                got=f"changes to state {registry_proto.version_id}", remedy="Run the same command again.",
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._path.parent, wait=True) as held:
            if not held:
                raise FileNotFoundError(f"{self._path.parent} was deleted while its registry was to be written")
            there = self.get_registry_proto() if self._path.exists() else Registry()
            if there.version_id != base.version_id:
                take_changes(there, base=base, changed=registry_proto)
                registry_proto.CopyFrom(there)
            _keep_available(registry_proto)
            self._replace(registry_proto)
        self._remember(registry_proto)

    def teardown(self) -> None:
        self._path.unlink(missing_ok=True)

    # Feast's web interface keeps its last visits in the registry; both read and commit as above.
    set_project_metadata = FileRegistryStore.set_project_metadata
    get_project_metadata = FileRegistryStore.get_project_metadata

    def _replace(self, registry: Registry) -> None:
        sweep_staging(self._path.parent)
        registry.version_id = str(uuid.uuid4())
        registry.last_updated.GetCurrentTime()
        with replacing_file(self._path) as staging:
            staging.write_bytes(registry.SerializeToString())

    def _remember(self, registry: Registry) -> None:
        copy = self._read.setdefault(registry.version_id, Registry())
        copy.CopyFrom(registry)
        self._read.move_to_end(registry.version_id)
        while len(self._read) > _REMEMBERED:
            self._read.popitem(last=False)


def _keep_available(registry: Registry) -> None:
    """Keep a view readable that was materialized before.

    Feast reads no view in state GENERATED. It gives that state to a view whose materialization fails after an earlier
    one was killed, although all rows of before are there.
    """
    for view in chain(registry.feature_views, registry.stream_feature_views):
        if view.meta.materialization_intervals and view.meta.state == FeatureViewState.GENERATED.to_proto():
            view.meta.state = FeatureViewState.AVAILABLE_ONLINE.to_proto()
