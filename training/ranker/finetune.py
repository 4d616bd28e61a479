"""One arm of a run, from the workspace to the workspace."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.contracts.durable import creating_directory, require_writable
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import ARMS, FACETS, RunSpec
from pipelines.contracts.workspace import Run, Workspace
from training.facet_origin import FacetOrigin, current_facet
from training.ids import IdsConfig, RunIds
from training.ranker.checkpoint import TrainedRanker
from training.ranker.config import RankerConfig
from training.ranker.inputs import fold_lineages, load_folds
from training.ranker.pretrained import load_pretrained, vocabularies_of, warm_rows
from training.ranker.train import fit
from training.tables import TableOptions, process_group

__all__ = ["finetune"]

FORMAT = 1
"""Raised when the same inputs and settings lead to another ranker than before."""

_log = logging.getLogger(__name__)


def finetune(
    workspace: Workspace, run: Run, *, arm: str, seed: int, config: RankerConfig, options: TableOptions,
    id_configs: Mapping[str, IdsConfig] | None = None,
) -> TrainedRanker:
    """Train one arm and keep it in `run.ranker(arm, seed)`; one of the same inputs and settings is not trained again.

    Its lineage is removed first and written last: without it, a ranker does not count as trained.

    All arms have the same four tables, the same upper model and the same configuration. The arm says only which tables
    start from pretrained rows; the others start from small random rows. No table is frozen unless the configuration
    says so.

    Args:
        id_configs: entity -> its section of id rules, the one that its facets were pretrained with; by default every id
            has a row of its own.

    Raises:
        InvalidConfig: an unknown arm or task, or a fold that cannot be learned from.
        NotPrepared: examples, facets or context views are missing.
        StaleInput: a facet of other pairs, another graph, other windows or other id rules than are there now; or what
            was prepared does not fit the events.
        InvalidTable: pretrained rows that are not finite, or training that diverged.
    """
    if arm not in ARMS:
        raise InvalidConfig("--arm", expected=f"one of {', '.join(ARMS)}", got=repr(arm), remedy="Choose one of these.")
    spec = RunSpec.read(workspace.require(run.spec, f"prepare --run {run.name}"))
    ids = RunIds.of(workspace, run, id_configs or {})
    facets = {facet: _fitting_facet(workspace, run, facet, seed=seed, spec=spec, ids=ids) for facet in FACETS}
    pretrained = load_pretrained(workspace, run, seed=seed)
    directory = run.ranker(arm, seed)
    require_writable(directory.parent)
    with process_group() as processes:
        if processes.is_first:
            folds = load_folds(workspace, run)
        processes.wait()  # the first process joins the context, the others read what it kept
        if not processes.is_first:
            folds = load_folds(workspace, run)
        inputs = {**fold_lineages(workspace, run), **facets}
        settings = {
            "format": FORMAT, "arm": arm, "seed": seed, "tasks": spec.tasks, "dataset": spec.dataset,
            "windows": spec.windows.to_dict(), "ranker": config.to_dict(), "tables": asdict(options),
            "ids": ids.describe(), "vocabularies": ids.vocabularies_sha256(),
        }
        if _is_trained(directory, settings, inputs, stage=f"finetune --run {run.name} --arm {arm} --seed {seed}"):
            _log.info("%s is trained already", directory)
            return TrainedRanker.load(directory)
        processes.wait()  # every process has seen what lies there
        if processes.is_first:
            lineage_of(directory).unlink(missing_ok=True)
        seen = {"user": folds["finetune"].user, "item": folds["finetune"].item}
        vocabularies = vocabularies_of(pretrained, seen, ids)
        warm = {
            name: warm_rows(table, vocabularies[table.entity], scale=config.row_scale, std=config.init_std, seed=seed)
            for name, table in pretrained.items()
            if table.facet in ARMS[arm]
        }
        empty = {
            name: vocabularies[table.entity].empty_buckets(
                ids.stored(table.entity, seen[table.entity]), *([table.ids] if name in warm else [])
            )
            for name, table in pretrained.items()
        }
        trained = fit(
            folds, vocabularies, {name: table.dim for name, table in pretrained.items()}, warm, tasks=spec.tasks,
            seed=seed, config=config, options=options, processes=processes, empty=empty, label=f"{arm} seed {seed}",
        )
        trained.metrics.update(arm=arm, seed=seed, config=config.to_dict())
        if processes.is_first:
            shutil.rmtree(directory, ignore_errors=True)
            with creating_directory(directory) as staging:
                trained.save(staging)
            Lineage.record(
                f"ranker {arm} of run {run.name}, seed {seed}", directory, settings=settings, inputs=inputs,
                files=directory.glob("*/*"),  # tables and upper model, not how long it took
            )
        processes.wait()
    return trained


def _fitting_facet(workspace: Workspace, run: Run, facet: str, *, seed: int, spec: RunSpec, ids: RunIds) -> Lineage:
    origin = FacetOrigin.of(
        workspace, run, facet, seed=seed, window_end=spec.windows.pretrain.end_time, ids=ids, sections={}
    )
    return current_facet(workspace, run, facet, seed=seed, origin=origin)


def _is_trained(
    directory: Path, settings: Mapping[str, Any], inputs: Mapping[str, Lineage], *, stage: str
) -> bool:
    """Whether a ranker of these settings and inputs lies there; if another does, the log says what changed."""
    try:
        changes = Lineage.read(lineage_of(directory), stage=stage).changes(settings=settings, inputs=inputs)
    except (NotPrepared, StaleInput) as error:
        changes = [str(error)]
    if changes and directory.exists():
        _log.info("%s is trained anew: %s", directory, "; ".join(changes))
    return not changes
