"""Advisory locks on files and directories (flock): they end with the process that holds them, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on `path` while the block runs; yields whether it was got.

    Args:
        shared: together with other shared holders, against an exclusive one.
        wait: until whoever is in the way lets go, instead of giving up.

    Yields:
        False when another process (or another place in this one) is in the way, or nothing lies at `path`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, locked(Path(folder)) as mine, locked(Path(folder)) as again:
    ...     (mine, again)
    (True, False)
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(descriptor, shared=shared, wait=wait) and _lies_at(path, descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, shared: bool, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _lies_at(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was opened: it may have been deleted before the lock was got."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
