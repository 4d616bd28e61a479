"""The ranker's examples: who came when, what was shown to the model, and what is true of it.

    positives   items of a visit (user and day) with an event of the sampled task's kinds            label 1
    negatives   items on sale that day, drawn by popularity (pipelines.negatives)                    label 0
    followed    on positives only: whether an outcome came within N days; null while it was open     1, 0, null

All rows of a visit carry the time of its first event, negatives too: the time tells nothing about the label.
"""

from datetime import datetime

import ibis
import numpy as np
import pyarrow as pa
from ibis import _

from pipelines.contracts.windows import Windows
from pipelines.events import TIME, TIMESTAMP
from pipelines.negatives import draw_negatives
from pipelines.pairs import within
from pipelines.tasks import Followed, Sampled

__all__ = ["FOLDS", "daily_sales", "examples", "examples_schema", "positives"]

FOLDS = ("finetune", "validation", "test")
MICROSECONDS_PER_DAY = 86_400_000_000
SHARE_STEPS = 1 << 32


def examples_schema(tasks: list[str]) -> pa.Schema:
    """fold, user, item, event_timestamp, then one nullable float32 label per task."""
    return pa.schema(
        [
            pa.field("fold", pa.string(), nullable=False),
            pa.field("user", pa.int64(), nullable=False),
            pa.field("item", pa.int64(), nullable=False),
            pa.field("event_timestamp", TIME, nullable=False),
        ]
        + [pa.field(task, pa.float32()) for task in tasks]
    )


def examples(
    events: ibis.Table, *, windows: Windows, tasks: dict[str, Sampled | Followed], log_end: datetime, seed: int = 0
) -> pa.Table:
    """Examples of the three folds.

    Args:
        events: canonical events.
        tasks: name -> task; exactly one is `Sampled`.
        log_end: time of the log's last event, up to which outcomes are known.
        seed: of the negatives.

    Returns:
        `examples_schema`, sorted by fold, time, user and item; (user, item, event_timestamp) is unique.
    """
    name, sampled = next((name, task) for name, task in tasks.items() if isinstance(task, Sampled))
    followed = {name: task for name, task in tasks.items() if isinstance(task, Followed)}
    sales = daily_sales(events, sampled).to_pyarrow()
    sales_columns = (_days(sales["day"]), sales["item"].to_numpy(), sales["n"].to_numpy())
    known_until = {"finetune": windows.validation.start_time, "validation": windows.test.start_time, "test": log_end}
    folds = []
    for fold in FOLDS:
        window = getattr(windows, fold)
        rows = positives(
            within(events, window), events, sampled=sampled, followed=followed, known_until=known_until[fold]
        ).to_pyarrow()
        rows = rows.filter(pa.array(_chosen(rows["user"].to_numpy(), sampled.visits)))
        folds.append(_with_negatives(rows, fold, name, list(tasks), sales_columns, sampled, seed))
    return pa.concat_tables(folds)


def daily_sales(events: ibis.Table, task: Sampled) -> ibis.Table:
    """Events of the task's kinds per day and item: (day, item, n)."""
    return (
        events.filter(_.kind.isin(task.kinds))
        .group_by("item", day=_.event_timestamp.truncate("D"))
        .agg(n=_.count())
        .select("day", "item", "n")
    )


def positives(
    fold: ibis.Table, events: ibis.Table, *, sampled: Sampled, followed: dict[str, Followed], known_until: datetime
) -> ibis.Table:
    """Items of the visits of a fold, with the labels of the followed tasks.

    Args:
        fold: canonical events of the fold's window.
        events: canonical events of the whole log, read for outcomes only.
        known_until: a label whose N days end after this moment is null.

    Returns:
        user, day, item, event_timestamp (the visit's first), and one float64 column per followed task; sorted by
        user, day and item.
    """
    of_visit = ibis.window(group_by=["user", "day"])
    rows = (
        fold.filter(_.kind.isin(sampled.kinds))
        .group_by("user", "item", day=_.event_timestamp.truncate("D"))
        .agg(seen=_.event_timestamp.min())
        .mutate(event_timestamp=_.seen.min().over(of_visit))
        .select("user", "item", "day", "event_timestamp")
    )
    for name, task in followed.items():
        rows = _labelled(rows, fold, events, name=name, task=task, known_until=known_until)
    return rows.order_by("user", "day", "item")


def _labelled(
    rows: ibis.Table, fold: ibis.Table, events: ibis.Table, *, name: str, task: Followed, known_until: datetime
) -> ibis.Table:
    """Add the label `name`: 1 or 0 where the pair was triggered that day and the outcome's days are over, else null."""
    key = ["user", "item", "day"]
    triggered = _pair_days(fold, task.trigger).mutate(triggered=ibis.literal(True))
    outcomes = _pair_days(events, task.outcome).rename(outcome_day="day")
    # Over once the midnight that ends the last of the N days has passed.
    over = rows.day + ibis.interval(days=task.days + 1) <= ibis.literal(known_until, TIMESTAMP)
    open_or_over = rows.mutate(over=over).left_join(triggered, key).select(*rows.columns, "over", "triggered")
    paired = rows.select(*key).join(outcomes, ["user", "item"])
    hits = (
        paired.filter(_.outcome_day > _.day, _.outcome_day <= _.day + ibis.interval(days=task.days))
        .select(*key)
        .distinct()
        .mutate(hit=ibis.literal(True))
    )
    joined = open_or_over.left_join(hits, key).select(*open_or_over.columns, "hit")
    label = ibis.ifelse(_.over & _.triggered.notnull(), _.hit.notnull().cast("float64"), ibis.null("float64"))
    return joined.mutate(**{name: label}).select(*rows.columns, name)


def _pair_days(events: ibis.Table, kinds: tuple[str, ...]) -> ibis.Table:
    return events.filter(_.kind.isin(kinds)).select("user", "item", day=_.event_timestamp.truncate("D")).distinct()


def _with_negatives(
    rows: pa.Table, fold: str, name: str, tasks: list[str], sales: tuple, sampled: Sampled, seed: int
) -> pa.Table:
    """Positives and their drawn negatives as one table of `examples_schema`."""
    user, day, item = rows["user"].to_numpy(), _days(rows["day"]), rows["item"].to_numpy()
    time = rows["event_timestamp"].cast(pa.int64()).to_numpy()
    is_first = np.ones(len(user), bool)  # rows are sorted by user and day: a visit is a run of rows
    is_first[1:] = (user[1:] != user[:-1]) | (day[1:] != day[:-1])
    visit = np.cumsum(is_first) - 1
    firsts = np.flatnonzero(is_first)
    drawn_visit, drawn_item = draw_negatives(visit, day, item, sales=sales, task=sampled, seed=seed)
    keys = {"fold": np.full(len(user) + len(drawn_item), fold)}
    keys["user"] = np.concatenate([user, user[firsts[drawn_visit]]])
    keys["item"] = np.concatenate([item, drawn_item])
    keys["event_timestamp"] = np.concatenate([time, time[firsts[drawn_visit]]])
    order = np.lexsort((keys["item"], keys["user"], keys["event_timestamp"]))
    columns = {key: pa.array(values[order]) for key, values in keys.items()}
    columns["event_timestamp"] = columns["event_timestamp"].cast(TIME)
    unknown = pa.nulls(len(drawn_item), pa.float64())
    for task in tasks:
        if task == name:
            label = pa.array(np.repeat([1.0, 0.0], [len(user), len(drawn_item)]))
        else:
            label = pa.concat_arrays([rows[task].combine_chunks().cast(pa.float64()), unknown])
        columns[task] = label.take(pa.array(order)).cast(pa.float32())
    return pa.table(columns).cast(examples_schema(tasks))


def _days(times: pa.ChunkedArray) -> np.ndarray:
    """Days since 1970 of midnights, int64 (N,)."""
    return times.cast(TIME).cast(pa.int64()).to_numpy() // MICROSECONDS_PER_DAY


def _chosen(users: np.ndarray, share: float) -> np.ndarray:
    """Whether each user is among the share that is kept; bool (N,). MurmurHash3's finalizer spreads the ids."""
    if share == 1.0:
        return np.ones(len(users), bool)
    mixed = users.astype(np.uint64)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(multiplier)
    return (mixed >> np.uint64(32)) < np.uint64(share * SHARE_STEPS)
