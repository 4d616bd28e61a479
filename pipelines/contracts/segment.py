"""The online form of one table of one version: memory-mapped rows beside a sorted id index.

```
<segment>/
  ids.npy        int64  (N,)    strictly increasing
  rows.npy       uint8  (N, B)  row i belongs to ids[i]
  segment.json   the table's spec, the version, the manifest's hash, the hashes of both arrays
```

A segment directory appears by one rename, whole, and never changes afterwards.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.contracts.durable import creating_directory, sha256_of
from pipelines.contracts.errors import IntegrityError, InvalidTable, VersionNotFound
from pipelines.contracts.spec import TableSpec

__all__ = ["Segment", "write_segment"]

FORMAT = 1


def write_segment(
    directory: Path, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch]
) -> None:
    """Stream record batches (`id` int64, `row` fixed-size binary) into a new segment.

    Memory is bounded by one batch. `directory` appears only when every row has been written, counted and flushed.

    Raises:
        InvalidTable: the ids are not strictly increasing, a row has another width, or the count is not the spec's.
        OSError: `directory` exists already, or the disk refuses.
    """
    with creating_directory(directory) as staging:
        ids = np.lib.format.open_memmap(staging / "ids.npy", "w+", np.int64, (spec.rows,))
        rows = np.lib.format.open_memmap(staging / "rows.npy", "w+", np.uint8, (spec.rows, spec.row_bytes))
        written, last = 0, None
        for batch in batches:
            if not batch.num_rows:
                continue
            chunk, packed = batch.column("id").to_numpy(), _packed_rows(batch.column("row"), spec)
            end = written + len(chunk)
            if end > spec.rows:
                _refuse(spec, f"{spec.rows} rows", f"at least {end}")
            if (last is not None and chunk[0] <= last) or np.any(chunk[1:] <= chunk[:-1]):
                _refuse(spec, "strictly increasing ids", "a repeated or unsorted id")
            ids[written:end], rows[written:end] = chunk, packed
            written, last = end, chunk[-1]
        if written != spec.rows:
            _refuse(spec, f"{spec.rows} rows", str(written))
        for array in (ids, rows):
            if isinstance(array, np.memmap):
                array.flush()
        header = {
            "format": FORMAT,
            "version": version,
            "manifest_sha256": manifest_sha256,
            "table": spec.to_dict(),
            "files": {name: sha256_of(staging / name) for name in ("ids.npy", "rows.npy")},
        }
        (staging / "segment.json").write_text(json.dumps(header, indent=1))


class Segment:
    """Batched reader of one segment. The pages are shared by every process that opens it.

    >>> segment = Segment.open(path)                                  # doctest: +SKIP
    >>> rows, found = segment.lookup(np.array([17, 42]))              # doctest: +SKIP
    """

    def __init__(
        self, spec: TableSpec, *, version: int, manifest_sha256: str, ids: np.ndarray, rows: np.ndarray
    ) -> None:
        self.spec, self.version, self.manifest_sha256 = spec, version, manifest_sha256
        self.ids, self.rows = ids, rows
        self._default = np.frombuffer(spec.default_row_bytes, np.uint8)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> "Segment":
        """Map a segment; with `verify` its files are hashed against its header first.

        Raises:
            VersionNotFound: there is no segment here.
            IntegrityError: a file is missing, truncated or has other bytes than were written.
        """
        header_path = directory / "segment.json"
        if not header_path.is_file():
            raise VersionNotFound(
                f"no segment at {directory}", expected="a materialized table", got="nothing there",
                remedy="Run `feast materialize` over the version's time.",
            )
        try:
            header = json.loads(header_path.read_text())
            spec = TableSpec(**header["table"])
            hashes = header["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{header_path} cannot be read", expected="a segment header", got=repr(error),
                remedy="Delete the segment and materialize the version again.",
            ) from error
        if verify:
            for name, expected in hashes.items():
                got = sha256_of(directory / name) if (directory / name).is_file() else "no file"
                if got != expected:
                    raise IntegrityError(
                        f"{directory / name} is corrupted", expected=f"sha256 {expected}", got=got,
                        remedy="Delete the segment and materialize the version again.",
                    )
        ids, rows = (_map(directory / name) for name in ("ids.npy", "rows.npy"))
        return cls(spec, version=header["version"], manifest_sha256=header["manifest_sha256"], ids=ids, rows=rows)

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch of ids; an unknown id gets the table's default row.

        Args:
            ids: int64, shape (B,); any order, repeats allowed.

        Returns:
            rows: uint8, shape (B, row_bytes).
            found: bool, shape (B,).
        """
        if len(self.ids) == 0:
            return np.tile(self._default, (len(ids), 1)), np.zeros(len(ids), bool)
        position = np.searchsorted(self.ids, ids)
        np.minimum(position, len(self.ids) - 1, out=position)
        found = self.ids[position] == ids
        rows = self.rows[position]
        rows[~found] = self._default
        return rows, found


def _map(path: Path) -> np.ndarray:
    try:
        # a plain view of the map: indexing np.memmap itself costs several times as much
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError:
        return np.load(path, allow_pickle=False)  # an empty file cannot be mapped


def _packed_rows(column: pa.Array, spec: TableSpec) -> np.ndarray:
    expected = pa.binary(spec.row_bytes)
    if column.type != expected:
        _refuse(spec, f"rows of {expected}", str(column.type))
    if column.null_count:
        _refuse(spec, "a row for every id", f"{column.null_count} nulls")
    start = column.offset * spec.row_bytes
    buffer = np.frombuffer(column.buffers()[1], np.uint8)
    return buffer[start : start + len(column) * spec.row_bytes].reshape(len(column), spec.row_bytes)


def _refuse(spec: TableSpec, expected: str, got: str) -> None:
    raise InvalidTable(
        f"table {spec.name}", expected=expected, got=got, remedy="Publish the version again; nothing was materialized."
    )
