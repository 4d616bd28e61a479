"""A CPU host as it runs: one process that answers, or a parent whose workers do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from online.admission import Admission
from online.host_state import HostMemory, HostState
from online.lookup.hosted import HostedVersions
from online.lookup.service import CpuTierAdminService, LookupService
from online.lookup.shards import Shard
from online.lookup.workers import WorkerAdmin, Workers, WorkersAdminService, reserve_port, state_from_parent
from online.observe import metrics
from online.proto import admin_pb2_grpc, lookup_pb2_grpc
from online.reader import VersionReader
from online.security.credentials import ServerSecurity
from online.security.limits import Limits
from online.server import Endpoint, serve_until_stopped
from pipelines.contracts.workspace import Workspace

__all__ = ["CpuHost"]

ADMIN_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class CpuHost:
    """What a CPU host is told. `serve`, `serve_with_workers` and `serve_as_worker` run it until it is stopped.

    Attributes:
        port, admin_port: 0 picks a free one.
        metrics_port: the same, of /metrics; None: there is none.
        shard: the part of the ids that it answers.
        slots, queue: requests that one process answers at a time, and that wait in it.
        max_ids: most ids of one request.
        rows: where they were materialized to, see `VersionReader.open`.
        limits: of both ports; for rows narrowed to what `max_ids` needs.
        memory: of a host that has a name.
    """

    workspace: Workspace
    host: str
    port: int
    admin_port: int
    metrics_port: int | None
    shard: Shard
    slots: int
    queue: int
    max_ids: int
    rows: str | None
    limits: Limits
    security: ServerSecurity | None
    memory: HostMemory | None

    def serve(self, versions: Sequence[int]) -> None:
        """Answer from this process.

        Args:
            versions: to hold at first, the preferred one first; a host that remembers what it held, holds that.
        """
        lookup, admin = self._lookup_endpoint(self.port), self._admin_endpoint()
        state, first = self._state_at_start(versions)
        hosted = self._hosted(lookup.port)
        hosted.restore(state, whole=first)
        if first and self.memory:
            self.memory.remember(hosted.state())
        self._add_lookup(hosted, lookup)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted, shard=self.shard), admin.server)
        ports = {"lookup": lookup.port, "admin": admin.port, **self._exported()}
        serve_until_stopped([lookup, admin], lambda: _ready(hosted.state(), ports))
        hosted.close()

    def serve_with_workers(self, versions: Sequence[int], command: Sequence[str], count: int) -> None:
        """Answer from `count` processes of their own; this one starts, watches and directs them.

        Args:
            versions: as for `serve`.
            command: starts a process that calls `serve_as_worker`; the port and the socket are added to it.
        """
        admin = self._admin_endpoint()
        state, first = self._state_at_start(versions)
        with reserve_port(self.host, self.port) as reserved:
            port = reserved.getsockname()[1]
            workers = Workers(
                [*command, "--port", str(port), "--worker"], count, state=state, whole=first,
                remember=self.memory.remember if self.memory else None,
                count_in_files=self.metrics_port is not None,
            )
            try:
                workers.start()
                admin_pb2_grpc.add_CpuTierAdminServicer_to_server(WorkersAdminService(workers), admin.server)
                ports = {"lookup": port, "admin": admin.port, **self._exported(workers)}
                serve_until_stopped([admin], lambda: _ready(workers.state, ports) | {"workers": workers.pids})
            finally:
                workers.stop()

    def serve_as_worker(self, socket_path: str) -> None:
        """Answer as one of the workers of the process that started this one."""
        state, whole = state_from_parent(socket_path)
        hosted = self._hosted(self.port)
        hosted.restore(state, whole=whole)
        # Not before: to listen is to be given connections.
        lookup, admin = self._lookup_endpoint(self.port, reuse_port=True), WorkerAdmin(socket_path)
        self._add_lookup(hosted, lookup)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted, shard=self.shard), admin.server)
        serve_until_stopped([lookup, admin], lambda: {})
        hosted.close()

    def _state_at_start(self, versions: Sequence[int]) -> tuple[HostState, bool]:
        """What to hold, and whether that is for the first time."""
        remembered = self.memory.recall() if self.memory else None
        return remembered or HostState(tuple(sorted(set(versions))), preferred=versions[0]), remembered is None

    def _hosted(self, port: int) -> HostedVersions:
        return HostedVersions(
            lambda version: VersionReader.open(self.workspace, version, rows=self.rows, shard=self.shard),
            pin=lambda version: self.workspace.versions.pinned(
                version, role="cpu-tier", address=f"{self.host}:{port}"
            ),
            remember=self.memory.remember if self.memory else None,
        )

    def _lookup_endpoint(self, port: int, *, reuse_port: bool = False) -> Endpoint:
        return Endpoint(
            "lookup", self.host, port, self.slots + self.queue, refuse_more=True, security=self.security,
            limits=self.limits.for_ids(self.max_ids), reuse_port=reuse_port,
        )

    def _admin_endpoint(self) -> Endpoint:
        return Endpoint(
            "admin", self.host, self.admin_port, ADMIN_THREADS, security=self.security, limits=self.limits
        )

    def _add_lookup(self, hosted: HostedVersions, endpoint: Endpoint) -> None:
        service = LookupService(hosted, max_ids=self.max_ids, shard=self.shard, admission=Admission(self.slots))
        lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)

    def _exported(self, workers: Workers | None = None) -> dict[str, int]:
        if self.metrics_port is None:
            return {}
        folder = workers.metrics_folder if workers else None
        return {"metrics": metrics.export(self.host, self.metrics_port, self.security, workers=folder)}


def _ready(state: HostState, ports: dict[str, int]) -> dict[str, Any]:
    others = [version for version in state.loaded if version != state.preferred]
    return {"role": "cpu-tier", "versions": [state.preferred, *others], "ports": ports}
