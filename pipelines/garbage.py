"""What crashes left in a workspace: found, and deleted. What a living process writes or holds is never touched.

| garbage | how it is told from what somebody needs |
|---|---|
| `.staging-*`, anywhere in the workspace | its writer's lock is gone |
| files and segments of a retired version | `retired.json` is there, the manifest is not, and nobody is deleting them |
| `retired.json` of a published version | its retirement died before it unpublished it, and nobody retires it now |
| `versions/pins/*.json` | its process's lock is gone |
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.contracts.durable import STAGING_PREFIX, sweep_staging
from pipelines.contracts.locks import locked
from pipelines.contracts.manifest import MANIFEST_NAME
from pipelines.contracts.pins import PINS, dead_pins
from pipelines.contracts.version import RETIRED_NAME
from pipelines.contracts.workspace import Workspace
from pipelines.retire import bytes_below, delete_leftovers, leftovers

__all__ = ["Garbage", "collect", "find", "unexplained"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """A file or directory that nobody needs, why, and how many bytes deleting it frees."""

    path: Path
    why: str
    bytes: int


def find(workspace: Workspace) -> list[Garbage]:
    """What `collect` would delete now."""
    found = [(path, "left by a writer that did not finish") for path in _abandoned(workspace.root)]
    for version in _half_retired(workspace):
        found += [(path, f"version {version} is retired") for path in leftovers(workspace, version)]
    for note in _withdrawn(workspace):
        found.append((note, f"version {note.parent.name} is published: its retirement did not happen"))
    found += [(path, "its process is gone") for path in dead_pins(workspace.versions.root)]
    return [Garbage(path, why, bytes_below(path)) for path, why in found]


def collect(workspace: Workspace) -> tuple[list[Garbage], list[Garbage]]:
    """Delete what crashes left; returns what was found and is gone, and what could not be deleted."""
    found = find(workspace)
    try:
        for parent in {path.parent for path in _abandoned(workspace.root)}:
            sweep_staging(parent)
        for version in _half_retired(workspace):
            delete_leftovers(workspace, version)
        for note in _withdrawn(workspace):
            with locked(note.with_name(MANIFEST_NAME), shared=True) as published:
                if published:
                    note.unlink(missing_ok=True)
        for path in dead_pins(workspace.versions.root):
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("not everything can be deleted: %s", error)
    return [g for g in found if not g.path.exists()], [g for g in found if g.path.exists()]


def unexplained(workspace: Workspace) -> list[Path]:
    """Directories that no crash of ours leaves: of no version, published or retired. They are not touched."""
    known = {str(version) for version in (*workspace.versions.numbers(), *workspace.versions.retired())} | {PINS}
    return [
        path
        for parent in (workspace.versions.root, workspace.segments)
        for path in (sorted(parent.iterdir()) if parent.is_dir() else ())
        if path.is_dir() and path.name not in known and not path.name.startswith(STAGING_PREFIX)
    ]


def _abandoned(root: Path) -> list[Path]:
    found = []
    for folder, directories, files in os.walk(root):
        staged = sorted(name for name in (*directories, *files) if name.startswith(STAGING_PREFIX))
        directories[:] = [name for name in directories if name not in staged]
        found += [path for name in staged if _is_free(path := Path(folder) / name)]
    return found


def _half_retired(workspace: Workspace) -> list[int]:
    return [
        version
        for version in workspace.versions.retired()
        if leftovers(workspace, version) and _is_free(workspace.versions.path(version) / RETIRED_NAME)
    ]


def _withdrawn(workspace: Workspace) -> list[Path]:
    notes = [workspace.versions.path(version) / RETIRED_NAME for version in workspace.versions.numbers()]
    return [note for note in notes if note.is_file() and _is_free(note.with_name(MANIFEST_NAME))]


def _is_free(path: Path) -> bool:
    """Whether nobody holds `path` exclusively: who writes, retires or deletes does."""
    with locked(path, shared=True) as free:
        return free
