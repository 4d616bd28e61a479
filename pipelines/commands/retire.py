"""`facet retire`."""

import click

from pipelines.contracts.workspace import Workspace

__all__ = ["retire"]


@click.command()
@click.argument("version", type=click.IntRange(1))
@click.pass_obj
def retire(workspace: Workspace, version: int) -> None:
    """Unpublish version VERSION and delete its tables, upper model and segments.

    Refused while it is the current version, or while a CPU tier or ranker has it loaded; the refusal names them. Its
    record stays in versions/VERSION/retired.json: the number is never used again, and the lineage goes on. After a
    crash, the same command or `facet gc` finishes. Then `feast apply` removes its views.
    """
    from pipelines.retire import retire as retire_version

    retired = retire_version(workspace, version)
    manifest = retired.retirement.manifest_sha256[:12]
    click.echo(f"retired version {version}: manifest {manifest}, {retired.freed_bytes:,} bytes freed")
    if retired.children:
        click.echo(f"warm-started from it, and still published: {', '.join(map(str, retired.children))}")
    click.echo("Now remove its views: cd feature_repo && feast apply")
