"""Arrays of `.npy` files that are mapped: checked, shared by all processes, and never read past the end of a file.

A file that is cut after it was mapped has pages that are no longer there, and who reads one of them is killed by the
system (SIGBUS). So

* files of a segment are made read-only when they are written: only who means to can cut one;
* small arrays are read into memory (`PRIVATE_BYTES`), and no file can take them away;
* of the others, `FileSize.require_whole` is asked before every batch: a third of a microsecond.

What remains is a file that is cut within the microseconds of one lookup. Copying every table into memory of its own
(or a sealed memfd) would close that too, at twice the memory. So would serving from a file system that forbids it:
fs-verity, a read-only mount, or files of another user.
"""

import io
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.verified import open_verified, read_verified, require_unchanged

__all__ = ["PRIVATE_BYTES", "FileSize", "MappedArray", "open_array"]

PRIVATE_BYTES = 1 << 20
"""Index arrays up to this size are read, not mapped: every process then has its own."""

_MADV_POPULATE_READ = 22  # Linux 5.14; not yet named by Python's mmap


class FileSize:
    """The size that a mapped file has, and must keep; holds a descriptor of its own.

    >>> size.require_whole()                                            # doctest: +SKIP
    """

    __slots__ = ("_bytes", "_descriptor", "_path", "_remedy")

    def __init__(self, path: Path, file: BinaryIO, *, remedy: str) -> None:
        self._path, self._remedy = path, remedy
        self._descriptor = os.dup(file.fileno())
        self._bytes = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        with suppress(AttributeError):  # there was no descriptor to be had
            os.close(self._descriptor)

    def require_whole(self) -> None:
        """Raise `IntegrityError` if the file was cut, or grew, since it was mapped."""
        size = os.lseek(self._descriptor, 0, os.SEEK_END)  # which takes a quarter of what fstat takes
        if size != self._bytes:
            raise IntegrityError(
                f"{self._path} is corrupted", expected=f"{self._bytes} bytes, as when it was opened",
                got=f"{size} bytes", remedy=self._remedy,
            )


class MappedArray(NamedTuple):
    """A read-only array, and the file that has to stay as long as it is, if it is mapped."""

    array: np.ndarray
    file: FileSize | None


def open_array(
    path: Path, dtype: type, shape: tuple[int, ...], *, sha256: str | None, remedy: str, populate: bool,
    private: bool = True, ranges: Iterable[tuple[int, int]] | None = None,
) -> MappedArray:
    """The array in an .npy file, which must have this type, shape and size.

    Args:
        sha256: of the file; None: not checked.
        populate: enter its pages into this process's tables; without that, the first lookup of every page would pay for
            a fault.
        private: a file of up to `PRIVATE_BYTES` is read, not mapped.
        ranges: of the array's first axis, which alone are populated; by default all of it.

    Raises:
        IntegrityError: the file is missing, has other bytes, or is another array.
    """
    try:
        if private and path.is_file() and path.stat().st_size <= PRIVATE_BYTES:
            content = read_verified(path, sha256, remedy=remedy) if sha256 else path.read_bytes()
            start = _require_header(io.BytesIO(content), len(content), np.dtype(dtype), shape)
            return MappedArray(np.frombuffer(content, dtype, offset=start).reshape(shape), None)
        if populate:
            _read_ahead(path)
        with _opened(path, sha256, remedy) as file:
            before = os.fstat(file.fileno())
            start = _require_header(file, before.st_size, np.dtype(dtype), shape)
            pages = mmap.mmap(file.fileno(), before.st_size, access=mmap.ACCESS_READ)
            require_unchanged(path, file, before, remedy=remedy)
            size = FileSize(path, file, remedy=remedy)
        count = int(np.prod(shape))
        # of no elements too: to the kernels, an array that may be written to is another type
        array = np.frombuffer(pages, dtype, count, start).reshape(shape) if count else _empty(dtype, shape)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} cannot be read", expected=f"an array {np.dtype(dtype)} {shape}", got=repr(error), remedy=remedy
        ) from error
    if populate and ranges is None:
        _populate(pages)
    elif populate:
        stride = array.strides[0]
        _populate(pages, [(start + first * stride, start + end * stride) for first, end in ranges if end > first])
    return MappedArray(array, size)


def _opened(path: Path, sha256: str | None, remedy: str):
    return open_verified(path, sha256, remedy=remedy) if sha256 else path.open("rb")


def _empty(dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(b"", dtype).reshape(shape)


def _require_header(file: BinaryIO, size: int, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Where the array begins in a file of `size` bytes; raises ValueError unless it is this one, and ends with it."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the .npy format")
    got = np.lib.format.read_array_header_1_0(file)
    if got != (shape, False, dtype):
        raise ValueError(f"an array {got[2]} {got[0]}{', by columns' if got[1] else ''}")
    expected = file.tell() + int(np.prod(shape)) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{size} bytes, where its header speaks of {expected}")
    return file.tell()


def _populate(pages: mmap.mmap, ranges: Iterable[tuple[int, int]] | None = None) -> None:
    """Enter a map's pages into this process's tables, as huge pages where the file lies in such; read what is absent.

    A lookup is bound by its cache and address translation misses: from huge pages it takes two thirds of the time.

    Args:
        ranges: of bytes; by default all.
    """
    with suppress(OSError):  # a kernel without huge pages of files
        pages.madvise(mmap.MADV_HUGEPAGE)
    for start, end in [(0, len(pages))] if ranges is None else ranges:
        start -= start % mmap.PAGESIZE
        try:
            pages.madvise(_MADV_POPULATE_READ, start, end - start)
        except OSError:  # an older kernel: the pages come one by one
            pages.madvise(mmap.MADV_WILLNEED, start, end - start)


def _read_ahead(path: Path) -> None:
    """Have a file that is not in memory read into huge pages, before anything else reads it into small ones."""
    with (
        suppress(OSError, ValueError),  # not there, or empty: the check will say so
        path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
    ):
        _populate(pages)
