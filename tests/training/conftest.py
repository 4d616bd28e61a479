"""A small world whose truth is known: what a user likes is the sign of a product of hidden vectors."""

import json
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from pipelines.contracts.runspec import FACETS, RunSpec
from pipelines.contracts.windows import Window, Windows
from pipelines.contracts.workspace import Run, Workspace
from tests.lineages import record_facet, record_prepared
from tests.releases import feast_apply
from training.config import load_section
from training.ranker.config import RankerConfig

USERS, ITEMS, DIM = 60, 80, 8
TASKS = ("click", "convert")
DAY_ZERO = datetime(2024, 1, 1, tzinfo=UTC)
WINDOWS = Windows(
    pretrain=Window(date(2024, 1, 1), date(2024, 2, 1)), finetune=Window(date(2024, 2, 1), date(2024, 3, 1)),
    validation=Window(date(2024, 3, 1), date(2024, 3, 15)), test=Window(date(2024, 3, 15), date(2024, 4, 1)),
)
FIRST_USER, FIRST_ITEM = 1_000, 5_000
TIMESTAMP = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class World:
    """A prepared workspace and the hidden vectors behind its labels."""

    workspace: Workspace
    run: Run
    users: np.ndarray
    items: np.ndarray

    @property
    def feature_repo(self) -> Path:
        return self.workspace.feature_repo

    def apply_features(self) -> None:
        """`feast apply` into an empty registry: its sources are absolute paths, a copied one points to the original."""
        shutil.rmtree(self.workspace.root / "feast", ignore_errors=True)
        feast_apply(self.feature_repo)


def write_facet(
    workspace: Workspace, run: Run, facet: str, seed: int, users: np.ndarray, items: np.ndarray
) -> None:
    """Facet files and their lineage as pretraining leaves them; the last five ids of each entity are unknown to it."""
    folder = run.facet(facet, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for entity, first, weight in (("user", FIRST_USER, users), ("item", FIRST_ITEM, items)):
        ids = np.arange(first, first + len(weight) - 5)
        save_file({"ids": ids, "weight": weight[:-5].astype(np.float32)}, folder / f"{entity}.safetensors")
    (folder / "metrics.json").write_text(json.dumps({"config": {}, "curve": [], "holdout": {}, "wall_s": 0.0}))
    record_facet(workspace, run, facet, seed)


def write_examples(run: Run, users: np.ndarray, items: np.ndarray, *, per_fold: dict[str, int]) -> None:
    generator = np.random.default_rng(1)
    frames = []
    for fold, count in per_fold.items():
        window = getattr(WINDOWS, fold)
        user, item = generator.integers(0, len(users), count), generator.integers(0, len(items), count)
        liking = (users[user] * items[item]).sum(1)
        click = (liking + generator.logistic(0, 0.3, count) > 0).astype(np.float32)
        convert = np.where(click == 1, (liking > 1).astype(np.float32), np.nan).astype(np.float32)
        seconds = generator.uniform(0, (window.end_time - window.start_time).total_seconds(), count)
        moments = [window.start_time + timedelta(seconds=float(s)) for s in seconds]
        frames.append(
            pd.DataFrame(
                {"fold": fold, "user": user + FIRST_USER, "item": item + FIRST_ITEM, "event_timestamp": moments,
                 "click": click, "convert": convert}
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    schema = pa.schema(
        [("fold", pa.string()), ("user", pa.int64()), ("item", pa.int64()), ("event_timestamp", TIMESTAMP),
         *((task, pa.float32()) for task in TASKS)]
    )
    pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), run.examples)


def write_views(workspace: Workspace) -> None:
    """Every view says at day d what it knows of the days before: `events_7d` of every entity is d."""
    workspace.views.mkdir(parents=True, exist_ok=True)
    days = np.arange(0, 91, 7)
    user, item = np.arange(FIRST_USER, FIRST_USER + USERS - 3), np.arange(FIRST_ITEM, FIRST_ITEM + ITEMS - 3)

    def write(name: str, keys: dict[str, np.ndarray], columns: tuple[str, ...]) -> None:
        count = len(next(iter(keys.values())))
        day = np.tile(days, count)
        moments = [DAY_ZERO + timedelta(days=int(d)) for d in day]
        frame = pd.DataFrame({key: np.repeat(values, len(days)) for key, values in keys.items()})
        frame["event_timestamp"] = moments
        for column in columns:
            frame[column] = day.astype(float)
            if column in ("last_event", "first_event"):
                frame[column] = (DAY_ZERO + timedelta(days=-1)).timestamp() + day * 86_400.0
        schema = pa.schema(
            [*((key, pa.int64()) for key in keys), ("event_timestamp", TIMESTAMP),
             *((column, pa.float64()) for column in columns)]
        )
        table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False).sort_by("event_timestamp")
        pq.write_table(table, workspace.views / f"{name}.parquet")

    write("user_context", {"user": user}, ("events_7d", "events_30d", "active_days_30d", "last_event"))
    write("item_context", {"item": item}, ("events_7d", "events_30d", "active_days_30d", "first_event"))
    pairs = {"user": user[:40], "item": item[:40]}
    write("user_item_context", pairs, ("events", "active_days", "last_event"))


@pytest.fixture(scope="session")
def applied_world(tmp_path_factory) -> World:
    """Built once: `feast apply` of the real feature_repo takes seconds. Tests that write take a copy (`world`)."""
    root = tmp_path_factory.mktemp("world")
    repo = Path(__file__).parents[2] / "feature_repo"
    shutil.copytree(repo, root / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    workspace = Workspace(root / "var")
    run = workspace.run("v1")
    run.directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    users, items = generator.normal(size=(USERS, DIM)) * 0.8, generator.normal(size=(ITEMS, DIM)) * 0.8
    RunSpec("planted", WINDOWS, TASKS).write(run.spec)
    write_examples(run, users, items, per_fold={"finetune": 4_000, "validation": 1_500, "test": 1_500})
    write_views(workspace)
    pairs = {"user": [FIRST_USER], "item": [FIRST_ITEM], "event_timestamp": [DAY_ZERO]}
    schema = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("event_timestamp", TIMESTAMP)])
    pq.write_table(pa.table(pairs, schema=schema), run.pairs)
    run.graph.mkdir()
    record_prepared(workspace, run)
    for facet in FACETS:
        for seed in range(2):
            write_facet(workspace, run, facet, seed, users, items)
    made = World(workspace, run, users, items)
    made.apply_features()
    return made


@pytest.fixture
def world(applied_world, tmp_path) -> World:
    """A copy whose run may be changed; the Feast registry and the views stay where they were applied."""
    root = tmp_path / "world"
    shutil.copytree(applied_world.workspace.root.parent, root)
    workspace = Workspace(root / "var")
    return World(workspace, workspace.run("v1"), applied_world.users, applied_world.items)


@pytest.fixture
def small() -> RankerConfig:
    """The defaults, made small enough for a test."""
    return replace(
        load_section("ranker", RankerConfig), epochs=2, batch_rows=256, hidden=(16,), cross_rank=4, row_scale=0.5
    )
