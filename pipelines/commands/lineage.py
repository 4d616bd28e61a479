"""`facet lineage`: what a version was made from, down to the files of the log."""

import json
from collections.abc import Iterator
from typing import Any

import click

from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.lineage import Lineage
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace

__all__ = ["lineage"]

HASH_DIGITS = 12
MOST_FILES = 10
"""Files of a log that are listed; `--json` has them all."""


@click.command()
@click.argument("version", type=int, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything: all files, their whole hashes, all settings.")
@click.pass_obj
def lineage(workspace: Workspace, version: int | None, as_json: bool) -> None:
    """Show what version VERSION (default: the current one) was made from, down to the files of the log.

    \b
    version 2 of shop (current), manifest 5d1f0c6e9a3b
    └─ ranker both of run v1, seed 0  9b0c2f5d7e11
       │  arm both; dataset shop; seed 0; tasks click; windows pretrain 2024-01-01 to 2024-02-01, …
       ├─ context of run v1  03ac674216f3
       │  ├─ examples of run v1  …
       ┆

    Below an artefact stand its main settings, then what it was made from. An artefact that several were made from is
    shown once. The hash is of the content: artefacts of one hash hold the same bytes.

    The lineage is what the stages wrote while they worked, and is sealed with the version. It says what was true then,
    whatever the run's files say today. A stage that is asked again compares with it: what no longer fits is made anew
    or refused. A retired version's lineage is kept.

    \b
    Examples:
      facet lineage
      facet lineage 2
      facet lineage 2 --json | jq '.lineage.artefacts[] | {what, settings}'
    """
    manifest, mark = _manifest(workspace, version)
    if as_json:
        told = {"version": manifest.version, "manifest": manifest.sha256, "lineage": manifest.lineage.to_dict()}
        click.echo(json.dumps(told, indent=1))
        return
    mark = f" ({mark})" if mark else ""
    click.echo(f"version {manifest.version} of {manifest.dataset}{mark}, manifest {manifest.sha256[:HASH_DIGITS]}")
    for line in _tree(manifest.lineage, "└─ ", "   ", shown=set()):
        click.echo(line)


def _manifest(workspace: Workspace, version: int | None) -> tuple[Manifest, str]:
    """A version's manifest, and what is to be said of the version."""
    versions = workspace.versions
    current = versions.current()
    number = current if version is None else version
    if number is None:
        raise VersionNotFound(
            f"no current version in {workspace.root}", expected="a published version", got="none",
            remedy="`facet publish` makes one; `facet versions` lists what is there.",
        )
    if number not in versions.retired():
        return versions.manifest(number), "current" if number == current else ""
    retirement = versions.retirement(number)
    if retirement.manifest is None:
        raise VersionNotFound(
            f"version {number} is retired", expected="a manifest that was kept", got="none, it was corrupted",
            remedy="Its lineage is lost.",
        )
    return retirement.manifest, f"retired {retirement.at:%Y-%m-%d}"


def _tree(artefact: Lineage, before: str, indent: str, *, shown: set[tuple[str, str]]) -> Iterator[str]:
    """Lines of an artefact and what it was made from.

    Args:
        before: what stands before its line.
        indent: what stands before the lines below it.
        shown: name and content of those that were printed.
    """
    line = f"{before}{artefact.what}  {artefact.content[:HASH_DIGITS]}"
    if (artefact.what, artefact.content) in shown:
        yield f"{line}  (shown above)"
        return
    shown.add((artefact.what, artefact.content))
    yield line
    inputs = list(artefact.inputs.values())
    bar = "│  " if inputs else "   "
    if settings := _settings(artefact.settings):
        yield f"{indent}{bar}{settings}"
    if not inputs:
        for name in sorted(artefact.files)[:MOST_FILES]:
            yield f"{indent}{bar}{name}  {artefact.files[name][:HASH_DIGITS]}"
        if (more := len(artefact.files) - MOST_FILES) > 0:
            yield f"{indent}{bar}and {more} more files"
    for place, each in enumerate(inputs, start=1):
        last = place == len(inputs)
        yield from _tree(each, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "), shown=shown)


def _settings(settings: dict[str, Any]) -> str:
    """The settings that are a value, a list of values or windows; sections of a configuration are left to `--json`."""
    told = []
    for key, value in settings.items():
        if key == "format":
            continue
        if key in ("window", "windows") and value:
            windows = sorted(value.items(), key=lambda window: window[1]) if isinstance(value, dict) else [("", value)]
            days = (f"{name} {' to '.join(map(str, window))}".strip() for name, window in windows)
            told.append(f"{key} {', '.join(days)}")
        elif isinstance(value, list) and not any(isinstance(each, dict | list) for each in value):
            told.append(f"{key} {', '.join(map(str, value))}")
        elif not isinstance(value, dict | list):
            told.append(f"{key} {value}")
    return "; ".join(told)
