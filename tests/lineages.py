"""Lineages of what tests write themselves, as the stage that makes it would write them.

A test that changes a file calls the same function again; one that wants a stale file does not.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.windows import Windows
from pipelines.contracts.workspace import Run, Workspace

__all__ = [
    "invented", "invented_events", "invented_ranker", "record_again", "record_facet", "record_prepared",
]


def invented(what: str, name: str, *, content: str = "", inputs: dict | None = None, **settings: object) -> Lineage:
    """The lineage of a file that is nowhere."""
    sha256 = hashlib.sha256(f"{name} {content}".encode()).hexdigest()
    return Lineage(what, {name: sha256}, settings, inputs or {})


def invented_events(log: str = "clicks") -> Lineage:
    """Events of a log with this content."""
    read = invented("the log /logs/shop.csv", "shop.csv", content=log)
    kinds = {"click": "onsite", "buy": "offsite"}
    return invented("the events", "events.parquet", content=log, inputs={"log": read}, kinds=kinds)


def record_prepared(workspace: Workspace, run: Run, *, log: str = "clicks") -> None:
    """Lineages of the events, of a run's pairs, graph and examples and of the views, as far as they are there."""
    spec, events = RunSpec.read(run.spec), invented_events(log)
    windows = spec.windows.to_dict()
    settings = {
        run.pairs: {"window": windows["pretrain"], "kinds": ["click"]}, run.graph: {"window": windows["pretrain"]},
        run.examples: {"windows": windows, "order": list(spec.tasks), "seed": 0},
        **{path: {"kinds": ["click"]} for path in sorted(workspace.views.glob("*.parquet"))},
    }
    events.write(lineage_of(workspace.events))
    for path, told in settings.items():
        if path.exists():
            what = f"the view {path.stem}" if path.parent == workspace.views else f"{path.stem} of run {run.name}"
            Lineage.record(what, path, settings=told, inputs={"events": events})


def record_again(path: Path) -> Lineage:
    """The lineage of a file or folder that a test changed, as if it had been made so."""
    made = Lineage.recorded(lineage_of(path), stage="test")
    files = [path.parent / name for name in made.files]
    return Lineage.record(made.what, path, settings=made.settings, inputs=made.inputs, files=files)


def record_facet(workspace: Workspace, run: Run, facet: str, seed: int, *, config: Path | None = None) -> Lineage:
    """The lineage of a facet's files, as `pretrain_facet` writes it."""
    from training.config import load_section
    from training.contrastive import ContrastiveConfig
    from training.facet_origin import FacetOrigin
    from training.ids import RunIds, load_ids
    from training.kge.train import KgeConfig
    from training.tables import TableOptions

    sections = {facet: {"contrastive": ContrastiveConfig, "kge": KgeConfig}[facet], "tables": TableOptions}
    origin = FacetOrigin.of(
        workspace, run, facet, seed=seed, window_end=RunSpec.read(run.spec).windows.pretrain.end_time,
        ids=RunIds.of(workspace, run, load_ids(config)),
        sections={name: asdict(load_section(name, section, config)) for name, section in sections.items()},
    )
    folder = run.facet(facet, seed)
    return Lineage.record(
        f"{facet} facet of run {run.name}, seed {seed}", folder, settings=origin.settings, inputs=origin.inputs,
        files=folder.glob("*.safetensors"),
    )


def invented_ranker(*, dataset: str, windows: Windows, tasks: Sequence[str], seed: int = 0) -> Lineage:
    """A ranker of arm `both` and all that it came from, down to the log."""
    days, made = windows.to_dict(), {"events": invented_events()}
    pairs = invented("pairs of run v1", "pairs.parquet", inputs=made, window=days["pretrain"])
    graph = invented("graph of run v1", "graph/edges.parquet", inputs=made, window=days["pretrain"])
    examples = invented("examples of run v1", "examples.parquet", inputs=made, windows=days, order=[*tasks], seed=0)
    views = {
        name: invented(f"the view {name}", f"{name}.parquet", inputs=made)
        for name in ("user_context", "item_context", "user_item_context")
    }
    inputs = {
        "examples": examples,
        "context": invented("context of run v1", "context.npz", inputs={"examples": examples, **views}),
    }
    for facet, source in (("contrastive", {"pairs": pairs}), ("kge", {"graph": graph})):
        name = f"{facet}-s{seed}/user.safetensors"
        inputs[facet] = invented(f"{facet} facet of run v1, seed {seed}", name, inputs=source, seed=seed)
    return invented(
        f"ranker both of run v1, seed {seed}", f"both-s{seed}/upper/model.safetensors", inputs=inputs, arm="both",
        seed=seed, tasks=[*tasks], dataset=dataset, windows=days,
    )
