"""Retiring a version: unpublished at one moment, then deleted; and finishing what a crash in between left.

```
versions/7/manifest.json ─► retired.json written ─► manifest.json deleted ─► tables/, upper/, segments/7/ deleted
            published                       still published │ retired from here on
```

`versions/7/retired.json` stays for good: the number is taken, and the lineage of later versions goes on through it.
Rows in Redis are dropped too. What cannot be dropped then, because the server does not answer, goes with the version's
feature views: at the next `feast apply`, which tells the online store that they are gone.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.contracts.durable import (
    STAGING_PREFIX,
    remove_directory,
    require_within,
    require_writable,
    sweep_staging,
)
from pipelines.contracts.errors import IntegrityError, Unavailable, VersionNotFound
from pipelines.contracts.locks import locked
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import row_store
from pipelines.contracts.version import RETIRED_NAME, Retirement, VersionStore
from pipelines.contracts.workspace import Workspace

__all__ = ["Retired", "bytes_below", "delete_leftovers", "leftovers", "retire"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retired:
    """What retiring did.

    Attributes:
        freed_bytes: of files that had no other name.
        children: published versions that were warm-started from it.
    """

    version: int
    retirement: Retirement
    freed_bytes: int
    children: tuple[int, ...]


def retire(workspace: Workspace, version: int) -> Retired:
    """Unpublish a version and delete its files; a version that a crash left half-retired is finished.

    Raises:
        VersionNotFound: it is not published here.
        VersionInUse: it is the current version, or a process has it pinned; nothing was changed.
        InvalidConfig: this user may not delete its files; nothing was changed.
    """
    versions = workspace.versions
    for directory in (versions.path(version), workspace.segments_of(version)):
        if directory.is_dir():
            require_writable(directory)
    if version in versions.retired() and leftovers(workspace, version):
        retirement = versions.retirement(version)
        logger.info("version %d was retired by %s; only its files had to be deleted", version, retirement.by)
    else:
        retirement = versions.retire(version)
    freed_bytes = delete_leftovers(workspace, version)
    if retirement.manifest:
        _drop_rows(workspace, retirement.manifest)
    return Retired(version, retirement, freed_bytes, _children(versions, version))


def _drop_rows(workspace: Workspace, manifest: Manifest) -> None:
    try:
        rows = row_store(None, workspace)
        for spec in manifest.tables:
            rows.drop(manifest.version, spec.name, manifest_sha256=manifest.sha256)
    except (Unavailable, IntegrityError) as error:
        logger.warning("%s The rows of version %d go at the next `feast apply`.", error, manifest.version)


def leftovers(workspace: Workspace, version: int) -> list[Path]:
    """What a retired version still has beside its record: in `versions/N/`, and whole segments in `segments/N/`.

    Or `segments/N/` itself, once it is empty.
    """
    directory, segments = workspace.versions.path(version), workspace.segments_of(version)
    rest = [path for path in _inside(directory) if path.name != RETIRED_NAME]
    if segments.is_dir() and not _inside(segments):
        return [*rest, segments]
    return rest + [path for path in _inside(segments) if not path.name.startswith(STAGING_PREFIX)]


def delete_leftovers(workspace: Workspace, version: int) -> int:
    """Delete what a retired version still has, after whoever is at it already; returns the bytes freed.

    A segment that a living process is still writing stays, for `facet gc` to find once it is there.

    Raises:
        InvalidConfig: a link leads out of the workspace; what it leads to is not deleted.
    """
    freed_bytes = 0
    with locked(workspace.versions.path(version) / RETIRED_NAME, wait=True):
        for path in leftovers(workspace, version):
            freed_bytes += bytes_below(path)
            within = workspace.segments if path.is_relative_to(workspace.segments) else workspace.versions.root
            if path.is_dir() and not path.is_symlink():
                remove_directory(path, within=within)
            else:
                require_within(path, within)
                path.unlink()
        segments = workspace.segments_of(version)
        sweep_staging(segments)
        with suppress(OSError):  # not there, or not empty: somebody writes a segment
            segments.rmdir()
    return freed_bytes


def bytes_below(path: Path) -> int:
    """Bytes that deleting a file or directory frees: a file that has another name elsewhere frees none."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else (path,):
        try:
            state = file.lstat()
        except FileNotFoundError:
            continue
        if not file.is_dir() and state.st_nlink == 1:
            total += state.st_size
    return total


def _children(versions: VersionStore, version: int) -> tuple[int, ...]:
    children = []
    for number in versions.numbers():
        with suppress(VersionNotFound, IntegrityError):  # retired just now, or itself about to be
            if version in versions.manifest(number).parents:
                children.append(number)
    return tuple(children)


def _inside(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
