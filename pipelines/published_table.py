"""The rows of a published table as its Parquet file has them, in batches, and ids that it does not have."""

import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import open_table_file, row_matrix

__all__ = ["PublishedTable", "UnknownIds"]

BATCH_ROWS = 1 << 20
UNKNOWN_IDS, FEW_IDS = 1 << 20, 1_000

Rows = tuple[np.ndarray, np.ndarray]  # ids int64 (B,) and rows uint8 (B, row_bytes)


class PublishedTable:
    """A table's open file, read by row groups: only those that hold a wanted row, and memory is bounded by a batch."""

    def __init__(self, file: BinaryIO, spec: TableSpec) -> None:
        self.file, self.spec = file, spec

    def batches(self, chosen: np.ndarray | None, unknown: "UnknownIds") -> Iterator[Rows]:
        """The rows numbered `chosen` (ascending), or all, in batches of about `BATCH_ROWS`; `unknown` sees all read."""
        waiting, count = [], 0
        for start, ids, rows in self._stretches(chosen):
            unknown.see(ids)
            if chosen is not None:
                inside = _between(chosen, start, start + len(ids)) - start
                ids, rows = ids[inside], rows[inside]
            waiting.append((ids, rows))
            count += len(ids)
            if count >= BATCH_ROWS:
                yield _joined(waiting)
                waiting, count = [], 0
        if count:
            yield _joined(waiting)

    def rows_at(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of ascending row numbers: int64 (B,) -> uint8 (B, row_bytes)."""
        parts = [
            rows[_between(numbers, start, start + len(rows)) - start] for start, _, rows in self._stretches(numbers)
        ]
        return np.concatenate([np.empty((0, self.spec.row_bytes), np.uint8), *parts])

    def id_bounds(self) -> tuple[int, int]:
        """Least and greatest id, from the file's statistics; all of int64 if it has none, (0, -1) without rows."""
        with open_table_file(self.file) as file:
            column = file.schema_arrow.names.index("id")
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            bounds = [group.column(column).statistics for group in groups if group.num_rows]
        if not bounds:
            return 0, -1
        if any(bound is None or not bound.has_min_max for bound in bounds):
            return -(2**63), 2**63 - 1
        return min(bound.min for bound in bounds), max(bound.max for bound in bounds)

    def _stretches(self, chosen: np.ndarray | None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number of the first row, ids and rows of consecutive rows; of row groups with a `chosen` row, or of all."""
        start = 0
        with open_table_file(self.file) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if chosen is None or len(_between(chosen, start, end)):
                    at = start
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["id", "row"]):
                        yield at, batch.column("id").to_numpy(), row_matrix(batch.column("row"))
                        at += batch.num_rows
                start = end


class UnknownIds:
    """Ids that a table does not have: among the ids of each stretch that is read, and below and above all of them."""

    def __init__(self, table: PublishedTable, rng: np.random.Generator) -> None:
        self._rng, self._rows = rng, max(1, table.spec.rows)
        self._wanted = min(UNKNOWN_IDS, max(FEW_IDS, table.spec.rows))
        self._found = [self._outside(*table.id_bounds())]

    def see(self, ids: np.ndarray) -> None:
        """Find some among ascending ids that follow each other in the file."""
        count = math.ceil(self._wanted * len(ids) / self._rows / 3)
        anywhere = self._rng.integers(ids[0], ids[-1], count, endpoint=True)
        neighbours = self._rng.choice(ids[:-1], count) + 1 if len(ids) > 1 else anywhere
        both = np.concatenate([anywhere, neighbours])
        self._found.append(both[ids[np.searchsorted(ids, both)] != both])

    def ids(self) -> np.ndarray:
        """int64 (U,), shuffled; an id may come more than once."""
        return self._rng.permutation(np.concatenate(self._found))

    def _outside(self, first: int, last: int) -> np.ndarray:
        spans = [span for span in ((-(2**63), first - 1), (last + 1, 2**63 - 1)) if span[0] <= span[1]]
        each = self._wanted // 3 // max(1, len(spans))
        parts = [self._rng.integers(*span, each, np.int64, endpoint=True) for span in spans]
        return np.concatenate([np.empty(0, np.int64), *parts])


def _between(chosen: np.ndarray, start: int, end: int) -> np.ndarray:
    first, last = np.searchsorted(chosen, [start, end])
    return chosen[first:last]


def _joined(parts: list[Rows]) -> Rows:
    ids, rows = zip(*parts, strict=True)
    return (ids[0], rows[0]) if len(parts) == 1 else (np.concatenate(ids), np.concatenate(rows))
