"""`facet pretrain`: a run's pretraining window becomes one facet's user and item tables."""

import os
from pathlib import Path

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["pretrain"]


@click.command()
@click.argument("facet", metavar="contrastive|kge")
@click.option("--run", required=True, help="Name that the run was given at `facet prepare`.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first rows, the order and the negatives.")
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path),
    help="YAML with what differs from training/defaults.yaml, which explains every option.",
)
@click.option("--force", is_flag=True, help="Train again what is complete, also with another --config.")
@click.pass_obj
def pretrain(workspace: Workspace, facet: str, run: str, seed: int, config: Path | None, force: bool) -> None:
    """Pretrain one facet of users and items on a run's pretraining window.

    \b
    contrastive   rows whose cosine tells the items of a user from others
                  (reads pairs.parquet; in-batch and uniform negatives, logQ, temperature)
    kge           rows from link prediction on the onsite-offsite graph
                  (reads graph/; TransRA, TransR or TransE)

    Writes runs/RUN/facets/FACET-sSEED/: user.safetensors, item.safetensors and metrics.json with the learning curve and
    the quality on held-out days. Interrupted, it goes on from the last epoch when it is called again.

    A facet of other pairs, another graph or another window than are there now is trained anew. One that is complete and
    of another configuration is refused, so that a forgotten --config does not undo it.

    \b
    Examples:
      facet pretrain contrastive --run v1
      facet pretrain kge --run v1 --seed 1 --config my.yaml
      torchrun --standalone --nproc-per-node 2 --no-python -- facet pretrain kge --run v1
    """
    from training.facets import pretrain_facet

    directory = pretrain_facet(workspace, facet, run=run, seed=seed, config=config, force=force)
    if os.environ.get("RANK", "0") == "0":
        click.echo(directory)
