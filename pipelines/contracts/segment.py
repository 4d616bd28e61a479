"""The online form of one table of one version: memory-mapped rows in the order of a minimal perfect hash of their ids.

```
<segment>/
  rows.npy        uint8  (N, row_bytes + 2)   a row (padded to 8 bytes), then its print: 16 bits of its id's hash,
                                              or in tables of up to 4 M rows all 64
                         first the rows of the hash buckets, if the id rule has any: bucket 0 last
  parts.npy       uint64 (P + 1, 2)           rows before each part of the vocabulary; its salt
  pilots.npy      uint8  (P * pilots,)        one per bucket of about three keys
  remap.npy       uint16 (P * slots - rows,)  row within its part of every slot beyond the part's rows
  segment.json    spec, version, manifest hash, the index's numbers, the SHA-256 of every array
  segment.sha256  the hash of segment.json
```

An id is hashed; the hash's top bits name the part, the pilot of its bucket turns it into a slot, and the two bytes
behind that row say whether the row is this id's:

```
id ──hash64──► part, bucket ──pilots──► slot ──remap──► row ──► row bytes │ print == print of id ? row : default row
               (one cache miss, small array)                    (one or two cache misses, adjacent)
```

An id of the vocabulary always finds its own row. An unknown id is always recognized by a print of 64 bits; with 16 bits
it passes for a known one with probability 2**-16. To tell ids of 64 arbitrary bits apart exactly takes about 41 bits
each at 10 M rows; there, this index spends 19.5.

A segment directory appears by one rename, whole, and never changes afterwards. A version that shares most rows with
one before may have a `pipelines.contracts.segment_delta` in its place.
"""

import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.contracts.durable import sha256_of
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.hashing import seed_mask
from pipelines.contracts.ids import batch_of
from pipelines.contracts.sealed import read_sealed
from pipelines.contracts.segment_index import MIN_ROW_BYTES, gather, locate, parts_table, row_stride
from pipelines.contracts.spec import TableSpec

__all__ = ["ARRAYS", "FORMAT", "HEADER_NAME", "Segment", "check_files", "mapped", "ranges_of", "read_header"]

FORMAT = 2
HEADER_NAME = "segment.json"
ARRAYS = ("rows.npy", "parts.npy", "pilots.npy", "remap.npy")
_REMEDY = "Delete the segment and materialize the version again."
_MADV_POPULATE_READ = 22  # Linux 5.14; not yet named by Python's mmap


class Segment:
    """Batched reader of one segment. The pages are shared by every process that opens it.

    Safe to use from several threads, which a lookup lets run: it holds no lock and releases the interpreter's.

    >>> segment = Segment.open(path)                                  # doctest: +SKIP
    >>> rows, found = segment.lookup(np.array([17, 42]))              # doctest: +SKIP

    Attributes:
        rows: uint8 (N, row_bytes), every row in the order of the segment; a view of the mapped file.
        default: uint8, the default row, at least MIN_ROW_BYTES long.
        index: what the kernels of `pipelines.contracts.segment_index` find rows with, the stored rows included.
    """

    at_hand = True

    def __init__(
        self, spec: TableSpec, *, version: int, manifest_sha256: str, index: dict[str, int],
        arrays: dict[str, np.ndarray],
    ) -> None:
        self.spec, self.version, self.manifest_sha256 = spec, version, manifest_sha256
        stored = arrays["rows.npy"]
        self.rows = stored[:, : spec.row_bytes]
        self._row_bytes = spec.row_bytes
        self.default = np.frombuffer(spec.default_row_bytes.ljust(MIN_ROW_BYTES, b"\0"), np.uint8)
        parameters = np.array(
            [
                seed_mask(index["seed"]), seed_mask(spec.hash_seed), index["part_shift"], index["pilots"],
                index["slots"], spec.rows - spec.buckets, spec.buckets, 64 - 8 * index["print_bytes"],
            ],
            np.uint64,
        )
        parts = parts_table(arrays["parts.npy"], slots=index["slots"], buckets=spec.buckets)
        self.index = (
            parameters, parts, arrays["pilots.npy"], arrays["remap.npy"], stored.reshape(-1), stored.shape[1],
        )

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True, part: tuple[int, int] | None = None) -> "Segment":
        """Map a segment; with `verify` its files are hashed against its header first.

        Args:
            part: (i, n) where almost all ids to come have (hash64(id) >> 32) * n >> 32 == i: of the rows, only those
                of such ids are entered into this process's memory, about one in n. Any other row is read as correctly,
                but at its first use from the file.

        Raises:
            VersionNotFound: there is no segment here.
            IntegrityError: a file is missing, truncated or has other bytes than were written.
        """
        header = read_header(directory / HEADER_NAME, FORMAT)
        if verify:
            check_files(directory, header["files"])
        spec = TableSpec(**header["table"])
        arrays = {name: mapped(directory / name, populate=verify) for name in ARRAYS if name != "rows.npy"}
        ranges = None if part is None else ranges_of(part, header["index"], arrays["parts.npy"], spec.buckets)
        arrays["rows.npy"] = mapped(directory / "rows.npy", populate=verify, ranges=ranges)
        shape = spec.rows, row_stride(spec.row_bytes, header["index"]["print_bytes"])
        if arrays["rows.npy"].shape != shape:
            raise IntegrityError(
                f"{directory / 'rows.npy'} does not fit its header", expected=str(shape),
                got=str(arrays["rows.npy"].shape), remedy=_REMEDY,
            )
        segment = cls(
            spec, version=header["version"], manifest_sha256=header["manifest_sha256"], index=header["index"],
            arrays=arrays,
        )
        segment.lookup(np.zeros(1, np.int64))  # loads the compiled lookup now, so that no request waits for it
        return segment

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch of ids; an unknown id gets the table's default row.

        Args:
            ids: int64, shape (B,); any order, repeats allowed.

        Returns:
            rows: uint8, shape (B, row_bytes).
            found: bool, shape (B,); True wherever the id rule gives the id a row, its own or a bucket's.
        """
        ids = batch_of(ids)
        size = len(ids) * self._row_bytes
        rows, found = np.empty(size + MIN_ROW_BYTES, np.uint8), np.empty(len(ids), np.bool_)
        gather(ids, *self.index, self.default, self._row_bytes, rows, found)
        return rows[:size].reshape(len(ids), self._row_bytes), found

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Row number of each id in `rows`, or -1: int64 (B,) -> int64 (B,)."""
        ids = batch_of(ids)
        out = np.empty(len(ids), np.int64)
        locate(ids, *self.index, out)
        return out


def read_header(path: Path, expected_format: int) -> dict[str, Any]:
    """The header of a segment, checked against its seal.

    Raises:
        VersionNotFound: there is none.
        IntegrityError: it was altered, or is of another format.
    """
    if not path.is_file():
        raise VersionNotFound(
            f"no segment at {path.parent}", expected="a materialized table", got="nothing there",
            remedy="Run `feast materialize` over the version's time.",
        )
    header = read_sealed(path, remedy=_REMEDY)
    if header.get("format") != expected_format:
        raise IntegrityError(
            f"{path} cannot be understood", expected=f"a segment of format {expected_format}",
            got=f"format {header.get('format')}", remedy=_REMEDY,
        )
    return header


def check_files(directory: Path, files: dict[str, str]) -> None:
    """Hash files of a segment (path inside it -> SHA-256); raises `IntegrityError` naming the first that differs."""
    _read_ahead(directory / name for name in files)
    for name, expected in files.items():
        path = directory / name
        got = sha256_of(path) if path.is_file() else "no file"
        if got != expected:
            raise IntegrityError(f"{path} is corrupted", expected=f"sha256 {expected}", got=got, remedy=_REMEDY)


def ranges_of(
    part: tuple[int, int], index: dict[str, int], parts: np.ndarray, buckets: int
) -> list[tuple[int, int]] | None:
    """Ranges of `rows.npy` with the rows of part i of n of the ids; None if they lie everywhere.

    Rows lie in the order of the top bits of their ids' hash, so those of a part of the hashes are neighbours. Ids that
    are not of the vocabulary may fall into any of the buckets, which are hashed with another seed.
    """
    number, count = part
    if index["seed"] or not 0 <= number < count:
        return None  # in the order of another hash
    least, limit = (-(-bound * 2**32 // count) << 32 for bound in (number, number + 1))
    first, last = (hashed >> 1 >> index["part_shift"] for hashed in (least, limit - 1))
    return [(0, buckets), (buckets + int(parts[first, 0]), buckets + int(parts[last + 1, 0]))]


def mapped(path: Path, *, populate: bool, ranges: Iterable[tuple[int, int]] | None = None) -> np.ndarray:
    """A read-only array over the pages of an .npy file; with `populate` they are entered into this process's tables.

    Without that, the first lookup of every page would pay for a fault.

    Args:
        ranges: of the array's first axis, which alone are populated; by default all of it.

    Raises:
        IntegrityError: the file is missing, or is no array.
    """
    try:
        with path.open("rb") as file:
            major, _ = np.lib.format.read_magic(file)
            if major != 1:
                raise ValueError(f"version {major} of the .npy format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), int(np.prod(shape))
            if not size:  # as read-only as the others: to the kernels, that is another type
                return np.frombuffer(b"", dtype).reshape(shape)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.frombuffer(pages, dtype, count=size, offset=start).reshape(shape)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read", expected="an array", got=repr(error), remedy=_REMEDY) from error
    if populate and ranges is None:
        _populate(pages)
    elif populate:
        stride = array.strides[0]
        _populate(pages, [(start + first * stride, start + end * stride) for first, end in ranges if end > first])
    return array


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


def _read_ahead(paths: Iterable[Path]) -> None:
    """Have files that are not in memory read into huge pages, before anything else reads them into small ones."""
    for path in paths:
        with (
            suppress(OSError, ValueError),  # not there, or empty: the check will say so
            path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        ):
            _populate(pages)
