"""A ranker as it runs: its models, where it gets rows and context, and its ports."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from online.host_state import HostMemory, HostState, restore
from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.row_source import RowSource
from online.lookup.same_host import SameHostRows
from online.lookup.service import CpuTierAdminService
from online.observe import metrics
from online.proto import admin_pb2_grpc
from online.ranking.context_source import BatchedContext, ContextSource, FeastContext
from online.ranking.runnable import RunnableModels
from online.ranking.scorer import Scorer, best_device
from online.ranking.service import RankerAdminService, RankService
from online.rpc.listening import Listening
from online.rpc.server import Endpoint, serve_until_stopped
from online.rpc_error import RpcError
from online.security.credentials import ClientSecurity
from pipelines.contracts.workspace import Workspace

__all__ = ["RankHost"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankHost:
    """What a ranker is told. `serve` runs it until it is stopped.

    Attributes:
        listening: its ports.
        cpu_tiers: targets of `LookupClient`; none: rows come from segments mapped in this process.
        lookup_connections: to every CPU host.
        rows: of this process, if it has its own: where they were materialized to, see `VersionReader.open`.
        device: `cpu` or `cuda`; `auto` is CUDA where there is one.
        timeout_s: how long to wait for rows.
        max_candidates: most candidates of one request.
        client_security: towards the CPU tier.
        memory, rows_memory: of a ranker that has a name: of its models, and of its own rows.
    """

    workspace: Workspace
    listening: Listening
    cpu_tiers: Sequence[str]
    lookup_connections: int
    rows: str | None = field(repr=False)  # a URL may hold a password
    device: str
    timeout_s: float
    max_candidates: int
    client_security: ClientSecurity | None
    memory: HostMemory | None
    rows_memory: HostMemory | None

    def serve(self, versions: Sequence[int]) -> None:
        """Load and warm up, then answer.

        Args:
            versions: to hold at first; a ranker that remembers what it held, holds that.
        """
        torch.set_num_threads(1)  # requests are the parallelism
        endpoint = self.listening.endpoint("rank", max_ids=self.max_candidates)
        admin = self.listening.admin_endpoint()
        hosted = None if self.cpu_tiers else self._hosted(endpoint)
        context = self._context()
        models = self._models(endpoint, hosted, context)
        restore(models, self.memory, HostState.at_first(versions))
        if hosted:  # after the models: no rows may come that nothing could score
            restore(hosted, self.rows_memory, HostState.at_first(versions))
        source = SameHostRows(hosted) if hosted else self._client()
        self._answer(endpoint, admin, models, hosted, source, context)
        source.close()
        models.close()
        if hosted:
            hosted.close()

    def _answer(
        self, endpoint: Endpoint, admin: Endpoint, models: RunnableModels, hosted: HostedVersions | None,
        source: RowSource, context: ContextSource,
    ) -> None:
        service = RankService(
            models, source, context, max_candidates=self.max_candidates, timeout_s=self.timeout_s
        )
        service.add_to(endpoint.server)
        admin_pb2_grpc.add_RankerAdminServicer_to_server(RankerAdminService(models), admin.server)
        if hosted:
            admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted), admin.server)
        try:
            service.warm_up()
        except RpcError as refusal:  # no reason to stay away: the CPU tier may come back before the first request
            logger.warning("not yet able to answer: %s", refusal)
        ports = {"rank": endpoint.port, "admin": admin.port, **self.listening.export_metrics()}
        serve_until_stopped([endpoint, admin], lambda: self._ready(models, ports))

    def _models(self, endpoint: Endpoint, hosted: HostedVersions | None, context: ContextSource) -> RunnableModels:
        device = best_device() if self.device == "auto" else self.device

        def answering(version: int) -> bool:
            state = hosted.state() if hosted else HostState(())
            return version in state.loaded and version not in state.draining

        return RunnableModels(
            lambda version: Scorer.load(self.workspace, version, device=device),
            context=context,
            pin=lambda version: self._pinned(version, "ranker", endpoint),
            remember=self.memory.remember if self.memory else None,
            answering=answering,
        )

    def _hosted(self, endpoint: Endpoint) -> HostedVersions:
        return HostedVersions(
            lambda version: VersionReader.open(self.workspace, version, rows=self.rows),
            pin=lambda version: self._pinned(version, "cpu-tier", endpoint),
            remember=self.rows_memory.remember if self.rows_memory else None,
        )

    def _pinned(self, version: int, role: str, endpoint: Endpoint) -> Any:
        return self.workspace.versions.pinned(version, role=role, address=f"{endpoint.host}:{endpoint.port}")

    def _client(self) -> LookupClient:
        return LookupClient(
            self.cpu_tiers, timeout_s=self.timeout_s, security=self.client_security, connections=self.lookup_connections
        )

    def _context(self) -> ContextSource:
        return BatchedContext(
            FeastContext(self.workspace.feature_repo),
            observe=lambda requests: metrics.observe_batch("context", requests),
        )

    @staticmethod
    def _ready(models: RunnableModels, ports: dict[str, int]) -> dict[str, Any]:
        runnable = models.pin()
        device = next(iter(runnable.values())).device
        return {"role": "ranker", "versions": sorted(runnable), "device": device, "ports": ports}
