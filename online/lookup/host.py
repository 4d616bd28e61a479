"""A CPU host as it runs: one process that answers, or a parent whose workers do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from online.host_state import HostMemory, HostState, recalled, restore
from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.service import CpuTierAdminService, LookupService
from online.lookup.shards import Shard
from online.lookup.worker import state_from_parent, worker_admin
from online.lookup.workers import Workers, WorkersAdminService, reserve_port
from online.proto import admin_pb2_grpc
from online.rpc.listening import Listening
from online.rpc.server import Endpoint, serve_until_stopped
from pipelines.contracts.workspace import Workspace

__all__ = ["CpuHost"]


@dataclass(frozen=True, kw_only=True)
class CpuHost:
    """What a CPU host is told. `serve`, `serve_with_workers` and `serve_as_worker` run it until it is stopped.

    Attributes:
        listening: its ports; of workers, those of every one.
        shard: the part of the ids that it answers.
        max_ids: most ids of one request.
        rows: where they were materialized to, see `VersionReader.open`.
        memory: of a host that has a name.
    """

    workspace: Workspace
    listening: Listening
    shard: Shard
    max_ids: int
    rows: str | None = field(repr=False)  # a URL may hold a password
    memory: HostMemory | None

    def serve(self, versions: Sequence[int]) -> None:
        """Answer from this process.

        Args:
            versions: to hold at first, the preferred one first; a host that remembers what it held, holds that.
        """
        lookup, admin = self._lookup_endpoint(), self.listening.admin_endpoint()
        hosted = self._hosted(lookup.port)
        restore(hosted, self.memory, HostState.at_first(versions))
        self._add_lookup(hosted, lookup)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted, shard=self.shard), admin.server)
        ports = {"lookup": lookup.port, "admin": admin.port, **self.listening.export_metrics()}
        serve_until_stopped([lookup, admin], lambda: _ready(hosted.state(), ports))
        hosted.close()

    def serve_with_workers(self, versions: Sequence[int], command: Sequence[str], count: int) -> None:
        """Answer from `count` processes of their own; this one starts, watches and directs them.

        Args:
            versions: as for `serve`.
            command: starts a process that calls `serve_as_worker`; the port and the socket are added to it.
        """
        admin = self.listening.admin_endpoint()
        state, first = recalled(self.memory, HostState.at_first(versions))
        with reserve_port(self.listening.host, self.listening.port) as reserved:
            port = reserved.getsockname()[1]
            workers = Workers(
                [*command, "--port", str(port), "--worker"], count, state=state, whole=first,
                remember=self.memory.remember if self.memory else None,
                count_in_files=self.listening.metrics_port is not None,
            )
            try:
                workers.start()
                admin_pb2_grpc.add_CpuTierAdminServicer_to_server(WorkersAdminService(workers), admin.server)
                ports = {"lookup": port, "admin": admin.port, **self.listening.export_metrics(workers.metrics_folder)}
                serve_until_stopped([admin], lambda: _ready(workers.state, ports) | {"workers": workers.pids})
            finally:
                workers.stop()

    def serve_as_worker(self, socket_path: str) -> None:
        """Answer as one of the workers of the process that started this one."""
        state, whole = state_from_parent(socket_path)
        hosted = self._hosted(self.listening.port)
        hosted.restore(state, whole=whole)
        # Not before: to listen is to be given connections.
        lookup, admin = self._lookup_endpoint(reuse_port=True), worker_admin(socket_path)
        self._add_lookup(hosted, lookup)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted, shard=self.shard), admin.server)
        serve_until_stopped([lookup, admin], lambda: {})
        hosted.close()

    def _hosted(self, port: int) -> HostedVersions:
        return HostedVersions(
            lambda version: VersionReader.open(self.workspace, version, rows=self.rows, shard=self.shard),
            pin=lambda version: self.workspace.versions.pinned(
                version, role="cpu-tier", address=f"{self.listening.host}:{port}"
            ),
            remember=self.memory.remember if self.memory else None,
        )

    def _lookup_endpoint(self, *, reuse_port: bool = False) -> Endpoint:
        return self.listening.endpoint("lookup", max_ids=self.max_ids, reuse_port=reuse_port)

    def _add_lookup(self, hosted: HostedVersions, endpoint: Endpoint) -> None:
        LookupService(hosted, max_ids=self.max_ids, shard=self.shard).add_to(endpoint.server)


def _ready(state: HostState, ports: dict[str, int]) -> dict[str, Any]:
    others = [version for version in state.loaded if version != state.preferred]
    return {"role": "cpu-tier", "versions": [state.preferred, *others], "ports": ports}
