"""Everything a run is made of, from canonical events: views, then pairs, graph and examples. Finished work is kept."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ibis
from tqdm import tqdm

from pipelines import views
from pipelines.backend import connect, write_parquet
from pipelines.contracts.durable import creating_directory, require_writable
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.windows import Windows
from pipelines.contracts.workspace import Workspace
from pipelines.dataset import Dataset
from pipelines.events import EventFacts, events_lineage, read_events, read_facts
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
class _Part:
    """Something that is made of the events, with its lineage.

    The lineage is removed first and written last: without it, no later stage takes the part for whole.

    Attributes:
        what: its name, for people.
        path: the file or folder.
        make: writes it.
        settings: what it depends on beside the events.
    """

    what: str
    path: Path
    make: Callable[[], None]
    settings: dict[str, Any]

    @property
    def lineage(self) -> Path:
        return lineage_of(self.path)

    def is_current(self, events: Lineage) -> bool:
        try:
            made = Lineage.read(self.lineage, stage="prepare")
        except NotPrepared:
            return False
        except StaleInput as error:
            logger.info("%s", error)
            return False
        changes = made.changes(settings=self.settings, inputs={"events": events})
        if changes:
            logger.info("%s is made anew: %s", self.what, "; ".join(changes))
        return not changes

    def remake(self, events: Lineage) -> None:
        self.lineage.unlink(missing_ok=True)
        self.make()
        Lineage.record(self.what, self.path, settings=self.settings, inputs={"events": events})


def prepare_views(workspace: Workspace, dataset: Dataset, *, engine: str = "duckdb", force: bool = False) -> bool:
    """Write the three context views, as far as they are not up to date.

    Args:
        engine: one of `pipelines.backend.ENGINES`.

    Returns:
        Whether anything was written.
    """
    _require_events_of(workspace, dataset)
    lineage, settings = events_lineage(workspace), {"format": FORMAT, "kinds": dataset.context_kinds}

    def writer(name: str) -> Callable[[], None]:
        def write() -> None:
            events = read_events(connect(engine), workspace)
            view = VIEWS[name](events.filter(events.kind.isin(dataset.context_kinds)))
            rows = write_parquet(view, workspace.views / f"{name}.parquet", views.VIEW_SCHEMAS[name])
            logger.info("%s: %d rows", name, rows)

        return write

    parts = [_Part(f"the view {name}", workspace.view(name), writer(name), settings) for name in VIEWS]
    stale = [part for part in parts if force or not part.is_current(lineage)]
    if stale:
        require_writable(workspace.views)
    for part in tqdm(stale, desc="views", unit="view", disable=None):
        part.remake(lineage)
    return bool(stale)


def prepare_run(
    workspace: Workspace, dataset: Dataset, name: str, *, engine: str = "duckdb", force: bool = False, seed: int = 0
) -> bool:
    """Write a run's pairs, graph, examples and `run.json`, as far as they are not up to date.

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
    facts = _require_events_of(workspace, dataset)
    lineage, run = events_lineage(workspace), workspace.run(name)
    spec = RunSpec(dataset.name, windows, tuple(dataset.tasks))

    def events() -> ibis.Table:
        return read_events(connect(engine), workspace)

    def write_pairs() -> None:
        pairs = contrastive_pairs(events(), kinds=dataset.pair_kinds, window=windows.pretrain)
        write_parquet(pairs, run.pairs, PAIRS_SCHEMA)

    def write_graph() -> None:
        graph = build_graph(
            events(), relations=dataset.relations, window=windows.pretrain, surfaces=dataset.log.kinds
        )
        shutil.rmtree(run.graph, ignore_errors=True)
        with creating_directory(run.graph) as staging:
            graph.write(staging)

    def write_examples() -> None:
        rows = examples(
            events(), windows=windows, tasks=dataset.tasks, log_end=datetime.fromisoformat(facts.last), seed=seed
        )
        write_parquet(rows, run.examples, examples_schema(list(dataset.tasks)))

    window = {"format": FORMAT, "window": windows.to_dict()["pretrain"]}
    relations = {key: [type(each).__name__, asdict(each)] for key, each in dataset.relations.items()}
    tasks = {key: [type(each).__name__, asdict(each)] for key, each in dataset.tasks.items()}
    parts = [
        _Part(f"pairs of run {name}", run.pairs, write_pairs, window | {"kinds": dataset.pair_kinds}),
        _Part(
            f"graph of run {name}", run.graph, write_graph,
            window | {"relations": relations, "order": list(relations), "surfaces": dataset.log.kinds},
        ),
        _Part(
            f"examples of run {name}", run.examples, write_examples,
            {"format": FORMAT, "windows": windows.to_dict(), "tasks": tasks, "order": list(tasks), "seed": seed},
        ),
    ]
    stale = [part for part in parts if force or not part.is_current(lineage)]
    if not stale and run.spec.is_file() and RunSpec.read(run.spec) == spec:
        logger.info("run %s is up to date", name)
        return False
    require_writable(run.directory)
    _require_events(events(), dataset, name, windows)
    run.spec.unlink(missing_ok=True)
    for part in tqdm(stale, desc=f"run {name}", unit="part", disable=None):
        part.remake(lineage)
    spec.write(run.spec)
    return True


def _require_events_of(workspace: Workspace, dataset: Dataset) -> EventFacts:
    """Facts of the events, if they are this data set's, read as it says now."""
    facts = read_facts(workspace)
    if facts.dataset != dataset.name:
        raise InvalidConfig(
            f"events in {workspace.root}", expected=f"those of {dataset.name}", got=f"those of {facts.dataset}",
            remedy=f"Run `facet ingest --dataset {dataset.reference}`, or use another --workspace.",
        )
    made = events_lineage(workspace)
    if changes := made.changes(settings=asdict(dataset.log), inputs=made.inputs):
        raise StaleInput(
            f"events in {workspace.root}", expected=f"those that `log` of {dataset.reference} makes of the log now",
            got="; ".join(changes), remedy=f"Run `facet ingest --dataset {dataset.reference}` again.",
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
