"""One arm of a run, from the workspace to the workspace."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from typing import Any

from pipelines.contracts.durable import creating_directory, require_writable, sha256_of
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.runspec import ARMS, FACETS, RunSpec
from pipelines.contracts.workspace import Run, Workspace
from training.ids import IdsConfig, RunIds
from training.ranker.checkpoint import TrainedRanker
from training.ranker.config import RankerConfig
from training.ranker.inputs import load_folds
from training.ranker.pretrained import ENTITIES, load_pretrained, vocabularies_of, warm_rows
from training.ranker.train import fit
from training.tables import TableOptions, process_group

__all__ = ["finetune"]

_log = logging.getLogger(__name__)


def finetune(
    workspace: Workspace, run: Run, *, arm: str, seed: int, config: RankerConfig, options: TableOptions,
    id_configs: Mapping[str, IdsConfig] | None = None,
) -> TrainedRanker:
    """Train one arm and keep it in `run.ranker(arm, seed)`; what was made from the same inputs is not made again.

    All arms have the same four tables, the same upper model and the same configuration. The arm says only which tables
    start from pretrained rows; the others start from small random rows. No table is frozen unless the configuration
    says so.

    Args:
        id_configs: entity -> its section of id rules, the one that its facets were pretrained with; by default every id
            has a row of its own.

    Raises:
        InvalidConfig: an unknown arm or task, a fold that cannot be learned from, or facets of other id rules.
        NotPrepared: examples, facets or context views are missing.
        InvalidTable: pretrained rows that are not finite, or training that diverged.
    """
    if arm not in ARMS:
        raise InvalidConfig("--arm", expected=f"one of {', '.join(ARMS)}", got=repr(arm), remedy="Choose one of these.")
    spec = RunSpec.read(workspace.require(run.spec, "prepare"))
    ids = RunIds.of(workspace, run, id_configs or {})
    pretrained = load_pretrained(workspace, run, seed=seed, ids=ids)
    directory = run.ranker(arm, seed)
    require_writable(directory.parent)
    with process_group() as processes:
        if processes.is_first:
            folds = load_folds(workspace, run)
        processes.wait()  # the first process joins the context, the others read what it kept
        if not processes.is_first:
            folds = load_folds(workspace, run)
        recipe = _recipe(run, ids.describe(), seed=seed, config=config, options=options)
        if (directory / "metrics.json").is_file():
            done = TrainedRanker.load(directory)
            if done.metrics["recipe"] == recipe:
                _log.info("%s is trained already", directory)
                return done
            _log.info("%s was trained from other inputs and is replaced", directory)
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
        trained.metrics.update(arm=arm, seed=seed, config=config.to_dict(), recipe=recipe)
        if processes.is_first:
            shutil.rmtree(directory, ignore_errors=True)
            with creating_directory(directory) as staging:
                trained.save(staging)
        processes.wait()
    return trained


def _recipe(run: Run, ids: dict[str, Any], *, seed: int, config: RankerConfig, options: TableOptions) -> str:
    """SHA-256 of all that a ranker is made from; equal recipes need no second training."""
    facets = [run.facet(facet, seed) / f"{entity}.safetensors" for facet in FACETS for entity in ENTITIES]
    hashes = [sha256_of(path) for path in (run.examples, run.directory / "context.npz", *facets)]
    parts = [*hashes, json.dumps([config.to_dict(), ids], sort_keys=True), repr(options)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
