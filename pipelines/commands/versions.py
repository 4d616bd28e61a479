"""`facet versions`, and `show`, `lineage` and `point` below it."""

from typing import Any

import click

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.freshness import pretraining_age_days
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import row_store
from pipelines.contracts.version import Retirement
from pipelines.contracts.workspace import Workspace

__all__ = ["versions"]


@click.group(invoke_without_command=True)
@click.pass_context
def versions(ctx: click.Context) -> None:
    """List the published versions, their data windows and parents; `facet versions show N` tells all about one."""
    if ctx.invoked_subcommand is None:
        _list(ctx.obj)


@versions.command()
@click.argument("version", type=int)
@click.pass_obj
def show(workspace: Workspace, version: int) -> None:
    """Lineage, windows, tables and metrics of version VERSION; of a retired one, what it was."""
    store = workspace.versions
    retirement = store.retirement(version) if version in store.retired() else None
    if retirement and retirement.manifest is None:
        click.echo(f"{version} ({_retired(retirement)}); its manifest was corrupted, nothing else is known")
        return
    manifest = retirement.manifest if retirement else store.manifest(version)
    children = [other.version for other in store.manifests() if version in other.parents]
    mark = f" ({_retired(retirement)})" if retirement else " (current)" if store.current() == version else ""
    facts = {
        "version": f"{version}{mark}",
        "manifest": manifest.sha256,
        "dataset": manifest.dataset,
        "created": manifest.created_at.isoformat(timespec="seconds"),
        "data to": manifest.as_of.isoformat(),
        "parents": _numbers(manifest.parents) or "none",
        "children": _numbers(children) or "none",
        **{f"{name} window": " to ".join(days) for name, days in manifest.windows.to_dict().items()},
        "pretraining age": f"{pretraining_age_days(manifest.windows)} days when fine-tuning starts",
        "materialized": ", ".join(_materialized(workspace, manifest)) or "no table yet",
        "held by": "; ".join(map(str, store.holders(version))) or "nobody",
    }
    if retirement:
        del facts["materialized"], facts["held by"]
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


@versions.command()
@click.argument("version", type=int)
@click.pass_obj
def point(workspace: Workspace, version: int) -> None:
    """Make version VERSION the current one: what servers load by default, and what may not be retired.

    Its upper model is proved first: bytes, shapes, features and entities.
    """
    from pipelines.publish import point as point_to_version

    try:
        before = workspace.versions.current() or "none"
    except IntegrityError:
        before = "a pointer that could not be read"
    point_to_version(workspace, version)
    click.echo(f"current version: {version}, before: {before}")


@versions.command()
@click.pass_obj
def lineage(workspace: Workspace) -> None:
    """Which version was warm-started from which, newest first, with the data each has seen.

    Below a version stand its parents. A version that several were warm-started from stands below the newest of them.
    """
    store = workspace.versions
    known: dict[int, Manifest | None] = {manifest.version: manifest for manifest in store.manifests()}
    marks = {store.current(): "current"}
    for version in store.retired():
        try:
            retirement = store.retirement(version)
        except IntegrityError:
            known[version], marks[version] = None, "retired; its record cannot be read"
        else:
            known[version], marks[version] = retirement.manifest, _retired(retirement)
    parents = {version: manifest.parents if manifest else () for version, manifest in known.items()}
    if not known:
        click.echo("No version is published; `facet publish` makes one.")
    shown: set[int] = set()
    for newest in sorted(known, reverse=True):
        # (version, what stands before its line, what stands before its parents' lines)
        stack = [(newest, "", "")] if newest not in shown else []
        while stack:
            version, before, indent = stack.pop()
            seen = version in shown
            click.echo(before + _lineage_line(version, known.get(version), marks.get(version), seen=seen))
            shown.add(version)
            for position, parent in enumerate(() if seen else sorted(parents.get(version, ()))):
                last = position == 0  # the stack turns them round: the newest parent comes first
                stack.append((parent, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  ")))


def _lineage_line(version: int, manifest: Manifest | None, mark: str | None, *, seen: bool) -> str:
    note = f"  [{mark}]" if mark else ""
    if seen:
        return f"{version}{note}  (shown above)"
    if manifest is None:
        return f"{version}{note}" if mark else f"{version}  [not in this workspace]"
    windows = manifest.windows
    return (
        f"{version}{note}  pretrained {windows.pretrain.start} to {windows.pretrain.end}, "
        f"{pretraining_age_days(windows)} days, fine-tuned {windows.finetune.start} to {windows.finetune.end}  "
        f"{manifest.sha256[:12]}"
    )


def _list(workspace: Workspace) -> None:
    manifests, current = workspace.versions.manifests(), workspace.versions.current()
    if manifests:
        _table(
            ("version", "manifest", "dataset", "pretrained", "fine-tuned", "age", "parents", "tables", "rows",
             "materialized"),
            [
                (
                    f"{manifest.version}{'*' if manifest.version == current else ''}",
                    manifest.sha256[:12],
                    manifest.dataset,
                    "..".join(manifest.windows.to_dict()["pretrain"]),
                    "..".join(manifest.windows.to_dict()["finetune"]),
                    f"{pretraining_age_days(manifest.windows)} d",
                    _numbers(manifest.parents) or "-",
                    str(len(manifest.tables)),
                    f"{sum(spec.rows for spec in manifest.tables):,}",
                    f"{len(_materialized(workspace, manifest))}/{len(manifest.tables)}",
                )
                for manifest in manifests
            ],
        )
        click.echo("* current; age: days from the end of pretraining data to the start of fine-tuning data")
    else:
        click.echo("No version is published; `facet publish` makes one.")
    if retired := workspace.versions.retired():
        click.echo(f"retired: {_numbers(retired)}")


def _retired(retirement: Retirement) -> str:
    return f"retired {retirement.at:%Y-%m-%d} by {retirement.by}"


def _numbers(versions: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, versions))


def _materialized(workspace: Workspace, manifest: Manifest) -> list[str]:
    rows = row_store(None, workspace)
    return [spec.name for spec in manifest.tables if rows.holds(manifest.version, spec.name)]


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
