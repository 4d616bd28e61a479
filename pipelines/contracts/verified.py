"""Files whose hash is known: opened once, hashed, and used through the same descriptor.

Who hashes a path and then opens it may open another file: a rename in between is enough. Through one descriptor, what
was hashed is what is read, whoever replaces the path.

```
open ──► hash through the descriptor ──► compare ──► read or map the same descriptor
```

A process that may write to the very file can still alter it after the check. `read_verified` has its own copy of the
bytes; use it wherever a file fits into memory.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.contracts.errors import IntegrityError

__all__ = ["open_verified", "read_verified", "require_unchanged"]


@contextmanager
def open_verified(path: Path, sha256: str, *, remedy: str) -> Iterator[BinaryIO]:
    """The open file, read from its start, once its bytes have been found to have this SHA-256.

    Args:
        sha256: hexadecimal.
        remedy: what an error tells the user to do.

    Raises:
        IntegrityError: there is no such file, or it has other bytes.
    """
    with _opened(path, sha256, remedy) as file:
        before = os.fstat(file.fileno())
        _require(path, sha256, hashlib.file_digest(file, "sha256").hexdigest(), remedy)
        require_unchanged(path, file, before, remedy=remedy)
        file.seek(0)
        yield file


def read_verified(path: Path, sha256: str | None, *, remedy: str, at_most_bytes: int | None = None) -> bytes:
    """The bytes of a file that have this SHA-256: the very bytes that were hashed. Takes and raises as `open_verified`.

    Args:
        sha256: None for a file that nobody has hashed.
        at_most_bytes: a larger file is refused before memory is taken for it.

    >>> read_verified(path, manifest.files["upper/config.json"], remedy="Publish again.")        # doctest: +SKIP
    b'{...}'
    """
    with _opened(path, sha256 or "of any bytes", remedy) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if at_most_bytes is not None and size_bytes > at_most_bytes:
            raise IntegrityError(
                f"{path} is too large", expected=f"at most {at_most_bytes:,} bytes", got=f"{size_bytes:,}",
                remedy=remedy,
            )
        content = file.read(size_bytes)  # no more, however it grows meanwhile
    if sha256 is not None:
        _require(path, sha256, hashlib.sha256(content).hexdigest(), remedy)
    return content


def require_unchanged(path: Path, file: BinaryIO, before: os.stat_result, *, remedy: str) -> None:
    """Raise `IntegrityError` if an open file was written to since `before`, its `os.fstat` of then."""
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise IntegrityError(
            f"{path} is corrupted", expected=f"{before.st_size} bytes that nobody writes to",
            got=f"{now.st_size} bytes, written to while they were checked", remedy=remedy,
        )


@contextmanager
def _opened(path: Path, sha256: str, remedy: str) -> Iterator[BinaryIO]:
    """The open file; a name that is no file's is refused before it is opened, since a pipe would wait for a writer."""
    try:
        file = path.open("rb") if path.is_file() else None
    except FileNotFoundError:  # deleted between the two
        file = None
    if file is None:
        _require(path, sha256, "no file", remedy)
    with file:
        yield file


def _require(path: Path, expected: str, got: str, remedy: str) -> None:
    if got != expected:
        raise IntegrityError(f"{path} is corrupted", expected=f"sha256 {expected}", got=got, remedy=remedy)
