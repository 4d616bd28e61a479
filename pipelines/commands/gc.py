"""`facet gc`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pipelines.contracts.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.garbage import Garbage

__all__ = ["gc"]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.pass_obj
def gc(workspace: Workspace, dry_run: bool) -> None:
    """Delete what crashes left: half-written and half-retired versions, their segments, pins of dead processes.

    Tables in Redis too, if that is where rows lie. What a living process writes or serves is never touched.
    """
    from pipelines.contracts.row_store import row_store
    from pipelines.garbage import collect, find, unexplained

    found, kept = (find(workspace), []) if dry_run else collect(workspace)
    _say("would be deleted" if dry_run else "deleted", workspace, found)
    if kept:
        _say("could not be deleted", workspace, kept)
    for table in () if dry_run else row_store(None, workspace).collect():
        click.echo(f"deleted: what a writer left of {table} in the row store")
    for path in unexplained(workspace):
        click.echo(f"left alone: {path.relative_to(workspace.root)} is neither published nor retired; look at it")


def _say(what: str, workspace: Workspace, garbage: Sequence["Garbage"]) -> None:
    for piece in garbage:
        click.echo(f"{piece.bytes:>15,} bytes  {piece.path.relative_to(workspace.root)}  ({piece.why})")
    click.echo(f"{what}: {len(garbage)}, {sum(piece.bytes for piece in garbage):,} bytes")
