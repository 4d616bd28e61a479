"""`facet versions` and `facet versions show N`."""

from typing import Any

import click

from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace

__all__ = ["versions"]


@click.group(invoke_without_command=True)
@click.pass_context
def versions(ctx: click.Context) -> None:
    """List the published versions; `facet versions show N` tells all about one."""
    if ctx.invoked_subcommand is None:
        _list(ctx.obj)


@versions.command()
@click.argument("version", type=int)
@click.pass_obj
def show(workspace: Workspace, version: int) -> None:
    """Lineage, windows, tables and metrics of version VERSION."""
    manifest = workspace.versions.manifest(version)
    is_current = workspace.versions.current() == version
    facts = {
        "version": f"{version}{' (current)' if is_current else ''}",
        "manifest": manifest.sha256,
        "dataset": manifest.dataset,
        "created": manifest.created_at.isoformat(timespec="seconds"),
        "data to": manifest.as_of.isoformat(),
        "parents": ", ".join(map(str, manifest.parents)) or "none",
        **{f"{name} window": " to ".join(days) for name, days in manifest.windows.to_dict().items()},
        "materialized": ", ".join(_materialized(workspace, manifest)) or "no table yet",
    }
    for name, value in facts.items():
        click.echo(f"{name:18s} {value}")
    click.echo()
    _table(
        ("table", "view", "rows", "columns", "quantization", "bytes a row"),
        [
            (t.name, t.view_name(version), f"{t.rows:,}", str(t.dim), t.quantization, str(t.row_bytes))
            for t in manifest.tables
        ],
    )
    if manifest.metrics:
        click.echo()
        _table(("metric", "value"), [(name, _number(value)) for name, value in _flat(manifest.metrics)])


def _list(workspace: Workspace) -> None:
    manifests, current = workspace.versions.manifests(), workspace.versions.current()
    if not manifests:
        click.echo("No version is published; `facet publish` makes one.")
        return
    _table(
        ("version", "manifest", "dataset", "data to", "parents", "tables", "rows", "materialized"),
        [
            (
                f"{manifest.version}{'*' if manifest.version == current else ''}",
                manifest.sha256[:12],
                manifest.dataset,
                str(manifest.as_of.date()),
                ",".join(map(str, manifest.parents)) or "-",
                str(len(manifest.tables)),
                f"{sum(spec.rows for spec in manifest.tables):,}",
                f"{len(_materialized(workspace, manifest))}/{len(manifest.tables)}",
            )
            for manifest in manifests
        ],
    )
    click.echo("* current")


def _materialized(workspace: Workspace, manifest: Manifest) -> list[str]:
    return [spec.name for spec in manifest.tables if workspace.segment(manifest.version, spec.name).is_dir()]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, tuple("-" * width for width in widths), *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in metrics.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
