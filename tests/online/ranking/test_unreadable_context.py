"""A model whose context cannot be read: refused before it is loaded, and never a reason why another model's fails."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from online.proto import admin_pb2, admin_pb2_grpc
from online.ranking.client import RankClient
from online.ranking.context_source import FeastContext
from online.rpc.channel import open_channel
from online.rpc_error import Code, RpcError, rpc_error_from
from pipelines.contracts.context import CONTEXT_FEATURES, ContextFeature
from pipelines.contracts.errors import NotPrepared
from pipelines.publish import publish
from tests.releases import AS_OF, DIMS, FeastRepository, entity_ids, write_release
from tests.waiting import PATIENCE_S, joined, until

NOW = AS_OF.timestamp() + 3600.0
TREND = ContextFeature("trend_context", "clicks", "log1p")
DEFINITION = """
from datetime import timedelta

from entities import item
from feast import FeatureView, Field, FileSource
from feast.types import Float64, Int64, String
from sources import WORKSPACE

trend_context = FeatureView(
    name="trend_context",
    entities=[item],
    ttl=timedelta(0),
    schema=[Field(name="item", dtype=Int64), Field(name="clicks", dtype=Float64), Field(name="season", dtype=String)],
    source=FileSource(
        name="trend_source", path=str(WORKSPACE.views / "trend_context.parquet"), timestamp_field="event_timestamp"
    ),
    enabled={enabled},
)
"""


def apply_trend(repository: FeastRepository, *, enabled: bool = True) -> None:
    """Add a view that the model of version 3 reads."""
    items = entity_ids("item", 200)
    table = pa.table(
        {
            "item": pa.array(items, pa.int64()),
            "event_timestamp": pa.array([AS_OF] * len(items), pa.timestamp("us", tz="UTC")),
            "clicks": pa.array(np.arange(len(items), dtype=np.float64)),
            "season": pa.array(["summer"] * len(items)),
        }
    )
    pq.write_table(table, repository.workspace.views / "trend_context.parquet")
    (repository.path / "trend_context.py").write_text(DEFINITION.format(enabled=enabled))
    repository.apply()


def remove_trend(repository: FeastRepository) -> None:
    (repository.path / "trend_context.py").unlink()
    repository.apply()


@pytest.fixture
def repository(own_workspace: FeastRepository) -> FeastRepository:
    """Versions 1 and 2, and a version 3 whose model reads a view that nobody has applied."""
    release = write_release(own_workspace.root / "trend", seed=3, context=(*CONTEXT_FEATURES, TREND))
    publish(own_workspace.workspace, release)
    own_workspace.apply()
    own_workspace.materialize([f"{name.replace('.', '_')}__v3" for name in DIMS])
    return own_workspace


@dataclass
class Traffic:
    """One caller, again and again: versions that answered, and refusals."""

    client: RankClient
    answered: list[int] = field(default_factory=list)
    refused: list[RpcError] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        item = entity_ids("item", 200)[3:5]
        while not self.stop.is_set():
            try:
                self.answered.append(self.client.rank(1, item, now_seconds=NOW).version)
            except RpcError as refusal:
                self.refused.append(refusal)

    def more(self) -> None:
        """Wait for two more requests to end: the second began after this was called."""
        seen = len(self.answered) + len(self.refused)
        until(lambda: len(self.answered) + len(self.refused) >= seen + 2)


@dataclass(frozen=True)
class Serving:
    tier: object
    ranker: object
    admin: admin_pb2_grpc.RankerAdminStub
    traffic: Traffic

    def load(self, version: int) -> None:
        self.admin.Load(admin_pb2.VersionRequest(version=version), timeout=PATIENCE_S)

    def refusal_to_load(self, version: int) -> RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.load(version)
        return rpc_error_from(caught.value, "the ranker")


@pytest.fixture
def serving(repository, host_cpu_tier, host_ranker) -> Iterator[Serving]:
    """Versions 1 and 3 on the CPU tier, which answers from 1; a ranker with 1; a caller who never pauses."""
    tier = host_cpu_tier(repository.workspace, (1, 3))
    ranker = host_ranker(repository, [tier.address], (1,))
    traffic = Traffic(RankClient(ranker.address, timeout_s=PATIENCE_S))
    caller = threading.Thread(target=traffic.run)
    with open_channel(ranker.admin_address) as channel:
        caller.start()
        traffic.more()
        yield Serving(tier, ranker, admin_pb2_grpc.RankerAdminStub(channel), traffic)
        traffic.stop.set()
        joined(caller)
    traffic.client.close()


def test_a_version_whose_view_is_not_applied_is_refused_and_the_others_answer(repository, serving) -> None:
    refusal = serving.refusal_to_load(3)
    assert refusal.code is Code.VERSION_NOT_PUBLISHED
    assert "trend_context" in str(refusal) and "feast apply" in str(refusal)
    serving.traffic.more()
    assert sorted(serving.ranker.state.pin()) == [1]
    apply_trend(repository)
    repository.materialize(["trend_context"])
    serving.load(3)
    serving.traffic.more()
    assert set(serving.traffic.answered) == {1} and not serving.traffic.refused
    serving.tier.state.promote(3)
    serving.traffic.more()
    assert serving.traffic.answered[-1] == 3 and not serving.traffic.refused


def test_a_view_that_is_lost_later_fails_only_the_model_that_reads_it(repository, serving) -> None:
    apply_trend(repository)
    repository.materialize(["trend_context"])
    serving.load(3)
    remove_trend(repository)  # Feast deletes what the online store has of it
    serving.traffic.more()
    assert set(serving.traffic.answered) == {1} and not serving.traffic.refused
    serving.tier.state.promote(3)
    serving.traffic.more()
    assert serving.traffic.refused[-1].code is Code.INTERNAL
    serving.load(2)  # the way out of it: version 3 cannot hinder it
    serving.tier.state.promote(1)
    serving.traffic.more()
    assert serving.traffic.answered[-1] == 1
    status = {model.version: model for model in serving.ranker.state.status().models}
    assert sorted(status) == [1, 2, 3] and status[1].failed == 0 and status[3].failed == len(serving.traffic.refused)
    assert serving.ranker.state.status().failed == 0


class TestFeastContext:
    """`FeastContext.require` by itself."""

    def test_a_registry_without_the_views_of_running_models_is_not_taken(self, repository) -> None:
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context = FeastContext(repository.workspace.feature_repo, [TREND])
        apply_trend(repository, enabled=False)
        missing = ContextFeature("item_context", "events_1d", "log1p")
        with pytest.raises(NotPrepared, match=r"item_context.*events_1d"):
            context.require([missing], beside=[TREND])
        views = repository.path / "context_views.py"
        source = views.read_text()
        assert '"first_event")' in source
        views.write_text(source.replace('"first_event")', '"first_event", "events_1d")'))
        repository.apply()
        with pytest.raises(NotPrepared, match=r"views \['trend_context'\].*trend_context: ValueError.*disabled"):
            context.require([missing], beside=[TREND])
        item = entity_ids("item", 200)[3:4]
        assert context.columns([TREND], users=item, items=item) == {"trend_context__clicks": 3.0}

    def test_a_view_that_comes_later_is_read_once_it_is_required(self, repository) -> None:
        context = FeastContext(repository.workspace.feature_repo, CONTEXT_FEATURES)
        with pytest.raises(NotPrepared, match=r"views \['trend_context'\]"):
            context.require([TREND], beside=CONTEXT_FEATURES)
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context.require([TREND], beside=CONTEXT_FEATURES)
        item = entity_ids("item", 200)[3:4]
        assert context.columns([TREND], users=item, items=item) == {"trend_context__clicks": 3.0}

    def test_a_view_that_running_models_have_lost_already_hinders_nobody(self, repository) -> None:
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context = FeastContext(repository.workspace.feature_repo, [TREND])
        views = repository.path / "context_views.py"
        views.write_text(views.read_text().replace('"first_event")', '"first_event", "events_1d")'))
        remove_trend(repository)  # what the online store has of it goes, too: the registry before does not help
        added = ContextFeature("item_context", "events_1d", "log1p")
        context.require([added], beside=[TREND])
        item = entity_ids("item", 200)[3:4]
        assert set(context.columns([added], users=item, items=item)) == {"item_context__events_1d"}

    def test_a_registry_that_has_what_is_required_is_not_read_again(self, repository) -> None:
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context = FeastContext(repository.workspace.feature_repo, [TREND])
        apply_trend(repository, enabled=False)
        context.require([TREND], beside=CONTEXT_FEATURES)
        item = entity_ids("item", 200)[3:4]
        assert context.columns([TREND], users=item, items=item) == {"trend_context__clicks": 3.0}

    def test_a_column_of_text_is_refused(self, repository) -> None:
        """A pair without a row would not show it; one with a row would fail every request."""
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context = FeastContext(repository.workspace.feature_repo, [TREND])
        with pytest.raises(NotPrepared, match="column season: expected a number, got STRING"):
            context.require([ContextFeature("trend_context", "season", "identity")])

    def test_two_models_may_transform_one_column_in_two_ways(self, workspace_with_versions) -> None:
        both = [ContextFeature("item_context", "events_7d", transform) for transform in ("log1p", "identity")]
        context = FeastContext(workspace_with_versions.workspace.feature_repo, both)
        item = entity_ids("item", 200)[5:6]
        got = context.columns(both, users=item, items=item)
        assert got == context.columns(both[:1], users=item, items=item) and set(got) == {"item_context__events_7d"}

    def test_a_registry_is_kept_until_a_feature_needs_another(self, repository) -> None:
        apply_trend(repository)
        repository.materialize(["trend_context"])
        context = FeastContext(repository.workspace.feature_repo, [TREND])
        apply_trend(repository, enabled=False)
        item = entity_ids("item", 200)[3:4]
        for features in ([TREND], [TREND, CONTEXT_FEATURES[0]]):  # Feast remembers how it resolved the first
            assert context.columns(features, users=item, items=item)["trend_context__clicks"] == 3.0
