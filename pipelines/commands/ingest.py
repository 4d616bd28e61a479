"""`facet ingest`: a log becomes canonical events."""

from pathlib import Path

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["ingest"]


@click.command()
@click.option(
    "--dataset", required=True, metavar="NAME|FILE.yaml", help="A data set that comes with the project, or your own."
)
@click.option("--source", type=click.Path(path_type=Path), help="The log, if not the one that the data set names.")
@click.pass_obj
def ingest(workspace: Workspace, dataset: str, source: Path | None) -> None:
    """Turn a log into canonical events, checked on entry.

    \b
    Data sets that come with the project:
      online_retail   its log comes along
      alibaba2014     give its log with --source
      globo           give its log with --source

    For a log of your own, describe its columns in a YAML file; `pipelines/datasets/online_retail.yaml` is the manual.
    Writes events.parquet and events.json. A log that does not fit is refused before anything is written.
    """
    from dataclasses import asdict

    from pipelines.contracts.durable import require_writable
    from pipelines.dataset import load_dataset
    from pipelines.events import write_events
    from pipelines.log import canonical_events, log_lineage

    definition = load_dataset(dataset)
    require_writable(workspace.root)
    log = log_lineage(definition, source)
    events, facts = canonical_events(definition, source)
    write_events(events, facts, workspace, log=log, settings=asdict(definition.log))

    click.echo(f"{facts.dataset}: {facts.rows_read:,} rows read")
    for reason, rows in facts.dropped.items():
        click.echo(f"  {rows:>12,}  dropped: {reason}")
    click.echo(f"  {facts.rows:>12,}  kept")
    for kind, rows in facts.kinds.items():
        click.echo(f"  {rows:>12,}    {kind} ({definition.log.kinds[kind]})")
    click.echo(f"  {facts.users:>12,}  users")
    click.echo(f"  {facts.items:>12,}  items")
    click.echo(f"  {facts.first[:16]} to {facts.last[:16]} UTC")
    click.echo(f"-> {workspace.events}")
