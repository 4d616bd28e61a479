"""`facet audit`."""

import sys

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["audit"]


@click.command()
@click.option("--version", type=int, required=True, help="A published and materialized version.")
@click.option("--sample", type=click.IntRange(1), help="Check this many random rows of each table instead of all.")
@click.pass_obj
def audit(workspace: Workspace, version: int, sample: int | None) -> None:
    """Check that every way to a row gives the bytes that were published.

    Compares the version's Parquet files with batched lookups (in segments or in Redis), with the index of its
    segments, with Feast's get_online_features and with Feast's get_historical_features; and asks for ids that are in no
    file. Writes audit/VERSION.json; the exit status is 1 if anything is not as it was published.
    """
    from pipelines.audit import audit as audit_version

    report = audit_version(workspace, version, sample=sample)
    for name, table in report["tables"].items():
        verdict = "identical" if not table["rows_different"] else f"{table['rows_different']:,} DIFFER"
        unknown = table["unknown_ids"]
        click.echo(
            f"  {name:20s} {table['rows_checked']:>12,} rows  {verdict}  {table['sha256']['published'][:12]}  "
            f"{unknown['passed_for_known']:,} of {unknown['asked']:,} unknown ids pass for known"
        )
    click.echo(
        f"{report['rows_checked']:,} rows checked, {report['rows_different']:,} different, "
        f"{report['rows_per_s']:,} rows a second"
    )
    if report["problems"]:
        for problem in report["problems"]:
            click.secho(f"  {problem}", fg="red", err=True)
        click.secho(
            f"error: version {version} is not served as it was published; delete its rows and materialize it again",
            fg="red", err=True,
        )
        sys.exit(1)
