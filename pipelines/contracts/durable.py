"""Files that are either absent or whole: write beside, flush, rename. And the hash every reader checks.

```
mkdir .staging-x-N + flock ──► fill ──► fsync files, then directories ──► rename to N ──► fsync the parent
```

A process may die, and a machine lose power, between any two of these: before the rename there is only a staging
directory, whose lock died with its writer; after it there is N, whole. Files are written with write(2), never through
a mapping: on a full disk a write is an error, a store to a mapped page kills the process (SIGBUS).
"""

import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.contracts.errors import DiskFull, InvalidConfig
from pipelines.contracts.locks import locked

__all__ = [
    "STAGING_PREFIX", "creating_directory", "flush", "remove_directory", "replacing_file", "require_within",
    "require_writable", "sha256_of", "sweep_staging",
]

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".staging-"
"""Names that start with this are being written, or were left by a crash: `sweep_staging` tells which."""

READ_ONLY, WRITABLE = 0o444, 0o222

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it atomically replaces `path`, on any error it is removed.

    Raises:
        DiskFull: it does not fit; `path` is as it was.
    """
    with _beside(path) as directory:
        file = directory / path.name
        yield file
        flush(file)
        os.replace(file, path)
        flush(path.parent)


@contextmanager
def creating_directory(path: Path, *, read_only: bool = False) -> Iterator[Path]:
    """Yield a directory to fill; on success it is renamed to `path`, on any error it is removed.

    `path` itself must not exist (the rename then fails and nothing changes): what is complete is never rewritten.

    Args:
        read_only: nobody may write to its files, so that no program cuts by mistake what others have mapped.

    Raises:
        DiskFull: it does not fit; nothing is left of it.
    """
    with _beside(path) as directory:
        yield directory
        for file in directory.rglob("*"):
            if read_only and file.is_file() and file.stat().st_mode & WRITABLE:
                file.chmod(READ_ONLY)
            flush(file)
        flush(directory)
        os.rename(directory, path)
        flush(path.parent)


def remove_directory(path: Path, *, within: Path) -> None:
    """Delete a directory so that no reader ever finds half of it: rename it away, then delete. Absent is fine.

    Args:
        within: the folder whose contents the caller may delete.

    Raises:
        InvalidConfig: as `require_within`; nothing is deleted.
    """
    require_within(path, within)
    doomed = _staging_name(path)
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    flush(path.parent)  # else a power loss could bring the name back without the files
    with suppress(FileNotFoundError):  # a sweeper may be at it too
        shutil.rmtree(doomed)


def require_within(path: Path, folder: Path) -> None:
    """Raise `InvalidConfig` unless `path` lies inside `folder`, at any depth, links and `..` followed.

    What is about to be deleted is checked once more, wherever its name came from.
    """
    parent = path.parent.resolve()
    if path.name in ("", "..") or not parent.is_relative_to(folder.resolve()):
        raise InvalidConfig(
            f"{path} is not deleted", expected=f"something inside {folder}", got=f"{path.name or '/'} in {parent}",
            remedy="Find out who named it: a tag, a key or a link in the workspace was altered.",
        )


def sweep_staging(parent: Path) -> list[str]:
    """Delete what crashed writers left in `parent`; what a living one is filling stays.

    A writer holds a lock on its staging directory, which the system releases when the process dies, however it dies.

    Returns:
        Names of what was deleted.
    """
    swept = []
    for path in sorted(parent.glob(f"{STAGING_PREFIX}*")) if parent.is_dir() else ():
        with locked(path) as mine:
            if not mine:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if path.exists():
            logger.warning("%s was left by a writer that did not finish, and cannot be deleted", path)
            continue
        logger.info("deleted %s, left by a writer that did not finish", path)
        swept.append(path.name)
    return swept


def require_writable(directory: Path) -> None:
    """Raise `InvalidConfig` unless files can be made in `directory` (made if absent), before any work starts."""
    try:
        _make_directories(directory)
        with _staging(directory / "probe") as probe:
            (probe / "file").touch()
    except OSError as error:
        raise InvalidConfig(
            f"cannot write to {directory}",
            expected="a directory this user may create files in",
            got=error.strerror or str(error),
            remedy="Give another --workspace, free space there, or change the directory's permissions.",
        ) from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A staging directory for `path`, whose parents are made; a full disk is refused by the name of `path`."""
    try:
        _make_directories(path.parent)
        with _staging(path) as directory:
            yield directory
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(
            f"cannot write {path}", expected="space for it", got=f"{error.strerror} in {path.parent}",
            remedy="Free space there and run the same command again; what was complete before is unchanged.",
        ) from error


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A locked directory beside `path`, gone at the end unless it was renamed."""
    held = False
    while not held:  # a sweeper that gets in between the two calls deletes it: under another name it cannot
        staging = _staging_name(path)
        staging.mkdir()
        with locked(staging) as held:
            if held:
                try:
                    yield staging
                finally:
                    shutil.rmtree(staging, ignore_errors=True)


def _staging_name(path: Path) -> Path:
    return path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")


def _make_directories(directory: Path) -> None:
    """Make a directory and its parents, each flushed into its own parent: a power loss would take what is in them."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
