"""Synthetic events and logs for the tests of `pipelines`."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import ibis
import numpy as np
import pyarrow as pa

from pipelines.events import SCHEMA

__all__ = ["FIRST_DAY", "canonical", "day", "random_events", "shop_yaml"]

FIRST_DAY = datetime(2021, 1, 1, tzinfo=UTC)


def day(number: float) -> datetime:
    """Moment `number` days after `FIRST_DAY`."""
    return FIRST_DAY + timedelta(days=number)


def canonical(rows: Sequence[tuple[int, int, str, datetime]]) -> ibis.Table:
    """Canonical events from (user, item, kind, time), on DuckDB."""
    from pipelines.backend import connect

    user, item, kind, time = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = pa.table(
        {
            "user": pa.array(user, pa.int64()),
            "item": pa.array(item, pa.int64()),
            "kind": pa.array(kind, pa.string()),
            "surface": pa.array(["onsite"] * len(rows), pa.string()),
            "event_timestamp": pa.array(time, SCHEMA.field("event_timestamp").type),
            "value": pa.array([1.0] * len(rows), pa.float64()),
        },
        schema=SCHEMA,
    )
    backend = connect()
    backend.con.register("events", table)
    return backend.table("events")


def random_events(
    seed: int, *, events: int = 3000, users: int = 40, items: int = 60, days: int = 120, kinds: Sequence[str] = ("buy",)
) -> list[tuple[int, int, str, datetime]]:
    """Rows for `canonical`, popular items first, at times of whole seconds."""
    random = np.random.default_rng(seed)
    item = np.minimum(random.geometric(0.07, events), items)
    second = np.sort(random.integers(0, days * 86_400, events))
    return [
        (int(u), int(i), kinds[int(k)], FIRST_DAY + timedelta(seconds=int(s)))
        for u, i, k, s in zip(
            random.integers(1, users + 1, events), item, random.integers(0, len(kinds), events), second, strict=True
        )
    ]


def shop_yaml(**changes: str) -> str:
    """A whole definition for a CSV log with the columns who, what, how, millis (and price, label), by section.

    `changes` replaces sections: log, tasks, runs, graph, context_kinds, pair_kinds, or adds others.
    """
    sections = {
        "name": "name: shop",
        "log": """
log:
  columns: {user: who, item: what, kind: how, event_timestamp: epoch_ms(millis)}
  ids: {user: text, item: text}
  text: {item_title: label}
  number: {item_price: price}
  kinds: {view: onsite, buy: offsite}
  time_range: [2021-01-01, 2022-01-01]
  types: {millis: integer, price: number}""",
        "context_kinds": "context_kinds: [view, buy]",
        "pair_kinds": "pair_kinds: [view, buy]",
        "tasks": """
tasks:
  view: {type: sampled, kinds: [view], negatives: 2, on_sale_days: 30}
  buy_7d: {type: followed, trigger: [view], outcome: [buy], days: 7}""",
        "runs": """
runs:
  first:
    pretrain: [2021-01-01, 2021-02-01]
    finetune: [2021-02-01, 2021-03-01]
    validation: [2021-03-01, 2021-03-20]
    test: [2021-03-20, 2021-04-10]""",
        "graph": """
graph:
  viewed: {type: events, kinds: [view], anchor: true}
  bought: {type: events, kinds: [buy]}
  seen_together: {type: co_occurrence, kinds: [view], min_count: 1}
  called: {type: words, attribute: item_title, tail: word, min_count: 1}
  costs: {type: bands, attribute: item_price, tail: price_band, bands: 4}""",
    }
    return "\n".join((sections | changes).values()) + "\n"
