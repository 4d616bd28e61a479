"""Context from Feast's online store."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import Null, Value

from online.ranking.context_source import BatchedContext, ContextSource, FeastContext, _numbers
from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import NotPrepared
from tests.releases import AS_OF, entity_ids


def test_columns_are_the_views_latest_rows_and_nan_where_there_is_none(workspace_with_versions) -> None:
    workspace = workspace_with_versions.workspace
    context = FeastContext(workspace.feature_repo, CONTEXT_FEATURES)
    pairs = pq.read_table(workspace.views / "user_item_context.parquet").to_pandas()
    latest = pairs[pairs.event_timestamp == AS_OF].reset_index(drop=True)
    users, items = latest.user.to_numpy()[[4, 9, 4]], latest.item.to_numpy()[[4, 4, 9]]
    users[2] = -5
    got = context.columns(CONTEXT_FEATURES, users=users, items=items)
    assert set(got) == {feature.key for feature in CONTEXT_FEATURES}
    assert all(column.dtype == np.float64 and column.shape == (3,) for column in got.values())
    np.testing.assert_array_equal(got["user_item_context__events"], [latest.events[4], np.nan, np.nan])
    for view, key, asked in (("user_context", "user", users), ("item_context", "item", items)):
        table = pq.read_table(workspace.views / f"{view}.parquet").to_pandas()
        table = table[table.event_timestamp == AS_OF].set_index(key)
        for feature in CONTEXT_FEATURES:
            if feature.view == view:
                np.testing.assert_array_equal(got[feature.key], table[feature.column].reindex(asked).to_numpy())


def test_feast_is_asked_for_a_user_only_once(workspace_with_versions, monkeypatch) -> None:
    """Its answers have a copy of a user's row for every pair: of hundreds, a second call saves more than it costs."""
    workspace, asked, ask = workspace_with_versions.workspace, [], FeatureStore.get_online_features
    context = FeastContext(workspace.feature_repo, CONTEXT_FEATURES)

    def recorded(store: FeatureStore, *, entity_rows, **options):
        asked.append(entity_rows)
        return ask(store, entity_rows=entity_rows, **options)

    monkeypatch.setattr(FeatureStore, "get_online_features", recorded)
    users, items = entity_ids("user", 200)[[9, 3, *[9] * 118]], entity_ids("item", 200)[:120]
    context.columns(CONTEXT_FEATURES, users=users[:20], items=items[:20])
    assert [set(rows) for rows in asked] == [{"user", "item"}], "few pairs are asked for at once"
    asked.clear()
    got = context.columns(CONTEXT_FEATURES, users=users, items=items)
    by_user, by_pair = sorted(asked, key=len)
    assert sorted(by_user["user"]) == sorted(set(users.tolist())) and set(by_user) == {"user"}
    assert by_pair == {"user": users.tolist(), "item": items.tolist()}
    table = pq.read_table(workspace.views / "user_context.parquet").to_pandas()
    latest = table[table.event_timestamp == AS_OF].set_index("user")
    np.testing.assert_array_equal(got["user_context__events_7d"], latest.events_7d.reindex(users).to_numpy())
    assert len(set(got["user_context__events_7d"][:2])) == 2, "two users that differ"


def test_without_views_it_says_what_to_run(tmp_path) -> None:
    with pytest.raises(NotPrepared, match="feast apply"):
        FeastContext(tmp_path, CONTEXT_FEATURES)


def test_values_of_every_kind_become_numbers() -> None:
    present, absent = FieldStatus.PRESENT, FieldStatus.NOT_FOUND
    null = Value(null_val=Null.NULL)
    vectors = [
        GetOnlineFeaturesResponse.FeatureVector(
            values=[Value(double_val=2.5), Value(double_val=0), Value(), null, Value(double_val=7)],
            statuses=[present, present, present, present, absent],
        ),
        GetOnlineFeaturesResponse.FeatureVector(
            values=[Value(int64_val=3), Value(float_val=0.5), Value(bool_val=True), Value(int32_val=0), Value()],
            statuses=[present, present, present, present, absent],
        ),
    ]
    nan = np.nan
    np.testing.assert_array_equal(_numbers(vectors), [[2.5, 0.0, nan, nan, nan], [3.0, 0.5, 1.0, 0.0, nan]])


def test_combined_requests_get_their_own_columns(workspace_with_versions) -> None:
    """Threads that ask for other pairs and other features at once, some for one that does not exist."""
    source, reads = FeastContext(workspace_with_versions.workspace.feature_repo, CONTEXT_FEATURES), []
    combined = BatchedContext(source, max_pairs=40, observe=reads.append)
    users, items = entity_ids("user", 200), entity_ids("item", 200)

    def ask(thread: int) -> None:
        random = np.random.default_rng(thread)
        for _ in range(12):
            features = [CONTEXT_FEATURES[position] for position in random.permutation(11)[: random.integers(1, 12)]]
            count = int(random.integers(1, 20))
            pairs = {"users": np.full(count, random.choice(users)), "items": random.choice(items, count)}
            expected, got = source.columns(features, **pairs), combined.columns(features, **pairs)
            assert list(got) == [feature.key for feature in features]
            for key, column in expected.items():
                np.testing.assert_array_equal(got[key], column)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert max(reads) > 1, "nothing was combined, so this test says nothing"


def test_a_read_that_fails_fails_only_for_who_asked_for_it() -> None:
    class Failing(ContextSource):
        def columns(self, features, *, users, items):
            if -1 in users:
                raise KeyError("unfit")
            return {feature.key: items * 1.0 for feature in features}

    combined = BatchedContext(Failing())

    def ask(user: int) -> bool:
        pairs = {"users": np.full(3, user), "items": np.arange(3) + user}
        if user == -1:
            with pytest.raises(KeyError):
                combined.columns(CONTEXT_FEATURES, **pairs)
        else:
            column = combined.columns(CONTEXT_FEATURES, **pairs)["user_context__events_7d"]
            np.testing.assert_array_equal(column, pairs["items"])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [1, 2, -1, 3, 4, -1] * 20))
