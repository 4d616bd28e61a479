"""Context views against a count by hand, and against the future."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.views import VIEW_SCHEMAS, item_context, user_context, user_item_context
from tests.logs import FIRST_DAY, canonical, day, random_events

VIEWS = {"user_context": user_context, "item_context": item_context, "user_item_context": user_item_context}

moments = st.integers(0, 50 * 24).map(lambda hours: FIRST_DAY + timedelta(hours=hours))
some_events = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.just("buy"), moments), min_size=1, max_size=40
)


def as_of(view: pa.Table, moment, **keys: int) -> dict | None:
    """The latest row of an entity at or before a moment, as a point-in-time join reads it."""
    rows = [
        row for row in view.to_pylist()
        if all(row[key] == value for key, value in keys.items()) and row["event_timestamp"] <= moment
    ]
    return max(rows, key=lambda row: row["event_timestamp"], default=None)


def counted_by_hand(events, moment, *, key: int, entity: int) -> dict | None:
    """What the columns mean, read off the events one by one; `key` is the position of user or item in a row."""
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    times = [event[3] for event in events if event[key] == entity and event[3] < midnight]
    if not times:
        return None
    within = {days: [t for t in times if t >= midnight - timedelta(days=days)] for days in (7, 30)}
    return {
        "events_7d": len(within[7]),
        "events_30d": len(within[30]),
        "active_days_30d": len({t.date() for t in within[30]}),
        "last_event": max(times).timestamp(),
        "first_event": min(times).timestamp(),
    }


@settings(max_examples=40, deadline=None)
@given(events=some_events, moment=st.integers(0, 90 * 24).map(lambda hours: FIRST_DAY + timedelta(hours=hours)))
def test_running_sums_of_changes_are_counts_of_windows(events, moment) -> None:
    table = canonical(events)
    for view, key, name in ((user_context, 0, "user"), (item_context, 1, "item")):
        rows = view(table).to_pyarrow()
        for entity in (1, 2, 3):
            expected = counted_by_hand(events, moment, key=key, entity=entity)
            got = as_of(rows, moment, **{name: entity})
            if expected is None:
                assert got is None
            else:
                assert {column: got[column] for column in VIEW_SCHEMAS[f"{name}_context"].names[2:]} == {
                    column: expected[column] for column in VIEW_SCHEMAS[f"{name}_context"].names[2:]
                }


@settings(max_examples=20, deadline=None)
@given(events=some_events, moment=moments)
def test_a_pairs_history_is_all_that_came_before_the_day(events, moment) -> None:
    rows = user_item_context(canonical(events)).to_pyarrow()
    midnight = moment.replace(hour=0, minute=0)
    times = [t for user, item, _, t in events if (user, item) == (1, 1) and t < midnight]
    got = as_of(rows, moment, user=1, item=1)
    if not times:
        assert got is None
    else:
        expected = (len(times), len({t.date() for t in times}), max(times).timestamp())
        assert (got["events"], got["active_days"], got["last_event"]) == expected


@pytest.mark.parametrize("name", VIEWS)
def test_cutting_the_log_off_changes_no_earlier_row(name: str) -> None:
    events, cut = random_events(1), day(60)
    whole = VIEWS[name](canonical(events)).to_pyarrow()
    cut_off = VIEWS[name](canonical([event for event in events if event[3] < cut])).to_pyarrow()
    earlier = [rows.filter(pc.less_equal(rows["event_timestamp"], pa.scalar(cut))) for rows in (whole, cut_off)]
    assert earlier[0].num_rows > 100
    assert earlier[0].equals(earlier[1])


@pytest.mark.parametrize("name", VIEWS)
def test_an_event_is_not_seen_on_its_own_day(name: str) -> None:
    rows = VIEWS[name](canonical([(1, 1, "buy", day(3)), (1, 1, "buy", day(3.9))])).to_pyarrow()
    assert min(rows["event_timestamp"].to_pylist()) == day(4)


def test_windows_empty_again() -> None:
    rows = user_context(canonical([(1, 1, "buy", day(0.5))])).to_pyarrow().to_pylist()
    counts = [(row["event_timestamp"], row["events_7d"], row["events_30d"], row["active_days_30d"]) for row in rows]
    assert counts == [(day(1), 1, 1, 1), (day(8), 0, 1, 1), (day(31), 0, 0, 0)]


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_keyed_sorted_and_typed(name: str) -> None:
    schema = VIEW_SCHEMAS[name]
    rows = VIEWS[name](canonical(random_events(2))).to_pyarrow()
    keys = [column for column in schema.names if column in ("user", "item", "event_timestamp")]
    order = np.lexsort([rows[key].cast(pa.int64()).to_numpy() for key in reversed(keys)])
    assert (order == np.arange(rows.num_rows)).all()
    assert len(rows.group_by(keys).aggregate([])) == rows.num_rows
    assert rows.select(schema.names).cast(schema).column_names == rows.column_names
