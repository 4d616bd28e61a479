"""What a version that shares rows with its parent costs, against one written in full: time, bytes and lookups."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipelines.contracts.durable import remove_directory, sha256_of
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import DeltaSegment, open_segment
from pipelines.contracts.segment_delta_writer import MOST_CHANGED, write_delta
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.table_file import write_table_file
from tests.benchmarks.bench import Bench, segment_bytes
from tests.benchmarks.harness import Result, Side, Timing, interleave, sizes_compared, speeds_compared
from tests.benchmarks.sorted_array import rows_of
from tests.benchmarks.synthetic import ROW_BYTES, TABLE, packed_rows, record_batches, table_file

__all__ = ["deltas"]

SHARES = (0.01, 0.0, 0.1, 0.3)
"""Of rows that differ from the parent's; the first is what the results are of, the others stand in their conditions."""
FULL = "the whole table in a segment of its own"


def deltas(bench: Bench) -> Iterator[Result]:
    """Tables that differ from the parent's in shares of their rows, drawn at random."""
    rows, folder = bench.sizes.stream, bench.scratch / "deltas"
    folder.mkdir()
    workspace = bench.repository(rows).workspace
    manifest = workspace.versions.manifest(1)
    identity = {"spec": manifest.table(TABLE), "version": 2, "manifest_sha256": manifest.sha256}
    parent, full = bench.segment(rows), folder / "full"
    tables = {share: _changed_table(table_file(workspace), folder / f"{share}.parquet", share) for share in SHARES}

    def write_full(_: None) -> None:
        sha256_of(tables[SHARES[0]])
        write_segment(full, **identity, batches=record_batches(tables[SHARES[0]]))

    def write_share(share: float) -> None:
        sha256_of(tables[share])
        batches = _Again(tables[share])
        if not write_delta(folder / str(share), **identity, batches=batches, parent=parent, most_changed=1.0):
            raise RuntimeError("no delta was written")

    sides = [Side(FULL, write_full, after=lambda: remove_directory(full, within=folder))]
    sides += [
        Side(_name(share), lambda _, share=share: write_share(share), after=lambda share=share: remove_directory(
            folder / str(share), within=folder
        ))
        for share in SHARES
    ]
    timings = interleave(sides, rounds=bench.sizes.rounds, label="materialize deltas")
    conditions = {
        "rows": rows, "row_bytes": ROW_BYTES, "changed": SHARES[0], "written_in_full_from": MOST_CHANGED,
    }
    yield speeds_compared(
        "delta_1pct_materialize_vs_full", ours=timings[_name(SHARES[0])], rival=timings[FULL], amount=rows,
        **conditions, ratios_at_other_shares=_ratios(timings),
        timed="the table file hashed, then its batches to a flushed and hashed directory, as the engine does",
    )
    write_full(None)
    for share in SHARES:
        write_share(share)
    segments = {share: open_segment(folder / str(share)) for share in SHARES}
    _require_rows(segments, tables)
    whole, own = segment_bytes(full) / rows, {share: _own_bytes(folder / str(share)) / rows for share in SHARES}
    yield sizes_compared(
        "delta_1pct_bytes_vs_full", ours=own[SHARES[0]], rival=whole, rival_name=FULL, **conditions,
        ratios_at_other_shares={str(share): whole / size for share, size in own.items()},
        measured="files that are not the parent's too",
    )
    ids = np.concatenate([batch["id"].to_numpy() for batch in record_batches(table_file(workspace))])
    rng, sizes = np.random.default_rng(1), bench.sizes

    def asked() -> list[np.ndarray]:
        return [ids[rng.integers(0, rows, sizes.batch)] for _ in range(sizes.calls)]

    sides = [Side(FULL, Segment.open(full).lookup, asked)]
    sides += [Side(_name(share), segment.lookup, asked) for share, segment in segments.items()]
    timings = interleave(sides, rounds=sizes.rounds, label="lookup in deltas")
    yield speeds_compared(
        "delta_1pct_lookup512_vs_full", ours=timings[_name(SHARES[0])], rival=timings[FULL], **conditions,
        batch=sizes.batch, threads=1, ratios_at_other_shares=_ratios(timings),
        note="below 1 where the delta is the slower of the two",
    )


class _Again:
    """A table's record batches, as often as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator:
        return record_batches(self._path)


def _name(share: float) -> str:
    return f"links to the parent's segment, and {share:.0%} of the rows"


def _ratios(timings: dict[str, Timing]) -> dict[str, float]:
    return {str(share): timings[FULL].seconds / timings[_name(share)].seconds for share in SHARES}


def _changed_table(source: Path, path: Path, share: float) -> Path:
    """A copy of a table's file with other rows for a share of its ids."""
    rng = np.random.default_rng(7)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in record_batches(source, rows=1 << 20):
            rows, new = rows_of(batch["row"], ROW_BYTES).copy(), rng.random(batch.num_rows) < share
            rows[new] = packed_rows(int(new.sum()), rng)
            yield batch["id"].to_numpy(), rows

    write_table_file(path, batches(), row_bytes=ROW_BYTES, as_of=datetime.now(UTC))
    return path


def _require_rows(segments: dict[float, DeltaSegment], tables: dict[float, Path]) -> None:
    for share, segment in segments.items():
        for batch in record_batches(tables[share]):
            rows, found = segment.lookup(batch["id"].to_numpy())
            if not found.all() or (rows != rows_of(batch["row"], ROW_BYTES)).any():
                raise RuntimeError(f"a delta of {share:.0%} changed rows answers with others; it is not measured")


def _own_bytes(directory: Path) -> int:
    return sum(
        path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.stat().st_nlink == 1
    )
