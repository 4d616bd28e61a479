"""The rival of the segment's perfect hash: rows beside a sorted array of ids, found by binary search."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.contracts.durable import creating_directory, sha256_of

__all__ = ["SortedArray"]


class SortedArray:
    """`ids.npy` int64 (N,) ascending and `rows.npy` uint8 (N, B), N > 0; written, flushed and hashed like a segment."""

    def __init__(self, directory: Path) -> None:
        # plain views of the maps: indexing np.memmap itself costs several times as much
        self.ids, self.rows = (np.asarray(np.load(directory / name, mmap_mode="r")) for name in ("ids.npy", "rows.npy"))

    @staticmethod
    def write(directory: Path, batches: Iterable[pa.RecordBatch], *, rows: int, row_bytes: int) -> None:
        """Stream record batches (`id`, `row`) into a new directory."""
        with creating_directory(directory) as staging:
            ids = np.lib.format.open_memmap(staging / "ids.npy", "w+", np.int64, (rows,))
            packed = np.lib.format.open_memmap(staging / "rows.npy", "w+", np.uint8, (rows, row_bytes))
            end = 0
            for batch in batches:
                start, end = end, end + batch.num_rows
                ids[start:end] = batch["id"].to_numpy()
                packed[start:end] = rows_of(batch["row"], row_bytes)
            ids.flush()
            packed.flush()
            for name in ("ids.npy", "rows.npy"):
                sha256_of(staging / name)

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Segment.lookup`: uint8 (B, row_bytes) and found bool (B,); an unknown id gets zeros."""
        position = np.searchsorted(self.ids, ids)
        np.minimum(position, len(self.ids) - 1, out=position)
        found = self.ids[position] == ids
        rows = self.rows[position]
        rows[~found] = 0
        return rows, found


def rows_of(column: pa.Array, row_bytes: int) -> np.ndarray:
    """A column of fixed-size binary as uint8 (N, row_bytes), without a copy."""
    start = column.offset * row_bytes
    return np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * row_bytes].reshape(-1, row_bytes)
