"""Files that are either absent or whole: write beside, flush, rename. And the hash every reader checks."""

import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.contracts.errors import InvalidConfig

__all__ = [
    "STAGING_PREFIX", "creating_directory", "remove_directory", "replacing_file", "require_writable", "sha256_of",
    "sweep_staging",
]

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".staging-"
"""Names that start with this are being written, or were left by a crash: `sweep_staging` tells which."""

_ABANDONED_FILE_S = 3600.0


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it atomically replaces `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield staging
        _flush(staging)
        os.replace(staging, path)
        _flush(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def creating_directory(path: Path) -> Iterator[Path]:
    """Yield a directory to fill; on success it is renamed to `path`, on any error it is removed.

    `path` itself must not exist (the rename then fails and nothing changes): what is complete is never rewritten.
    While it is filled, the directory is locked, so that `sweep_staging` can tell it from one that a crash left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    lock = _make_locked_directory(staging)
    try:
        yield staging
        for file in staging.rglob("*"):
            _flush(file)
        _flush(staging)
        os.rename(staging, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def remove_directory(path: Path) -> None:
    """Delete a directory so that no reader ever finds half of it: rename it away, then delete. Absent is fine."""
    doomed = path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed)


def sweep_staging(parent: Path) -> list[str]:
    """Delete what crashed writers left in `parent`; what a living one is filling stays.

    A writer holds a lock on its staging directory, which the system releases when the process dies, however it dies.
    Staged files are small and live for milliseconds; they carry no lock and are taken for abandoned after an hour.

    Returns:
        Names of what was deleted.
    """
    swept = []
    for path in sorted(parent.glob(f"{STAGING_PREFIX}*")) if parent.is_dir() else ():
        if path.is_dir():
            lock = _try_lock(path)
            if lock is None:
                continue
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
        else:
            try:
                if time.time() - path.stat().st_mtime < _ABANDONED_FILE_S:
                    continue
            except FileNotFoundError:
                continue
            path.unlink(missing_ok=True)
        logger.info("deleted %s, left by a writer that did not finish", path)
        swept.append(path.name)
    return swept


def require_writable(directory: Path) -> None:
    """Raise `InvalidConfig` unless files can be made in `directory` (made if absent), before any work starts."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidConfig(
            f"cannot write to {directory}",
            expected="a directory this user may create files in",
            got=error.strerror or str(error),
            remedy="Give another --workspace, or change the directory's permissions.",
        ) from error


def _make_locked_directory(path: Path) -> int:
    """Make a directory and lock it; returns the descriptor that holds the lock."""
    while True:
        path.mkdir()
        lock = _try_lock(path)
        if lock is not None and path.is_dir():
            return lock
        # a sweeper got in between the two calls: once it has deleted the directory, make it again
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _try_lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock, or None if another process holds it or the directory is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
