"""All arms and seeds of a run, on the same examples: what pretraining is worth, and how sure that is."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.runspec import ARMS, RunSpec
from pipelines.contracts.workspace import Run, Workspace
from training.ids import IdsConfig, RunIds
from training.ranker.config import RankerConfig
from training.ranker.finetune import finetune
from training.ranker.metrics import mean_interval
from training.tables import TableOptions

__all__ = ["BASELINE", "evaluate", "summarize"]

BASELINE = "scratch"

_log = logging.getLogger(__name__)

Aucs = Mapping[str, Sequence[Mapping[str, float]]]
"""arm -> by seed -> task -> test ROC-AUC."""


def evaluate(
    workspace: Workspace, run: Run, *, seeds: int, config: RankerConfig, options: TableOptions,
    pretrain: Callable[[int], None], id_configs: Mapping[str, IdsConfig] | None = None,
) -> dict[str, Any]:
    """Train every arm with every seed, as far as that was not done, and write `evaluation.json` into the run.

    Args:
        seeds: seeds 0 to seeds - 1; each has its own pretraining.
        pretrain: makes the facets of a seed if they are missing.
        id_configs: as `finetune` takes them.

    Returns:
        What `summarize` returns, and the conditions it holds for.

    Raises:
        InvalidConfig: fewer than one seed; and whatever `finetune` raises.
    """
    if seeds < 1:
        raise InvalidConfig("--seeds", expected="at least 1", got=str(seeds), remedy="3 or more give an interval.")
    spec = RunSpec.read(workspace.require(run.spec, "prepare"))
    aucs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    best_epochs: dict[str, list[int]] = {arm: [] for arm in ARMS}
    wall_s = 0.0
    with tqdm(total=seeds * len(ARMS), desc="evaluate", unit="ranker", disable=None) as progress:
        for seed in range(seeds):
            pretrain(seed)
            for arm in ARMS:
                progress.set_postfix_str(f"{arm} seed {seed}")
                trained = finetune(
                    workspace, run, arm=arm, seed=seed, config=config, options=options, id_configs=id_configs
                )
                aucs[arm].append(trained.metrics["auc"])
                best_epochs[arm].append(trained.metrics["best_epoch"])
                wall_s += trained.metrics["wall_s"]
                progress.update()
    result = summarize(aucs, tasks=spec.tasks)
    result["conditions"] = {
        "dataset": spec.dataset,
        "run": run.name,
        "windows": spec.windows.to_dict(),
        "seeds": seeds,
        "config": config.to_dict(),
        "ids": RunIds(id_configs or {}).describe(),
        "best_epochs": best_epochs,
        "training_wall_s": wall_s,
        "metric": "ROC-AUC on the test fold; ci95 is the half-width of the Student-t interval over seeds",
    }
    with replacing_file(run.directory / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=1))
    return result


def summarize(aucs: Aucs, *, tasks: Sequence[str]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds, by task and arm, of the AUC and of its paired difference to scratch.

    Pairing by seed takes out what a seed does to both arms: its pretraining, dense weights and batch order.

    >>> result = summarize({"scratch": [{"t": .5}, {"t": .6}], "kge": [{"t": .6}, {"t": .7}]}, tasks=["t"])
    >>> round(result["delta_vs_scratch"]["t"]["kge"]["mean"], 3), result["auc"]["t"]["kge"]["seeds"]
    (0.1, [0.6, 0.7])
    """
    values = {task: {arm: [by_task[task] for by_task in by_seed] for arm, by_seed in aucs.items()} for task in tasks}
    deltas = {
        task: {
            arm: [value - base for value, base in zip(by_seed, arms[BASELINE], strict=True)]
            for arm, by_seed in arms.items()
            if arm != BASELINE
        }
        for task, arms in values.items()
    }
    return {"auc": _with_intervals(values), "delta_vs_scratch": _with_intervals(deltas)}


def _with_intervals(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for task, arms in values.items():
        result[task] = {}
        for arm, by_seed in arms.items():
            mean, ci95 = mean_interval(by_seed)
            result[task][arm] = {"mean": mean, "ci95": ci95, "seeds": list(by_seed)}
    return result
