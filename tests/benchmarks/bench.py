"""What the publishing benchmarks share: how large their tables are, and the versions they publish once."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.contracts.durable import remove_directory
from pipelines.contracts.segment import Segment
from pipelines.contracts.workspace import Workspace
from tests.benchmarks.sorted_array import rows_of
from tests.benchmarks.synthetic import ROW_BYTES, TABLE, publish_synthetic, record_batches, table_file, view_of
from tests.releases import FeastRepository

__all__ = ["FULL", "QUICK", "Bench", "Sizes", "different_rows", "segment_bytes"]


@dataclass(frozen=True)
class Sizes:
    """Rows of the tables, and how often things are measured.

    Attributes:
        feast: rows that Feast's stock engine writes, at tens of thousands a second.
        stream: rows that raw Redis and the segment writer stream.
        lookup: rows of the table that lookups are measured on.
        batch: ids of a lookup.
        calls: lookups a round.
    """

    feast: int
    stream: int
    lookup: int
    rounds: int
    calls: int
    batch: int = 512

    def at_most(self, rows: int) -> "Sizes":
        """The same with no table larger than `rows`."""
        return Sizes(
            min(self.feast, rows), min(self.stream, rows), min(self.lookup, rows), self.rounds, self.calls, self.batch
        )


FULL = Sizes(feast=500_000, stream=10_000_000, lookup=20_000_000, rounds=5, calls=200)
QUICK = Sizes(feast=500, stream=3_000, lookup=4_000, rounds=5, calls=3)


@dataclass(frozen=True)
class Bench:
    """Sizes and a scratch directory; a version of each size is made when it is first asked for."""

    sizes: Sizes
    scratch: Path
    _repositories: dict[int, FeastRepository] = field(default_factory=dict)

    def repository(self, rows: int) -> FeastRepository:
        """A Feast repository with version 1, one table of `rows` rows, published and applied; nothing materialized."""
        if rows not in self._repositories:
            root = self.scratch / str(rows)
            root.mkdir()
            repository = FeastRepository.create(root)
            publish_synthetic(repository.workspace, rows, seed=rows)
            repository.apply()
            self._repositories[rows] = repository
        return self._repositories[rows]

    def segment(self, rows: int) -> Path:
        """Directory of the materialized segment of `repository(rows)`."""
        repository = self.repository(rows)
        directory = repository.workspace.segment(1, TABLE)
        if not directory.exists():
            repository.materialize([view_of()])
        return directory

    def drop_segment(self, rows: int) -> None:
        workspace = self.repository(rows).workspace
        remove_directory(workspace.segment(1, TABLE), within=workspace.segments)


def segment_bytes(directory: Path) -> int:
    """Size of all files of a segment."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def different_rows(workspace: Workspace) -> int:
    """Look every published id up in the segment; returns how many rows are missing or have other bytes."""
    segment = Segment.open(workspace.segment(1, TABLE), verify=False)
    different = 0
    for batch in record_batches(table_file(workspace)):
        rows, found = segment.lookup(batch["id"].to_numpy())
        same = found & (rows == rows_of(batch["row"], ROW_BYTES)).all(axis=1)
        different += int(np.count_nonzero(~same))
    return different
