"""From record batches to a segment, in two passes over bounded memory.

```
batches, by id ──► partition by hash ──► group 0 ─┐    for each part of a group: perfect hash, rows into place
                   (records: hash, row)  group 1 ─┼──► ───────────────────────────────────────────────────────► rows.npy
                                         …        ─┘    one group in memory at a time                            …
```

A small table is one group and never leaves memory; the groups of a large one wait in files beside the segment.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from pipelines.contracts.durable import creating_directory
from pipelines.contracts.errors import InvalidTable
from pipelines.contracts.hashing import hash64
from pipelines.contracts.perfect_hash import BIN_KEYS, LOAD, build_part, fingerprint, store64
from pipelines.contracts.sealed import write_sealed
from pipelines.contracts.segment_header import HEADER_NAME, SegmentHeader
from pipelines.contracts.segment_index import MIN_ROW_BYTES, copy_words, row_stride
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_batches import checked_batches

__all__ = ["write_segment"]

SEED = 0  # of the index's hash; recorded in every segment
PART_KEYS = 40_000  # at most this many expected in a part, so that none comes near the most a part may have
GROUP_BYTES = 128 << 20  # of records in memory at a time
IN_MEMORY = 4  # a table of up to so many groups never leaves memory
HASH_BYTES = 8
HUGE_PAGES_BYTES = 4 << 20  # a file written in such pieces lies in huge pages, which readers then map as such
EXACT_ROWS = 4_000_000  # up to here six bytes more a row are cheap, and every unknown id is recognized


def write_segment(
    directory: Path, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch],
    group_bytes: int = GROUP_BYTES, exact_rows: int = EXACT_ROWS,
) -> None:
    """Stream record batches (`id` int64 ascending, `row` fixed-size binary) into a new segment.

    Memory is less than ten times `group_bytes`, whatever the table's size. `directory` appears only when every row has
    been written, counted and flushed.

    Args:
        exact_rows: a table of up to this many rows recognizes every unknown id; a larger one all but one in 65,536.

    Raises:
        InvalidTable: the ids are not strictly increasing or not those of the id rule, a row has another width, or the
            count is not the spec's.
        OSError: `directory` exists already, or the disk refuses.
    """
    fingerprint_bytes = 8 if spec.rows <= exact_rows else 2
    stored_bytes, stride = max(spec.row_bytes, MIN_ROW_BYTES), row_stride(spec.row_bytes, fingerprint_bytes)
    with creating_directory(directory, read_only=True) as staging, ExitStack() as stack:
        records = stack.enter_context(_Records(staging, spec.rows - spec.buckets, stored_bytes, group_bytes))
        rows = stack.enter_context(_ArrayFile(staging / "rows.npy", (spec.rows, stride)))
        for ids, packed in checked_batches(batches, spec):
            head = int(np.searchsorted(ids, 0)) if spec.buckets else 0
            rows.append(np.pad(packed[:head], ((0, 0), (0, stride - spec.row_bytes))))
            if stored_bytes > spec.row_bytes:
                packed = np.pad(packed, ((0, 0), (0, stored_bytes - spec.row_bytes)))
            records.add(hash64(ids[head:], SEED), packed[head:])
        header = {
            "format": SegmentHeader.FORMAT,
            "version": version,
            "manifest_sha256": manifest_sha256,
            "table": spec.to_dict(),
            **_write_index(staging, records, rows),
        }
        write_sealed(staging / HEADER_NAME, json.dumps(header, indent=1))


def _write_index(staging: Path, records: "_Records", rows: "_ArrayFile") -> dict[str, dict]:
    """Write the rows in their final order, and the arrays that find them; returns the header's `index` and `files`."""
    counts = records.part_counts
    slots = max(1, int(np.ceil(counts.max() / LOAD)))
    pilots = max(1, int(np.ceil(records.keys / len(counts) / BIN_KEYS)))
    fingerprint_bytes = rows.shape[1] - records.row_bytes
    parts = np.zeros((len(counts) + 1, 2), np.uint64)
    parts[1:, 0] = np.cumsum(counts)
    with (
        _ArrayFile(staging / "pilots.npy", (len(counts) * pilots,)) as pilot_file,
        _ArrayFile(staging / "remap.npy", (len(counts) * slots - records.keys,), np.uint16) as remap_file,
        _ArrayFile(staging / "parts.npy", parts.shape, np.uint64) as parts_file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for first_part, group in records.groups():
            # parts are hashed and written in their order while later ones are built
            built = _built_parts(group, first_part, records, slots, pilots, fingerprint_bytes, pool)
            for number, part in enumerate(built):
                parts[first_part + number, 1] = part.salt
                rows.append(part.rows)
                pilot_file.append(part.pilots)
                remap_file.append(part.remap)
        parts_file.append(parts)
        files = {"rows.npy": rows, "parts.npy": parts_file, "pilots.npy": pilot_file, "remap.npy": remap_file}
        return {
            "index": {
                "seed": SEED, "part_shift": records.part_shift, "pilots": pilots, "slots": slots,
                "fingerprint_bytes": fingerprint_bytes,
            },
            "files": {name: file.close() for name, file in files.items()},
        }


class _Part(NamedTuple):
    """What becomes of one part: see `pipelines.contracts.segment` for the arrays."""

    salt: int
    rows: np.ndarray
    pilots: np.ndarray
    remap: np.ndarray


def _built_parts(
    group: np.ndarray, first_part: int, records: "_Records", slots: int, pilots: int, fingerprint_bytes: int,
    pool: ThreadPoolExecutor,
) -> Iterator[_Part]:
    """The parts of one group, in their order; they are built side by side."""
    row_bytes = records.row_bytes
    hashes = group.reshape(-1, HASH_BYTES + row_bytes)[:, :HASH_BYTES].copy().view(np.uint64).reshape(-1)
    counts = records.part_counts[first_part : first_part + records.parts_of_group]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    order = _order_by_part(hashes, records.part_shift, first_part, bounds)

    def build(number: int) -> _Part:
        members = order[bounds[number] : bounds[number + 1]]
        part = _Part(
            0, np.empty(len(members) * (row_bytes + fingerprint_bytes), np.uint8), np.empty(pilots, np.uint8),
            np.empty(slots - len(members), np.uint16),
        )
        return part._replace(
            salt=_place_part(
                hashes, members, group, row_bytes, fingerprint_bytes, slots, part.pilots, part.remap, part.rows
            )
        )

    for part in pool.map(build, range(len(counts))):
        if part.salt < 0:
            raise InvalidTable(
                "the table's ids", expected="distinct ids", got="hashes for which no perfect hash was found",
                remedy="Publish the version again; if that does not help, report it: this should not happen.",
            )
        yield part


class _Records:
    """Records (hash, row) of the vocabulary, gathered into groups of whole parts."""

    def __init__(self, staging: Path, keys: int, row_bytes: int, group_bytes: int) -> None:
        self.keys, self.row_bytes, self._record_bytes = keys, row_bytes, HASH_BYTES + row_bytes
        part_bits = max(0, int(np.ceil(np.log2(max(keys, 1) / PART_KEYS))))
        groups = max(keys, 1) * self._record_bytes / group_bytes
        group_bits = min(part_bits, int(np.ceil(np.log2(groups)))) if groups > IN_MEMORY else 0
        self.part_shift = 63 - part_bits
        self.parts_of_group = 1 << (part_bits - group_bits)
        self.part_counts = np.zeros(1 << part_bits, np.int64)
        self._group_shift, self._added = 63 - group_bits, 0
        self._memory = np.empty(keys * self._record_bytes, np.uint8) if not group_bits else None
        self._paths = [staging / f"group-{group}" for group in range(1 << group_bits)] if group_bits else []
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> "_Records":
        self._files = [path.open("wb", buffering=0) for path in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        """Take one batch: hashes uint64 (B,) and rows uint8 (B, row_bytes)."""
        self.part_counts += np.bincount(
            ((hashes >> np.uint64(1)) >> np.uint64(self.part_shift)).view(np.int64), minlength=len(self.part_counts)
        )
        size = len(hashes) * self._record_bytes
        start, self._added = self._added, self._added + size
        records = np.empty(size, np.uint8) if self._memory is None else self._memory[start : self._added]
        bounds = _scatter(
            hashes, np.ascontiguousarray(rows).reshape(-1), self.row_bytes, self._group_shift, max(1, len(self._files)),
            records,
        )
        for group, file in enumerate(self._files):
            _write_all(file, records[bounds[group] * self._record_bytes : bounds[group + 1] * self._record_bytes])

    def groups(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first part, records uint8 (n * record_bytes,)) of each group, in the order of the parts; only once."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            yield 0, memory
        for group, path in enumerate(self._paths):
            self._files[group].close()
            yield group * self.parts_of_group, np.fromfile(path, np.uint8)
            path.unlink()


class _ArrayFile:
    """An .npy file of known shape, written in order and hashed on the way."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> None:
        self.shape, self._path, self._dtype = shape, path, np.dtype(dtype)
        self._hash, self._left = hashlib.sha256(), int(np.prod(shape))

    def __enter__(self) -> "_ArrayFile":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self._dtype.str, "fortran_order": False, "shape": self.shape}
        )
        self._hash.update(header.getvalue())
        self._waiting = bytearray(header.getvalue())
        self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self._dtype)
        self._left -= data.size
        self._hash.update(data.data)
        self._waiting += data.reshape(-1).view(np.uint8).data
        whole = len(self._waiting) // HUGE_PAGES_BYTES * HUGE_PAGES_BYTES
        if whole:
            _write_all(self._file, np.frombuffer(bytes(self._waiting[:whole]), np.uint8))
            del self._waiting[:whole]

    def close(self) -> str:
        """SHA-256 of the whole file; raises if not all of the array was written."""
        if self._left:
            raise RuntimeError(f"{self._path}: {self._left} elements are missing")
        _write_all(self._file, np.frombuffer(bytes(self._waiting), np.uint8))
        self._file.close()
        return self._hash.hexdigest()


def _write_all(file: IO[bytes], data: np.ndarray) -> None:
    """An unbuffered file may take less than it is given."""
    view = memoryview(data.reshape(-1)).cast("B") if data.size else memoryview(b"")
    while view:
        view = view[file.write(view) :]


@njit(nogil=True, cache=True)
def _scatter(hashes, rows, row_bytes, group_shift, groups, records):
    """Sort a batch's records by group into `records`; returns the bounds of the groups, int64 (groups + 1,).

    Args:
        rows: uint8 (B * row_bytes,).
        records: uint8 (B * (HASH_BYTES + row_bytes),).
    """
    bounds = np.zeros(groups + 1, np.int64)
    for hashed in hashes:
        bounds[np.int64((hashed >> np.uint64(1)) >> np.uint64(group_shift)) + 1] += 1
    for group in range(groups):
        bounds[group + 1] += bounds[group]
    cursor = bounds[:-1].copy()
    for i in range(len(hashes)):
        group = np.int64((hashes[i] >> np.uint64(1)) >> np.uint64(group_shift))
        to = cursor[group] * (HASH_BYTES + row_bytes)
        cursor[group] += 1
        store64(records, to, hashes[i])
        copy_words(rows, i * row_bytes, records, to + HASH_BYTES, row_bytes)
    return bounds


@njit(nogil=True, cache=True)
def _order_by_part(hashes, part_shift, first_part, bounds):
    """Record numbers sorted by part: int32 (n,)."""
    cursor, order = bounds[:-1].copy(), np.empty(len(hashes), np.int32)
    for i in range(len(hashes)):
        part = np.int64((hashes[i] >> np.uint64(1)) >> np.uint64(part_shift)) - first_part
        order[cursor[part]] = i
        cursor[part] += 1
    return order


@njit(nogil=True, cache=True)
def _place_part(hashes, members, records, row_bytes, fingerprint_bytes, slots, pilots, remap, out):
    """Build the perfect hash of one part and put its rows, each with its fingerprint, where lookups will find them.

    Args:
        records: uint8 (n * (HASH_BYTES + row_bytes),) of the whole group; `members` are those of the part.
        out: uint8 (members * (row_bytes + fingerprint_bytes),), the rows of the part.
    """
    n, record_bytes, stride = len(members), HASH_BYTES + row_bytes, row_bytes + fingerprint_bytes
    keys, places = np.empty(n, np.uint64), np.empty(n, np.uint16)
    for i in range(n):
        keys[i] = hashes[members[i]]
    salt = build_part(keys, slots, pilots, places, remap)
    if salt < 0:
        return salt
    for i in range(n):
        to = np.int64(places[i]) * stride
        store64(out, to + stride - 8, fingerprint(keys[i]))  # of which the row overwrites all but its fingerprint
        copy_words(records, np.int64(members[i]) * record_bytes + HASH_BYTES, out, to, row_bytes)
    return salt
