"""Positive (user, item) pairs for the contrastive facet: one per day on which it happened, pretraining window only."""

from collections.abc import Sequence

import ibis
import pyarrow as pa
from ibis import _

from pipelines.contracts.windows import Window
from pipelines.events import TIME, TIMESTAMP

__all__ = ["PAIRS_SCHEMA", "contrastive_pairs", "within"]

PAIRS_SCHEMA = pa.schema(
    [
        pa.field("user", pa.int64(), nullable=False),
        pa.field("item", pa.int64(), nullable=False),
        pa.field("event_timestamp", TIME, nullable=False),
    ]
)


def within(events: ibis.Table, window: Window) -> ibis.Table:
    """Events from the start of a window to before its end."""
    start, end = (ibis.literal(moment, TIMESTAMP) for moment in (window.start_time, window.end_time))
    return events.filter(_.event_timestamp >= start, _.event_timestamp < end)


def contrastive_pairs(events: ibis.Table, *, kinds: Sequence[str], window: Window) -> ibis.Table:
    """Distinct (user, item, day) of the window with an event of `kinds`, stamped with the first one.

    Returns:
        `PAIRS_SCHEMA`, sorted by time, user and item.
    """
    return (
        within(events, window)
        .filter(_.kind.isin(kinds))
        .group_by("user", "item", day=_.event_timestamp.truncate("D"))
        .agg(event_timestamp=_.event_timestamp.min())
        .select("user", "item", "event_timestamp")
        .order_by("event_timestamp", "user", "item")
    )
