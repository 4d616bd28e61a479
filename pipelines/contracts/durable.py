"""Files that are either absent or whole: write beside, flush, rename. And the hash every reader checks."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.contracts.errors import InvalidConfig

__all__ = ["sha256_of", "replacing_file", "creating_directory", "require_writable", "STAGING_PREFIX"]

STAGING_PREFIX = ".staging-"
"""Names that start with this were left by a crash and may be deleted when no writer runs."""


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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            _flush(file)
        _flush(staging)
        os.rename(staging, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
