"""Examples joined with Feast's offline store: point in time, row for row, and cached."""

import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import InvalidConfig, NotPrepared
from tests.lineages import record_again
from training.ranker import inputs
from training.ranker.inputs import historical_context, load_folds

COLUMN = {feature.key: position for position, feature in enumerate(CONTEXT_FEATURES)}
DAY_ZERO = datetime(2024, 1, 1, tzinfo=UTC)


def keys(rows: list[tuple[int, int, float]]) -> pd.DataFrame:
    """(user, item, days since the first day) -> entity frame."""
    user, item, day = zip(*rows, strict=True)
    moments = pd.to_datetime([DAY_ZERO + timedelta(days=float(d)) for d in day], utc=True)
    return pd.DataFrame({"user": user, "item": item, "event_timestamp": moments})


def known_events(context: np.ndarray, key: str) -> np.ndarray:
    return np.expm1(context[:, COLUMN[key]].astype(np.float64))


def test_a_row_describes_the_moment_and_nothing_later(applied_world):
    context = historical_context(
        applied_world.feature_repo, keys([(1_000, 5_000, 6.999), (1_000, 5_000, 7.0), (1_000, 5_000, 13.5)])
    )
    # rows are stamped every 7 days with that day's number: 0 before day 7, 7 from day 7's midnight on
    np.testing.assert_allclose(known_events(context, "user_context__events_7d"), [0, 7, 7], atol=1e-5)
    np.testing.assert_allclose(known_events(context, "item_context__events_30d"), [0, 7, 7], atol=1e-5)
    np.testing.assert_allclose(known_events(context, "user_item_context__events"), [0, 7, 7], atol=1e-5)
    # last_event is one day before the row's stamp
    np.testing.assert_allclose(known_events(context, "user_context__last_event"), [7.999, 1, 7.5], atol=1e-4)


def test_what_has_no_row_yet_is_missing(applied_world):
    frame = keys([(1_000, 5_000, -0.5), (9, 9, 30), (1_000, 5_001, 30)])
    context = historical_context(applied_world.feature_repo, frame)
    assert np.isnan(context[:2]).all()
    pair = [position for key, position in COLUMN.items() if key.startswith("user_item")]
    assert np.isnan(context[2, pair]).all() and not np.isnan(np.delete(context[2], pair)).any()


@settings(max_examples=5, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1_000, 1_056), st.integers(5_000, 5_076), st.integers(-10, 180).map(lambda d: d / 2)),
        min_size=1, max_size=60,
    )
)
def test_rows_keep_their_order_whatever_is_asked(applied_world, rows):
    frame = keys(rows)
    context = historical_context(applied_world.feature_repo, frame)
    expected = np.array([np.nan if day < 0 else min(day // 7 * 7, 84) for _, _, day in rows], float)
    np.testing.assert_allclose(known_events(context, "user_context__events_7d"), expected, atol=1e-4)
    np.testing.assert_allclose(known_events(context, "item_context__active_days_30d"), expected, atol=1e-4)
    pair = np.array([user - 1_000 == item - 5_000 and user < 1_040 for user, item, _ in rows])
    np.testing.assert_allclose(
        known_events(context, "user_item_context__active_days"), np.where(pair, expected, np.nan), atol=1e-4
    )


def test_joins_in_chunks_give_the_same(applied_world, monkeypatch):
    generator = np.random.default_rng(0)
    frame = keys([(1_000 + int(u), 5_000 + int(i), float(d)) for u, i, d in generator.integers(0, 50, (40, 3))])
    whole = historical_context(applied_world.feature_repo, frame)
    monkeypatch.setattr(inputs, "JOIN_CHUNK_ROWS", 7)
    np.testing.assert_array_equal(historical_context(applied_world.feature_repo, frame), whole)


def test_a_planted_future_event_never_shows_in_an_earlier_example(world):
    before = load_folds(world.workspace, world.run)
    planted = world.workspace.views / "user_context.parquet"
    table = pq.read_table(planted)
    cut = pa.scalar(datetime(2024, 3, 1, tzinfo=UTC), table.schema.field("event_timestamp").type)
    future = pc.greater_equal(table["event_timestamp"], cut)
    loud = pc.if_else(future, 1e6, table["events_7d"])
    pq.write_table(table.set_column(table.schema.get_field_index("events_7d"), "events_7d", loud), planted)
    record_again(planted)
    world.apply_features()
    after = load_folds(world.workspace, world.run)
    column = COLUMN["user_context__events_7d"]
    np.testing.assert_array_equal(before["finetune"].context, after["finetune"].context)
    later = ~np.isnan(after["test"].context[:, column])
    assert later.any() and (after["test"].context[later, column] > 13).all()


def test_folds_hold_the_examples_in_their_order(world):
    table = pq.read_table(world.run.examples).to_pandas()
    folds = load_folds(world.workspace, world.run)
    for name, fold in folds.items():
        mine = table[table["fold"] == name]
        np.testing.assert_array_equal(fold.user, mine["user"])
        np.testing.assert_array_equal(fold.item, mine["item"])
        np.testing.assert_array_equal(fold.labels, mine[["click", "convert"]].to_numpy(np.float32))
        assert fold.context.dtype == np.float32 and fold.context.shape == (len(mine), len(CONTEXT_FEATURES))


def test_the_join_is_done_once_and_again_when_an_input_changes(world, monkeypatch):
    first = load_folds(world.workspace, world.run)
    calls = []
    monkeypatch.setattr(inputs, "historical_context", lambda repo, frame: calls.append(1) or first_context)
    first_context = np.zeros((len(pq.read_table(world.run.examples)), len(CONTEXT_FEATURES)), np.float32)
    again = load_folds(world.workspace, world.run)
    assert not calls
    np.testing.assert_array_equal(first["test"].context, again["test"].context)
    table = pq.read_table(world.run.examples)
    pq.write_table(table.slice(0, len(table)).replace_schema_metadata({"changed": "yes"}), world.run.examples)
    record_again(world.run.examples)
    load_folds(world.workspace, world.run)
    assert calls == [1]


def test_a_fold_without_labels_is_refused(world):
    table = pq.read_table(world.run.examples)
    nothing = pa.nulls(len(table), pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("convert"), "convert", nothing), world.run.examples)
    record_again(world.run.examples)
    with pytest.raises(InvalidConfig, match="'convert' cannot be learned"):
        load_folds(world.workspace, world.run)


def test_an_empty_fold_is_refused(world):
    table = pq.read_table(world.run.examples)
    pq.write_table(table.filter(pc.not_equal(table["fold"], "test")), world.run.examples)
    record_again(world.run.examples)
    with pytest.raises(InvalidConfig, match="fold 'test'"):
        load_folds(world.workspace, world.run)


def test_what_is_not_prepared_is_named(world):
    world.run.examples.unlink()
    with pytest.raises(NotPrepared, match="facet prepare"):
        load_folds(world.workspace, world.run)


def test_a_repository_that_was_not_applied_says_so(world):
    shutil.rmtree(world.workspace.root / "feast")
    with pytest.raises(NotPrepared, match="feast apply"):
        load_folds(world.workspace, world.run)
    shutil.rmtree(world.feature_repo)
    with pytest.raises(NotPrepared, match=r"feature_store\.yaml"):
        load_folds(world.workspace, world.run)
