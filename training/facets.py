"""Pretrain a facet of a run: what `facet pretrain` does, callable from other stages."""

import logging
from dataclasses import asdict
from pathlib import Path

from pipelines.contracts.durable import require_writable
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import FACETS, RunSpec
from pipelines.contracts.workspace import Workspace
from training.config import load_section
from training.facet_origin import FacetOrigin
from training.ids import RunIds, load_ids

__all__ = ["pretrain_facet"]

log = logging.getLogger(__name__)


def pretrain_facet(
    workspace: Workspace, facet: str, *, run: str, seed: int, config: Path | None = None, force: bool = False
) -> Path:
    """Train a facet's user and item tables on a run's pretraining window.

    A facet that is complete is left as it is, unless it was made from other pairs, another graph or another window than
    are there now: then it is trained anew. One that was interrupted goes on from its last epoch. Under `torchrun` every
    process calls this.

    Its lineage is removed first and written last: without it, a facet does not count as complete.

    Args:
        facet: `contrastive` or `kge`.
        config: YAML that overrides `training/defaults.yaml`.
        force: train again even if the facet is complete, whatever its configuration was.

    Returns:
        The facet's folder, `Run.facet(facet, seed)`.

    Raises:
        InvalidConfig: an unknown facet, a bad option or an output folder that cannot be written.
        NotPrepared: the run has not been prepared.
        StaleInput: the facet is complete and of another configuration; or what was prepared does not fit the events.
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
    directory, window_end = files.facet(facet, seed), spec.windows.pretrain.end_time

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
    origin = FacetOrigin.of(
        workspace, files, facet, seed=seed, window_end=window_end, ids=ids,
        sections={facet: asdict(section), "tables": asdict(tables)},
    )
    if not force and _is_complete(directory, origin, stage=f"pretrain {facet} --run {run} --seed {seed}"):
        log.info("%s is complete; --force trains it again", directory)
        return directory
    require_writable(directory.parent)
    with process_group() as processes:
        processes.wait()  # every process has seen what lies there
        if processes.is_first:
            lineage_of(directory).unlink(missing_ok=True)
        train(
            source, directory, section, tables=tables, window_end=window_end, seed=seed, processes=processes, ids=ids
        )
        processes.wait()
        if processes.is_first:
            Lineage.record(
                f"{facet} facet of run {run}, seed {seed}", directory, settings=origin.settings, inputs=origin.inputs,
                files=directory.glob("*.safetensors"),  # not how long it took
            )
            log.info("wrote %s", directory)
        processes.wait()
    return directory


def _is_complete(directory: Path, origin: FacetOrigin, *, stage: str) -> bool:
    """Whether a facet lies there that was made from `origin`; raises `StaleInput` for one of another configuration."""
    try:
        made = Lineage.read(lineage_of(directory), stage=stage)
    except (NotPrepared, StaleInput) as error:
        if directory.exists():
            log.info("%s is trained anew: %s", directory, error)
        return False
    origin.require_choices_of(made, stage=stage)
    changes = origin.other_inputs(made)
    if changes:
        log.info("%s is trained anew: %s", directory, "; ".join(changes))
    return not changes
