"""Activity of users, items and pairs over time.

A row stamped T, always a midnight (UTC), describes events strictly before T only, and there is a row at every day on
which a value changes: the latest row at or before any moment is what was known at that moment.
"""

from datetime import timedelta

from entities import item, user
from feast import FeatureView, Field
from feast.types import Float64, Int64
from sources import item_context_source, user_context_source, user_item_context_source

__all__ = ["item_context", "user_context", "user_item_context"]

NEVER_EXPIRES = timedelta(0)


def _schema(join_keys: tuple[str, ...], features: tuple[str, ...]) -> list[Field]:
    """Complete, so that `feast apply` need not open the Parquet file."""
    return [Field(name=key, dtype=Int64) for key in join_keys] + [Field(name=name, dtype=Float64) for name in features]


user_context = FeatureView(
    name="user_context",
    entities=[user],
    ttl=NEVER_EXPIRES,
    schema=_schema(("user",), ("events_7d", "events_30d", "active_days_30d", "last_event")),
    source=user_context_source,
    description="events and active days of a user; last_event in seconds since 1970",
)

item_context = FeatureView(
    name="item_context",
    entities=[item],
    ttl=NEVER_EXPIRES,
    schema=_schema(("item",), ("events_7d", "events_30d", "active_days_30d", "first_event")),
    source=item_context_source,
    description="events and active days of an item; first_event in seconds since 1970",
)

user_item_context = FeatureView(
    name="user_item_context",
    entities=[user, item],
    ttl=NEVER_EXPIRES,
    schema=_schema(("user", "item"), ("events", "active_days", "last_event")),
    source=user_item_context_source,
    description="a user's own history with an item; last_event in seconds since 1970",
)
