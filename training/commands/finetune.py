"""`facet finetune`: one arm of the ranker."""

from pathlib import Path

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["finetune"]


@click.command()
@click.option("--run", "run_name", required=True, help="Name that the run was given at `facet prepare`.")
@click.option(
    "--arm", required=True,
    help="Which tables start from pretrained rows: scratch (none), contrastive, kge or both. All arms have the same "
    "tables and the same upper model.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the facets, the weights and the batch order.")
@click.option(
    "--config", "config_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML with what differs from training/defaults.yaml; its id rules must be those of the facets.",
)
@click.pass_obj
def finetune(workspace: Workspace, run_name: str, arm: str, seed: int, config_path: Path | None) -> None:
    """Fine-tune the CTR/CVR ranker on the fine-tuning window.

    Needs both facets of the same seed (`facet pretrain`) and the context views in Feast's registry (`feast apply` in
    feature_repo/). The epoch whose validation AUC is best is kept; the test fold is measured once. A ranker of the same
    inputs and settings is not trained again; of others, it is trained anew and the log says what changed. Facets that
    do not fit the run are refused.

    \b
    One process:      facet finetune --run v1 --arm both
    Two processes:    torchrun --standalone --nproc-per-node 2 --no-python -- facet finetune --run v1 --arm both

    Writes runs/<run>/rankers/<arm>-s<seed>/: tables, upper model, metrics.json with the learning curve.
    """
    from training.config import load_section
    from training.ids import load_ids
    from training.ranker.config import RankerConfig
    from training.ranker.finetune import finetune as run_finetune
    from training.tables import TableOptions

    trained = run_finetune(
        workspace, workspace.run(run_name), arm=arm, seed=seed,
        config=load_section("ranker", RankerConfig, config_path),
        options=load_section("tables", TableOptions, config_path), id_configs=load_ids(config_path),
    )
    for task, auc in trained.metrics["auc"].items():
        click.echo(f"{task:24s} test ROC-AUC {auc:.4f}")
