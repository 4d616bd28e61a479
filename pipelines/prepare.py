"""Everything a run is made of, from canonical events: views, then pairs, graph and examples. Finished work is kept."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import ibis
import pyarrow as pa
from tqdm import tqdm

from pipelines import views
from pipelines.backend import connect, write_parquet
from pipelines.contracts.durable import creating_directory, replacing_file, require_writable
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.windows import Windows
from pipelines.contracts.workspace import Run, Workspace
from pipelines.dataset import Dataset
from pipelines.events import EventFacts, read_events, read_facts
from pipelines.examples import examples, examples_schema
from pipelines.graph import build_graph
from pipelines.pairs import PAIRS_SCHEMA, contrastive_pairs, within

__all__ = ["prepare_run", "prepare_views"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the same events and definition lead to other files than before."""

VIEWS: dict[str, Callable[[ibis.Table], ibis.Table]] = {
    "user_context": views.user_context,
    "item_context": views.item_context,
    "user_item_context": views.user_item_context,
}


@dataclass(frozen=True)
class _Stamp:
    """A file that names what the files beside it were made from; it is removed first and written last."""

    path: Path
    fingerprint: str

    def is_current(self) -> bool:
        return self.path.is_file() and self.path.read_text().strip() == self.fingerprint

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def set(self) -> None:
        with replacing_file(self.path) as staging:
            staging.write_text(self.fingerprint + "\n")


def prepare_views(workspace: Workspace, dataset: Dataset, *, engine: str = "duckdb", force: bool = False) -> bool:
    """Write the three context views, unless they are up to date.

    Args:
        engine: one of `pipelines.backend.ENGINES`.

    Returns:
        Whether anything was written.
    """
    facts = _facts(workspace, dataset)
    stamp = _Stamp(workspace.views / "made-from", _fingerprint(facts.sha256, dataset.context_kinds))
    if stamp.is_current() and not force:
        logger.info("views are up to date")
        return False
    require_writable(workspace.views)
    events = read_events(connect(engine), workspace)
    counted = events.filter(events.kind.isin(dataset.context_kinds))
    stamp.clear()
    for name, view in tqdm(VIEWS.items(), desc="views", unit="view", disable=None):
        rows = write_parquet(view(counted), workspace.views / f"{name}.parquet", views.VIEW_SCHEMAS[name])
        logger.info("%s: %d rows", name, rows)
    stamp.set()
    return True


def prepare_run(
    workspace: Workspace, dataset: Dataset, name: str, *, engine: str = "duckdb", force: bool = False, seed: int = 0
) -> bool:
    """Write a run's pairs, graph, examples and `run.json`, unless they are up to date.

    `run.json` is removed first and written last: without it, no later stage takes the run for prepared.

    Args:
        name: a run of the data set.
        engine: one of `pipelines.backend.ENGINES`.
        seed: of the negatives.

    Returns:
        Whether anything was written.

    Raises:
        NotPrepared: there are no events.
        InvalidConfig: unknown run, another data set's events, or a window without events.
    """
    windows = dataset.windows(name)
    facts = _facts(workspace, dataset)
    run = workspace.run(name)
    definition = (windows.to_dict(), dataset.pair_kinds, repr(dataset.tasks), repr(dataset.relations))
    stamp = _Stamp(run.directory / "made-from", _fingerprint(facts.sha256, *definition, seed))
    if stamp.is_current() and not force:
        logger.info("run %s is up to date", name)
        return False
    require_writable(run.directory)
    events = read_events(connect(engine), workspace)
    _require_events(events, dataset, name, windows)
    with tqdm(total=3, desc=f"run {name}", unit="part", disable=None) as progress:
        pairs = contrastive_pairs(events, kinds=dataset.pair_kinds, window=windows.pretrain).to_pyarrow()
        progress.update()
        graph = build_graph(
            events, relations=dataset.relations, window=windows.pretrain, surfaces=dataset.log.kinds
        )
        progress.update()
        rows = examples(
            events, windows=windows, tasks=dataset.tasks, log_end=datetime.fromisoformat(facts.last), seed=seed
        )
        progress.update()
    stamp.clear()
    run.spec.unlink(missing_ok=True)
    _write(run, pairs, graph, rows, list(dataset.tasks))
    RunSpec(dataset.name, windows, tuple(dataset.tasks)).write(run.spec)
    stamp.set()
    return True


def _write(run: Run, pairs: pa.Table, graph, rows: pa.Table, tasks: list[str]) -> None:
    write_parquet(pairs, run.pairs, PAIRS_SCHEMA)
    shutil.rmtree(run.graph, ignore_errors=True)
    with creating_directory(run.graph) as staging:
        graph.write(staging)
    write_parquet(rows, run.examples, examples_schema(tasks))


def _facts(workspace: Workspace, dataset: Dataset) -> EventFacts:
    facts = read_facts(workspace)
    if facts.dataset != dataset.name:
        raise InvalidConfig(
            f"events in {workspace.root}", expected=f"those of {dataset.name}", got=f"those of {facts.dataset}",
            remedy=f"Run `facet ingest --dataset {dataset.reference}`, or use another --workspace.",
        )
    return facts


def _require_events(events: ibis.Table, dataset: Dataset, run: str, windows: Windows) -> None:
    """Refuse a window in which nothing happened that it could be made from."""
    needed = {"pretrain": dataset.pair_kinds} | dict.fromkeys(Windows.ORDER[1:], dataset.sampled[1].kinds)
    for name, kinds in needed.items():
        window = getattr(windows, name)
        if not within(events, window).filter(ibis._.kind.isin(kinds)).count().to_pyarrow().as_py():
            raise InvalidConfig(
                f"window '{name}' of run {run} is empty", expected=f"events of kind {list(kinds)}",
                got=f"none from {window.start} to before {window.end}",
                remedy="Correct the run's windows in the data set's YAML; `facet ingest` prints the span of the log.",
            )


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], default=list).encode()).hexdigest()
