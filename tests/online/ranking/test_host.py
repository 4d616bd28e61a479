"""A ranker as a process, with its rows in the same process; what it remembers."""


import grpc
import numpy as np
import pytest

from online.host_state import HostMemory, HostState
from online.proto import admin_pb2, admin_pb2_grpc
from online.ranking.client import RankClient
from online.ranking.context_source import ContextSource
from online.ranking.runnable import RunnableModels
from online.rpc.channel import open_channel
from online.rpc_error import Code, RpcError, rpc_error_from
from pipelines.contracts.errors import VersionNotFound
from tests.online.recorded_pin import recorded_pin
from tests.waiting import PATIENCE_S


def test_a_ranker_with_its_own_rows_is_rolled_out_as_a_pair_of_hosts(own_workspace, launch) -> None:
    words = ("serve", "ranker", "--cpu-tier", "local", "--versions", "1", "--name", "both", "--device", "cpu")
    host = launch(own_workspace.workspace, *words).wait_ready()
    assert host.ready["versions"] == [1] and set(host.ready["ports"]) == {"rank", "admin"}
    assert _version(host) == 1
    with open_channel(host.port("admin")) as channel:
        models, rows = admin_pb2_grpc.RankerAdminStub(channel), admin_pb2_grpc.CpuTierAdminStub(channel)
        one, two = (admin_pb2.VersionRequest(version=version) for version in (1, 2))
        models.Load(two, timeout=PATIENCE_S)
        rows.Load(two, timeout=PATIENCE_S)
        assert _version(host) == 1
        rows.Promote(two, timeout=PATIENCE_S)
        assert _version(host) == 2
        with pytest.raises(grpc.RpcError) as caught:
            models.Unload(one, timeout=PATIENCE_S)
        assert rpc_error_from(caught.value, "the ranker").code is Code.STILL_ANSWERING
        rows.Drain(one, timeout=PATIENCE_S)
        rows.Unload(one, timeout=PATIENCE_S)
        status = models.Unload(one, timeout=PATIENCE_S)
        assert [(model.version, model.answered) for model in status.models] == [(2, 1)]
    # what it would come back with; that it does, the chaos series shows
    assert HostMemory(own_workspace.workspace, "both").recall() == HostState(loaded=(2,))
    assert HostMemory(own_workspace.workspace, "both.rows").recall() == HostState(loaded=(2,), preferred=2)


def _version(host) -> int:
    client = RankClient(host.port("rank"), timeout_s=PATIENCE_S)
    try:
        return client.rank(1, np.array([1, 2]), now_seconds=1.4e9).version
    finally:
        client.close()


class Loaded:
    """What a scorer is to `RunnableModels`."""

    manifest_sha256, device, context = "0" * 64, "cpu", ()


class NoFeatures(ContextSource):
    def columns(self, features, *, users, items):
        return {}


def _load(version: int) -> Loaded:
    if version > 2:
        raise VersionNotFound(f"version {version}", expected="a published one", got="none", remedy="Publish it.")
    return Loaded()


def test_what_a_ranker_holds_is_remembered_at_every_change() -> None:
    remembered = []
    models = RunnableModels(_load, context=NoFeatures(), remember=remembered.append)
    models.load(1)
    models.load(2)
    models.unload(1)
    models.unload(1)
    with pytest.raises(VersionNotFound):
        models.load(3)
    with pytest.raises(RpcError):
        models.unload(2)
    assert [state.loaded for state in remembered] == [(1,), (1, 2), (2,), (2,)]


def test_a_version_is_pinned_from_before_it_is_loaded_until_after_it_is_unloaded() -> None:
    """Else it could be retired in between, and its files be gone from under whoever opens them."""
    happened: list[str] = []

    def load(version: int) -> Loaded:
        happened.append(f"load {version}")
        return _load(version)

    models = RunnableModels(load, context=NoFeatures(), pin=recorded_pin(happened))
    for version in (1, 2, 2):
        models.load(version)
    with pytest.raises(VersionNotFound):
        models.load(3)
    assert happened == ["pin 1", "load 1", "pin 2", "load 2", "pin 3", "load 3", "release 3"]
    models.unload(1)
    models.unload(1)
    assert happened[7:] == ["release 1"]
    models.close()
    assert happened[8:] == ["release 2"]


def test_a_ranker_comes_back_without_what_was_retired_meanwhile() -> None:
    models = RunnableModels(_load, context=NoFeatures())
    models.restore(HostState(loaded=(2, 3)))
    assert sorted(models.pin()) == [2]
    with pytest.raises(VersionNotFound):
        RunnableModels(_load, context=NoFeatures()).restore(HostState(loaded=(3,)))
    with pytest.raises(VersionNotFound):
        RunnableModels(_load, context=NoFeatures()).restore(HostState(loaded=(1, 3)), whole=True)


def test_a_latency_on_a_bound_is_within_it() -> None:
    models = RunnableModels(_load, context=NoFeatures())
    models.load(1)
    for latency_ms in (0.1, 0.5, 0.6, 5.0, 5000.0, 5000.1):
        models.count_answer(1, latency_ms)
    status = models.status()
    bounds, (model,) = [*status.latency_bounds_ms, float("inf")], status.models
    counts = {bound: count for bound, count in zip(bounds, model.latency_counts, strict=True) if count}
    assert counts == {0.5: 2, 1.0: 1, 5.0: 1, 5000.0: 1, float("inf"): 1}
