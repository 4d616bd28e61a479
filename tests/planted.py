"""A run whose structure is known: users buy the items of their cluster, so pretraining has something to find."""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.windows import Window, Windows
from pipelines.contracts.workspace import Run, Workspace
from tests.lineages import record_prepared

__all__ = ["CLUSTERS", "CUT", "ITEMS", "USERS", "WINDOW_END", "item_ids", "planted_run", "user_ids"]

CLUSTERS, USERS, ITEMS, PER_USER = 4, 60, 80, 14
WINDOW_END = datetime(2024, 2, 1, tzinfo=UTC)
HOLDOUT_DAYS = 7
CUT = WINDOW_END - timedelta(days=HOLDOUT_DAYS)
WINDOWS = Windows(
    Window(date(2024, 1, 1), date(2024, 2, 1)), Window(date(2024, 2, 1), date(2024, 3, 1)),
    Window(date(2024, 3, 1), date(2024, 3, 15)), Window(date(2024, 3, 15), date(2024, 4, 1)),
)
TIMESTAMP = pa.timestamp("us", tz="UTC")


def user_ids() -> np.ndarray:
    """int64 (USERS,); user number n belongs to cluster n % CLUSTERS. Descending: order is not to be relied on."""
    return 900 - 3 * np.arange(USERS)


def item_ids() -> np.ndarray:
    """int64 (ITEMS,); item number n belongs to cluster n % CLUSTERS."""
    return 7_000 + 5 * np.arange(ITEMS)


def planted_run(root: Path, *, seed: int = 0) -> tuple[Workspace, Run]:
    """A workspace with run `v1`: run.json, pairs.parquet, graph/ and their lineages, as `facet prepare` leaves them."""
    workspace = Workspace(root / "var")
    run = workspace.run("v1")
    run.graph.mkdir(parents=True)
    RunSpec("planted", WINDOWS, ("click",)).write(run.spec)
    random = np.random.default_rng(seed)
    of_cluster = [np.flatnonzero(np.arange(ITEMS) % CLUSTERS == cluster) for cluster in range(CLUSTERS)]
    user = np.repeat(np.arange(USERS), PER_USER)
    item = np.concatenate([random.choice(of_cluster[u % CLUSTERS], PER_USER, replace=False) for u in range(USERS)])
    # Three of a user's fourteen items fall on the held-out days.
    late = np.arange(len(user)) % PER_USER < 3
    day = np.where(late, 24 + random.integers(0, 7, len(user)), random.integers(0, 24, len(user)))
    moment = [datetime(2024, 1, 1, 12, tzinfo=UTC) + timedelta(days=int(d)) for d in day]
    order = np.argsort(day, kind="stable")
    pairs = {
        "user": pa.array(user_ids()[user[order]]), "item": pa.array(item_ids()[item[order]]),
        "event_timestamp": pa.array([moment[place] for place in order], TIMESTAMP),
    }
    pq.write_table(pa.table(pairs), run.pairs)
    write_graph(run.graph, user, item, moment)
    record_prepared(workspace, run)
    return workspace, run


def write_graph(folder: Path, user: np.ndarray, item: np.ndarray, moment: list[datetime]) -> None:
    """Users, items and categories (the clusters); bought (anchor) has times, in_category has none."""
    types = ["user"] * USERS + ["item"] * ITEMS + ["category"] * CLUSTERS
    ids = np.concatenate([user_ids(), item_ids(), 10 + np.arange(CLUSTERS)])
    pq.write_table(pa.table({
        "type": types, "node": pa.array(np.arange(len(types))), "id": pa.array(ids),
        "name": pa.nulls(len(types), pa.string()),
    }), folder / "nodes.parquet")
    categories = len(user), ITEMS
    pq.write_table(pa.table({
        "relation": pa.array(np.repeat([0, 1], categories), pa.int32()),
        "head": pa.array(np.concatenate([user, USERS + np.arange(ITEMS)])),
        "tail": pa.array(np.concatenate([USERS + item, USERS + ITEMS + np.arange(ITEMS) % CLUSTERS])),
        "event_timestamp": pa.array([*moment, *([None] * ITEMS)], TIMESTAMP),
        "weight": pa.array(np.ones(sum(categories)), pa.float32()),
    }), folder / "edges.parquet")
    (folder / "relations.json").write_text(json.dumps([
        {"name": "bought", "head": "user", "tail": "item", "surface": "offsite", "anchor": True, "edges": len(user)},
        {"name": "in_category", "head": "item", "tail": "category", "surface": "structural", "anchor": False,
         "edges": ITEMS},
    ]))
