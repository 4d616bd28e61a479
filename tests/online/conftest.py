"""Servers for tests: real gRPC on loopback, in this process where that is enough, as `facet serve` where it is not.

`host_cpu_tier` and `host_ranker` serve a workspace from this process, `launch` starts `facet …` as a process of its
own. Everything is stopped at the end of its scope.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.service import ALL_IDS, CpuTierAdminService, LookupService
from online.proto import admin_pb2_grpc
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from tests.waiting import PATIENCE_S

FACET = [sys.executable, "-c", "from pipelines.cli import main; main()"]


SLOTS = 16


@dataclass
class Hosted:
    """A server in this process."""

    state: Any  # HostedVersions or RunnableModels
    service: Any
    endpoint: Endpoint
    admin: Endpoint

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.endpoint.port}"

    @property
    def admin_address(self) -> str:
        return f"127.0.0.1:{self.admin.port}"

    def start(self) -> "Hosted":
        self.endpoint.start()
        self.admin.start()
        return self

    def stop(self) -> None:
        for event in (self.endpoint.stop(), self.admin.stop()):
            event.wait(PATIENCE_S)


def admin_endpoint() -> Endpoint:
    return Endpoint("admin", "127.0.0.1", 0, 2, audited=True, limits=Limits().for_admin())


@pytest.fixture(scope="module")
def host_cpu_tier() -> Iterator[Any]:
    """Call with a workspace and versions: a CPU tier that serves them."""
    hosts: list[Hosted] = []

    def host(
        workspace, versions=(1,), *, max_ids=65_536, unload_wait_s=5.0, port=0, shard=ALL_IDS, slots=SLOTS, queue=64,
        serve=LookupService,
    ) -> Hosted:
        state = HostedVersions(lambda version: VersionReader.open(workspace, version), unload_wait_s=unload_wait_s)
        for version in versions:
            state.load(version)
        state.promote(versions[0])
        service = serve(state, max_ids=max_ids, shard=shard)
        endpoint = Endpoint("lookup", "127.0.0.1", port, slots, queue)
        hosted = Hosted(state, service, endpoint, admin_endpoint())
        service.add_to(hosted.endpoint.server)
        admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(state, shard=shard), hosted.admin.server)
        hosts.append(hosted.start())
        return hosted

    yield host
    for hosted in hosts:
        hosted.stop()


@pytest.fixture(scope="module")
def host_ranker() -> Iterator[Any]:
    """Call with a Feast repository, CPU tier addresses and versions: a ranker that scores with them."""
    from online.ranking.context_source import BatchedContext, FeastContext
    from online.ranking.scorer import Scorer
    from online.ranking.service import RankerAdminService, RankService, RunnableModels

    hosts: list[Hosted] = []
    clients: list[LookupClient] = []

    def host(repository, cpu_tiers, versions=(1,), *, timeout_s=PATIENCE_S) -> Hosted:
        context = BatchedContext(FeastContext(repository.workspace.feature_repo))
        state = RunnableModels(
            lambda version: Scorer.load(repository.workspace, version, device="cpu"), context=context
        )
        for version in versions:
            state.load(version)
        clients.append(LookupClient(cpu_tiers, timeout_s=timeout_s))
        service = RankService(state, clients[-1], context, max_candidates=256, timeout_s=timeout_s)
        endpoint = Endpoint("rank", "127.0.0.1", 0, SLOTS)
        hosted = Hosted(state, service, endpoint, admin_endpoint())
        service.add_to(hosted.endpoint.server)
        admin_pb2_grpc.add_RankerAdminServicer_to_server(RankerAdminService(state), hosted.admin.server)
        hosts.append(hosted.start())
        return hosted

    yield host
    for hosted in hosts:
        hosted.stop()
    for client in clients:
        client.close()


@dataclass
class Launched:
    """A `facet` process; its standard error goes to a file, so that no full pipe can stop it."""

    process: subprocess.Popen
    errors: Path
    ready: dict[str, Any] = field(default_factory=dict)

    def port(self, name: str) -> str:
        return f"127.0.0.1:{self.ready['ports'][name]}"

    def wait_ready(self) -> "Launched":
        """Read the ready line; bounded: a process that prints nothing in time is killed, which ends the read."""
        with ThreadPoolExecutor(1) as pool:
            line = pool.submit(self.process.stdout.readline)
            try:
                self.ready = json.loads(line.result(timeout=PATIENCE_S))
            except (TimeoutError, ValueError):
                self.kill()
                pytest.fail(f"not ready: {self.errors.read_text()[-2000:]}")
        return self

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[int, str, str]:
        """Wait for its end: exit status, standard output, standard error."""
        out, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, self.errors.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM, then wait; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    """Call with a workspace and arguments: `facet --workspace … <arguments>` as a process, stopped after the test."""
    launched: list[Launched] = []

    def start(workspace, *arguments: str) -> Launched:
        errors = tmp_path / f"stderr-{len(launched)}.txt"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [*FACET, "--workspace", str(workspace.root), *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        launched.append(Launched(process, errors))
        return launched[-1]

    yield start
    for process in launched:
        process.stop()
