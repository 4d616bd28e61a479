"""`facet prepare`: canonical events become views, pairs, graph and examples of one run."""

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["prepare"]


@click.command()
@click.option("--run", "run_name", required=True, help="A run that the data set declares: one set of time windows.")
@click.option(
    "--dataset", metavar="NAME|FILE.yaml", help="The data set, if its definition is not where it was ingested from."
)
@click.option(
    "--engine", type=click.Choice(["duckdb", "spark"]), default="duckdb", show_default=True, help="What computes it."
)
@click.option("--force", is_flag=True, help="Do again what is up to date.")
@click.pass_obj
def prepare(workspace: Workspace, run_name: str, dataset: str | None, engine: str, force: bool) -> None:
    """Make what a run learns from: context views, contrastive pairs, the graph, and the ranker's examples.

    \b
    views/     what was known about a user, an item or a pair at any moment; for all runs
    pairs      positives of the pretraining window, for the contrastive facet
    graph/     typed nodes and edges of the pretraining window, for the knowledge-graph facet
    examples   visits of the fine-tuning, validation and test windows, with labels, for the ranker

    What is up to date is not made again.
    """
    import json

    import pyarrow.parquet as pq

    from pipelines.contracts.runspec import RunSpec
    from pipelines.dataset import load_dataset
    from pipelines.events import read_facts
    from pipelines.examples import FOLDS
    from pipelines.prepare import VIEWS, prepare_run, prepare_views

    definition = load_dataset(dataset or read_facts(workspace).reference)
    definition.windows(run_name)
    made_views = prepare_views(workspace, definition, engine=engine, force=force)
    made_run = prepare_run(workspace, definition, run_name, engine=engine, force=force)

    run = workspace.run(run_name)
    spec = RunSpec.read(run.spec)
    click.echo(f"views{'' if made_views else ' (up to date)'}")
    for name in VIEWS:
        click.echo(f"  {pq.read_metadata(workspace.views / f'{name}.parquet').num_rows:>12,}  {name}")
    click.echo(f"{spec.dataset} run {run_name}{'' if made_run else ' (up to date)'}")
    click.echo(f"  {pq.read_metadata(run.pairs).num_rows:>12,}  pairs")
    click.echo(f"  {pq.read_metadata(run.graph / 'nodes.parquet').num_rows:>12,}  nodes")
    for relation in json.loads((run.graph / "relations.json").read_text()):
        anchor = ", anchor" if relation["anchor"] else ""
        click.echo(
            f"  {relation['edges']:>12,}  {relation['head']} -{relation['name']}-> {relation['tail']} "
            f"({relation['surface']}{anchor})"
        )
    rows = pq.read_table(run.examples).to_pandas()
    for fold in FOLDS:
        window = getattr(spec.windows, fold)
        of_fold = rows[rows["fold"] == fold]
        click.echo(f"  {len(of_fold):>12,}  examples for {fold}, {window.start} to {window.end}")
        for task in spec.tasks:
            labels = of_fold[task].dropna()
            rate = f"{labels.mean():.2%} positive" if len(labels) else "none known"
            click.echo(f"  {len(labels):>12,}    {task}: {rate}")
    click.echo(f"-> {run.directory}")
