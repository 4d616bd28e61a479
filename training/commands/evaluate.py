"""`facet evaluate`: every arm, several seeds, one table."""

from pathlib import Path

import click

from pipelines.contracts.runspec import FACETS
from pipelines.contracts.workspace import Workspace

__all__ = ["evaluate"]


@click.command()
@click.option("--run", "run_name", required=True, help="Name that the run was given at `facet prepare`.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Seeds 0 to N-1, each with its own pretraining.")
@click.option(
    "--config", "config_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML with what differs from training/defaults.yaml.",
)
@click.pass_obj
def evaluate(workspace: Workspace, run_name: str, seeds: int, config_path: Path | None) -> None:
    """Train all arms (scratch, contrastive, kge, both) with several seeds and compare them on the test fold.

    Facets that are missing or were made from other inputs are pretrained first; what is trained already and fits is not
    trained again, so that a stopped evaluation goes on where it was. Prints ROC-AUC by task and arm, mean and 95 %
    interval over seeds, and each arm's paired difference to scratch. Writes runs/<run>/evaluation.json.
    """
    from training.config import load_section
    from training.facets import pretrain_facet
    from training.ids import load_ids
    from training.ranker.config import RankerConfig
    from training.ranker.evaluate import BASELINE
    from training.ranker.evaluate import evaluate as run_evaluate
    from training.tables import TableOptions

    def pretrain(seed: int) -> None:
        for facet in FACETS:
            pretrain_facet(workspace, facet, run=run_name, seed=seed, config=config_path)

    result = run_evaluate(
        workspace, workspace.run(run_name), seeds=seeds, config=load_section("ranker", RankerConfig, config_path),
        options=load_section("tables", TableOptions, config_path), pretrain=pretrain,
        id_configs=load_ids(config_path),
    )
    for task, arms in result["auc"].items():
        click.secho(f"\n{task}: test ROC-AUC, mean and 95 % interval over {seeds} seeds", bold=True)
        for arm, auc in arms.items():
            line = f"  {arm:12s} {_interval(auc, '.4f')}"
            if arm != BASELINE:
                line += f"   {_interval(result['delta_vs_scratch'][task][arm], '+.4f')} against {BASELINE}"
            click.echo(line)


def _interval(value: dict, form: str) -> str:
    half = "" if value["ci95"] is None else f" ± {value['ci95']:.4f}"
    return f"{value['mean']:{form}}{half}"
