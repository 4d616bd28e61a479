"""Context features as time-stamped views: what was known about a user, an item or a pair at any moment.

Windowed counts come from a log of changes. An event on day d raises the count of the last w days from midnight d + 1 on
and lowers it again from midnight d + 1 + w on; so the count at any moment is a running sum of changes up to it:

    day              d        d+1      ...      d+w      d+1+w
    change                    +n                         -n
    count of w days  0        n        n        n        0

One pass, linear in events times windows, exact, and without a self-join. A row stamped T (a midnight, UTC) describes
only what happened before T; a row exists at every T at which a column changes, so the latest row at or before a moment
is what was known then, and cutting the log off at T changes no row stamped T or earlier.
"""

import ibis
import pyarrow as pa
from ibis import _

from pipelines.events import TIME, TIMESTAMP

__all__ = [
    "ACTIVE_WINDOW_DAYS", "COUNT_WINDOWS_DAYS", "VIEW_SCHEMAS", "item_context", "user_context", "user_item_context",
]

COUNT_WINDOWS_DAYS = (7, 30)
ACTIVE_WINDOW_DAYS = 30


def _schema(keys: list[str], columns: list[str]) -> pa.Schema:
    return pa.schema(
        [pa.field(key, pa.int64(), nullable=False) for key in keys]
        + [pa.field("event_timestamp", TIME, nullable=False)]
        + [pa.field(column, pa.float64()) for column in columns]
    )


_WINDOWED = [*(f"events_{days}d" for days in COUNT_WINDOWS_DAYS), f"active_days_{ACTIVE_WINDOW_DAYS}d"]
VIEW_SCHEMAS = {
    "user_context": _schema(["user"], [*_WINDOWED, "last_event"]),
    "item_context": _schema(["item"], [*_WINDOWED, "first_event"]),
    "user_item_context": _schema(["user", "item"], ["events", "active_days", "last_event"]),
}
"""Schemas by view. All features are double; `last_event` and `first_event` are seconds since 1970."""


def user_context(events: ibis.Table) -> ibis.Table:
    """Activity of each user over the last 7 and 30 days, and when the last event was.

    Args:
        events: canonical events, already reduced to the kinds that count.

    Returns:
        `VIEW_SCHEMAS["user_context"]`, sorted by user and time.
    """
    changes = _windowed(events, "user")
    running = changes.mutate(last_event=_.last.max().over(_until_now("user")))
    return running.select(*VIEW_SCHEMAS["user_context"].names).order_by("user", "event_timestamp")


def item_context(events: ibis.Table) -> ibis.Table:
    """Popularity of each item over the last 7 and 30 days, and when it was first seen; as `user_context`."""
    changes = _windowed(events, "item")
    running = changes.mutate(first_event=_.first.min().over(_until_now("item")))
    return running.select(*VIEW_SCHEMAS["item_context"].names).order_by("item", "event_timestamp")


def user_item_context(events: ibis.Table) -> ibis.Table:
    """A pair's own history: events and active days so far, and when the last event was; as `user_context`."""
    daily = _daily(events, "user", "item")
    until_now = ibis.window(group_by=["user", "item"], order_by="day", preceding=None, following=0)
    running = daily.select(
        "user",
        "item",
        event_timestamp=(_.day + ibis.interval(days=1)).cast(TIMESTAMP),
        events=_.n.sum().over(until_now).cast("float64"),
        active_days=_.n.count().over(until_now).cast("float64"),
        last_event=_.last.max().over(until_now),
    )
    return running.order_by("user", "item", "event_timestamp")


def _daily(events: ibis.Table, *keys: str) -> ibis.Table:
    """Per entity and day (UTC): number of events, and the times of the first and the last in seconds since 1970."""
    seconds = _.event_timestamp.epoch_seconds().cast("float64")
    return events.group_by(*keys, day=_.event_timestamp.truncate("D")).agg(
        n=_.count(), first=seconds.min(), last=seconds.max()
    )


def _windowed(events: ibis.Table, key: str) -> ibis.Table:
    """Per entity and moment of change: the counts from then on, and the extremes of the day that ended then."""
    daily = _daily(events, key)
    nothing, no_time = ibis.literal(0, "int64"), ibis.null("float64")

    def changes(after_days: int, **counts: ibis.Value) -> ibis.Table:
        return daily.select(
            key,
            event_timestamp=(_.day + ibis.interval(days=after_days)).cast(TIMESTAMP),
            **{name: counts.get(name, nothing) for name in _WINDOWED},
            first=counts.get("first", no_time),
            last=counts.get("last", no_time),
        )

    active = f"active_days_{ACTIVE_WINDOW_DAYS}d"
    counts = {name: _.n for name in _WINDOWED} | {active: ibis.literal(1, "int64")}
    entering = changes(1, **counts, first=_.first, last=_.last)
    leaving = [changes(1 + days, **{f"events_{days}d": -_.n}) for days in COUNT_WINDOWS_DAYS]
    leaving.append(changes(1 + ACTIVE_WINDOW_DAYS, **{active: ibis.literal(-1, "int64")}))
    at_once = (
        ibis.union(entering, *leaving, distinct=False)
        .group_by(key, "event_timestamp")
        .agg(**{name: _[name].sum() for name in _WINDOWED}, first=_.first.min(), last=_.last.max())
    )
    return at_once.mutate(**{name: _[name].sum().over(_until_now(key)).cast("float64") for name in _WINDOWED})


def _until_now(key: str) -> ibis.expr.builders.WindowBuilder:
    return ibis.window(group_by=key, order_by="event_timestamp", preceding=None, following=0)
