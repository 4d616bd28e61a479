"""The online form of one table of one version: memory-mapped rows in the order of a minimal perfect hash of their ids.

```
<segment>/
  rows.npy        uint8  (N, row_bytes + 2)   a row (padded to 8 bytes), then its fingerprint: 16 bits of its id's
                                              hash, or in tables of up to 4 M rows all 64
                         first the rows of the hash buckets, if the id rule has any: bucket 0 last
  parts.npy       uint64 (P + 1, 2)           rows before each part of the vocabulary; its salt
  pilots.npy      uint8  (P * pilots,)        one per bin of about three keys
  remap.npy       uint16 (P * slots - rows,)  row within its part of every slot beyond the part's rows
  segment.json    spec, version, manifest hash, the index's numbers, the SHA-256 of every array
  segment.sha256  the hash of segment.json
```

An id is hashed; the hash's top bits name the part, the pilot of its bin turns it into a slot, and the two bytes
behind that row say whether the row is this id's:

```
id ──hash64──► part, bin ──pilots──► slot ──remap──► row ──► row bytes │ the id's fingerprint ? row : default row
            (one cache miss, small array)                    (one or two cache misses, adjacent)
```

An id of the vocabulary always finds its own row. An unknown id is always recognized by a fingerprint of 64 bits; with
16 bits it passes for a known one with probability 2**-16. To tell ids of 64 arbitrary bits apart exactly takes about 41
bits each at 10 M rows; there, this index spends 19.5.

A segment directory appears by one rename, whole, and never changes afterwards. A version that shares most rows with
one before may have a `pipelines.contracts.segment_delta` in its place.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.hashing import seed_mask
from pipelines.contracts.ids import batch_of
from pipelines.contracts.mapped_array import MappedArray, open_array
from pipelines.contracts.segment_header import ARRAYS, HEADER_NAME, REMEDY, IndexNumbers, SegmentHeader, read_header
from pipelines.contracts.segment_index import MIN_ROW_BYTES, gather, locate, parts_table

__all__ = ["Segment", "ranges_of", "require_parts"]


class Segment:
    """Batched reader of one segment. The pages are shared by every process that opens it.

    Safe to use from several threads, which a lookup lets run: it holds no lock and releases the interpreter's.

    >>> segment = Segment.open(path)                                  # doctest: +SKIP
    >>> rows, found = segment.lookup(np.array([17, 42]))              # doctest: +SKIP

    Attributes:
        rows: uint8 (N, row_bytes), every row in the order of the segment; a view of the mapped file.
        default: uint8, the default row, at least MIN_ROW_BYTES long.
        index: what the kernels of `pipelines.contracts.segment_index` find rows with, the stored rows included.
        files: what is mapped; asked before each lookup whether it is whole.
    """

    at_hand = True

    def __init__(self, header: SegmentHeader, arrays: dict[str, MappedArray]) -> None:
        self.spec, self.version, self.manifest_sha256 = header.table, header.version, header.manifest_sha256
        spec, index, stored = header.table, header.index, arrays["rows.npy"].array
        self.rows = stored[:, : spec.row_bytes]
        self._row_bytes = spec.row_bytes
        self.default = np.frombuffer(spec.default_row_bytes.ljust(MIN_ROW_BYTES, b"\0"), np.uint8)
        parameters = np.array(
            [
                seed_mask(index.seed), seed_mask(spec.hash_seed), index.part_shift, index.pilots, index.slots,
                spec.rows - spec.buckets, spec.buckets, 64 - 8 * index.fingerprint_bytes,
            ],
            np.uint64,
        )
        parts = parts_table(arrays["parts.npy"].array, slots=index.slots, buckets=spec.buckets)
        self.index = (
            parameters, parts, arrays["pilots.npy"].array, arrays["remap.npy"].array, stored.reshape(-1),
            stored.shape[1],
        )
        # of the parts a copy is used
        self.files = tuple(arrays[name].file for name in ARRAYS if name != "parts.npy" and arrays[name].file)

    @classmethod
    def open(
        cls, directory: Path, *, verify: bool = True, part: tuple[int, int] | None = None,
        header_sha256: str | None = None,
    ) -> "Segment":
        """Map a segment; with `verify` each of its files is hashed against its header before it is used.

        Args:
            part: (i, n) where almost all ids to come have (hash64(id) >> 32) * n >> 32 == i: of the rows, only those
                of such ids are entered into this process's memory, about one in n. Any other row is read as correctly,
                but at its first use from the file.
            header_sha256: of the header, where another file names it.

        Raises:
            VersionNotFound: there is no segment here.
            IntegrityError: a file is missing, truncated, has other bytes than were written, or does not fit the others.
        """
        header = read_header(directory / HEADER_NAME, SegmentHeader, sha256=header_sha256)

        def opened(name: str, **how: Any) -> MappedArray:
            return open_array(
                directory / name, *header.shapes[name], sha256=header.files[name] if verify else None, remedy=REMEDY,
                populate=verify, **how,
            )

        arrays = {name: opened(name) for name in ARRAYS if name != "rows.npy"}
        require_parts(directory / "parts.npy", arrays["parts.npy"].array, header)
        ranges = part and ranges_of(part, header.index, arrays["parts.npy"].array, header.table.buckets)
        arrays["rows.npy"] = opened("rows.npy", ranges=ranges, private=False)
        segment = cls(header, arrays)
        segment.lookup(np.zeros(1, np.int64))  # loads the compiled lookup now, so that no request waits for it
        return segment

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch of ids; an unknown id gets the table's default row.

        Args:
            ids: int64, shape (B,); any order, repeats allowed.

        Returns:
            rows: uint8, shape (B, row_bytes).
            found: bool, shape (B,); True wherever the id rule gives the id a row, its own or a bucket's.

        Raises:
            IntegrityError: a file of the segment was cut since it was opened.
        """
        for file in self.files:
            file.require_whole()
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


def ranges_of(
    part: tuple[int, int], index: IndexNumbers, parts: np.ndarray, buckets: int
) -> list[tuple[int, int]] | None:
    """Ranges of `rows.npy` with the rows of part i of n of the ids; None if they lie everywhere.

    Rows lie in the order of the top bits of their ids' hash, so those of a part of the hashes are neighbours. Ids that
    are not of the vocabulary may fall into any of the buckets, which are hashed with another seed.
    """
    number, count = part
    if index.seed or not 0 <= number < count:
        return None  # in the order of another hash
    least, limit = (-(-bound * 2**32 // count) << 32 for bound in (number, number + 1))
    first, last = (hashed >> 1 >> index.part_shift for hashed in (least, limit - 1))
    return [(0, buckets), (buckets + int(parts[first, 0]), buckets + int(parts[last + 1, 0]))]


def require_parts(path: Path, parts: np.ndarray, header: SegmentHeader) -> None:
    """Raise `IntegrityError` unless the parts hold the vocabulary's rows one after another, each no more than it can.

    With the shapes of the header, this keeps every row and place in the remap that a lookup finds inside the arrays.

    Args:
        parts: uint64 (P + 1, 2), as `parts.npy` has it.
    """
    bounds = parts[:, 0]
    ascend = bool((bounds[1:] >= bounds[:-1]).all())
    most = int((bounds[1:] - bounds[:-1]).max())
    vocabulary_rows = header.table.rows - header.table.buckets
    if not (ascend and bounds[0] == 0 and bounds[-1] == vocabulary_rows and most <= header.index.slots):
        raise IntegrityError(
            f"{path} does not fit its header",
            expected=f"parts of 0 to {vocabulary_rows} rows, each of {header.index.slots} at most",
            got=f"{bounds[0]} to {bounds[-1]}, {'each' if ascend else 'out of order, one'} of up to {most}",
            remedy=REMEDY,
        )
