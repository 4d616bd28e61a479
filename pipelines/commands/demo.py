"""`facet demo`."""

import time
from pathlib import Path

import click

from pipelines.contracts.durable import require_writable
from pipelines.contracts.workspace import Workspace

__all__ = ["demo"]


@click.command()
@click.option("--dataset", default="online_retail", show_default=True, help="A name, or a YAML with runs v1 and v2.")
@click.option("--source", type=click.Path(path_type=Path), help="The log, if not the one the data set names.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="Training options that differ.")
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True, help="Seeds per arm.")
@click.option(
    "--requests", type=click.IntRange(min=100), default=2000, show_default=True, help="Live ranking requests at least."
)
@click.option("--candidates", type=click.IntRange(min=1), default=16, show_default=True, help="Items per request.")
@click.option(
    "--reports", type=click.Path(file_okay=False, path_type=Path), default=Path("reports/demo"), show_default=True,
    help="Where summary.json and index.html go.",
)
@click.option("--fresh", is_flag=True, help="Delete an earlier demo's workspace first; without it, go on from there.")
@click.pass_obj
def demo(
    workspace: Workspace, dataset: str, source: Path | None, config: Path | None, seeds: int, requests: int,
    candidates: int, reports: Path, fresh: bool,
) -> None:
    """Run everything on one log: pretrain, fine-tune, publish, materialize, serve, roll out, audit, report.

    On Online Retail, which comes with the project, this takes about eight minutes on two cores. Stages that an earlier
    demo in the same workspace completed are not repeated.
    """
    from pipelines.demo import Demo
    from pipelines.report.page import write_report

    run = Demo(
        workspace, dataset=dataset, source=source, config=config, seeds=seeds, requests=requests, candidates=candidates
    )
    if fresh:
        run.clear()
    run.require_own_workspace()
    require_writable(workspace.root)
    require_writable(reports)
    start = time.monotonic()
    facts = run.run()
    summary = write_report(workspace, facts, reports)
    click.echo(summary.table())
    click.echo(f"\n{reports / 'index.html'}  {reports / 'summary.json'}  ({time.monotonic() - start:.0f} s)")
