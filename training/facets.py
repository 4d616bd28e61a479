"""Pretrain a facet of a run: what `facet pretrain` does, callable from other stages."""

import logging
from pathlib import Path

from pipelines.contracts.durable import require_writable
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.runspec import FACETS, RunSpec
from pipelines.contracts.workspace import Workspace
from training.config import load_section
from training.facet_io import METRICS_NAME
from training.ids import RunIds, load_ids, require_same_ids

__all__ = ["pretrain_facet"]

log = logging.getLogger(__name__)


def pretrain_facet(
    workspace: Workspace, facet: str, *, run: str, seed: int, config: Path | None = None, force: bool = False
) -> Path:
    """Train a facet's user and item tables on a run's pretraining window.

    A facet that is complete is left as it is; one that was interrupted goes on from its last epoch. Under `torchrun`
    every process calls this.

    Args:
        facet: `contrastive` or `kge`.
        config: YAML that overrides `training/defaults.yaml`.
        force: train again even if the facet is complete.

    Returns:
        The facet's folder, `Run.facet(facet, seed)`.

    Raises:
        InvalidConfig: an unknown facet, a bad option, an output folder that cannot be written, or a complete facet of
            other id rules.
        NotPrepared: the run has not been prepared.
        InvalidEvents: nothing to train on.
        InvalidTable: the loss is not finite; nothing is written.
    """
    if facet not in FACETS:
        raise InvalidConfig("facet", expected=f"one of {', '.join(FACETS)}", got=repr(facet), remedy="Choose one.")
    if seed < 0:
        raise InvalidConfig("seed", expected="0 or more", got=str(seed), remedy="Give another seed.")
    files = workspace.run(run)
    stage = f"prepare --run {run}"
    spec = RunSpec.read(workspace.require(files.spec, stage))
    source = workspace.require(files.pairs if facet == "contrastive" else files.graph, stage)
    directory = files.facet(facet, seed)

    from training.tables import TableOptions, process_group

    tables = load_section("tables", TableOptions, config)
    if facet == "contrastive":
        from training.contrastive import ContrastiveConfig as Config
        from training.contrastive import train_contrastive as train
    else:
        from training.kge.train import KgeConfig as Config
        from training.kge.train import train_kge as train
    section = load_section(facet, Config, config)
    ids = RunIds.of(workspace, files, load_ids(config))
    if (directory / METRICS_NAME).exists() and not force:
        require_same_ids(directory / METRICS_NAME, ids, pretrain=f"facet pretrain {facet} --run {run} --seed {seed}")
        log.info("%s is complete; --force trains it again", directory)
        return directory
    require_writable(directory.parent)
    with process_group() as processes:
        train(
            source, directory, section, tables=tables, window_end=spec.windows.pretrain.end_time, seed=seed,
            processes=processes, ids=ids,
        )
        processes.wait()
        if processes.is_first:
            log.info("wrote %s", directory)
    return directory
