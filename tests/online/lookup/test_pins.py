"""What serves a version keeps it from being retired, as processes: named while it lives, forgotten when it is gone."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.proto import admin_pb2, admin_pb2_grpc
from online.ranking.context_source import FeastContext
from online.ranking.service import RunnableModels
from online.rpc.channel import open_channel
from pipelines.contracts.errors import IntegrityError, VersionInUse, VersionNotFound
from pipelines.retire import retire
from tests.crash import require_served
from tests.releases import published_rows
from tests.waiting import PATIENCE_S


def pinned(workspace, role):
    return lambda version: workspace.versions.pinned(version, role=role)


def test_a_cpu_host_holds_from_load_to_unload(own_workspace) -> None:
    workspace = own_workspace.workspace
    hosted = HostedVersions(lambda version: VersionReader.open(workspace, version), pin=pinned(workspace, "cpu-tier"))
    for version in (1, 2, 1):
        hosted.load(version)
    assert [len(workspace.versions.holders(version)) for version in (1, 2)] == [1, 1]
    hosted.drain(1)
    with pytest.raises(VersionInUse, match=f"cpu-tier .pid {os.getpid()} "):
        retire(workspace, 1)
    hosted.unload(1)
    hosted.unload(1)
    retire(workspace, 1)
    with pytest.raises(VersionNotFound, match="retired"):
        hosted.load(1)
    hosted.close()
    assert workspace.versions.holders(2) == []


def test_a_load_that_fails_holds_nothing(own_workspace) -> None:
    workspace = own_workspace.workspace
    segment = next(path for path in workspace.segment(1, "item.kge").iterdir() if path.suffix != ".json")
    segment.write_bytes(segment.read_bytes()[:-1])
    hosted = HostedVersions(lambda version: VersionReader.open(workspace, version), pin=pinned(workspace, "cpu-tier"))
    with pytest.raises(IntegrityError):
        hosted.load(1)
    retire(workspace, 1)


def test_a_ranker_holds_from_load_to_unload(own_workspace) -> None:
    workspace = own_workspace.workspace
    models = RunnableModels(
        lambda version: SimpleNamespace(context=()), context=FeastContext(workspace.feature_repo),
        pin=pinned(workspace, "ranker"),
    )
    for version in (1, 2, 1):
        models.load(version)
    with pytest.raises(VersionInUse, match="ranker"):
        retire(workspace, 1)
    models.unload(1)
    retire(workspace, 1)
    models.close()
    assert workspace.versions.holders(2) == []


@pytest.mark.slow
def test_servers_as_processes(own_workspace, launch) -> None:
    workspace = own_workspace.workspace
    tier = launch(workspace, "serve", "cpu-tier", "--versions", "2,1").wait_ready()
    ranker = launch(workspace, "serve", "ranker", "--versions", "1", "--cpu-tier", tier.port("lookup")).wait_ready()

    status, _, refusal = launch(workspace, "retire", "1").finish()
    assert status == 2 and workspace.versions.numbers() == [1, 2]
    for process, role, port in ((tier, "cpu-tier", "lookup"), (ranker, "ranker", "rank")):
        assert f"{role} at {process.port(port)} (pid {process.process.pid} on " in refusal

    with open_channel(tier.port("admin")) as channel:
        admin = admin_pb2_grpc.CpuTierAdminStub(channel)
        for step in (admin.Drain, admin.Unload):
            step(admin_pb2.VersionRequest(version=1), timeout=PATIENCE_S)
    with pytest.raises(VersionInUse, match="ranker") as refused:
        retire(workspace, 1)
    assert "cpu-tier" not in str(refused.value)
    ranker.kill()  # SIGKILL: it has no chance to let go
    status, said, errors = launch(workspace, "retire", "1").finish()
    assert status == 0, errors
    assert "retired version 1" in said and "feast apply" in said
    own_workspace.apply()

    ids, truth = published_rows(workspace, 2, "item.kge")
    client = LookupClient([tier.port("lookup")], timeout_s=PATIENCE_S)
    rows = client.lookup([2], {"item.kge": ids}).rows["item.kge"]
    client.close()
    assert np.array_equal(rows, truth)
    require_served(workspace, 2)
    assert tier.stop() == 0
    status, said, _ = launch(workspace, "gc").finish()
    assert status == 0 and "its process is gone" in said  # the ranker's; the tier took its own away
    assert list((workspace.versions.root / "pins").iterdir()) == []
