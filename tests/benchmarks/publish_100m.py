"""`make bench-publish-100m`: one table of 100 M rows from publishing to retiring, with the stock commands.

```
python -m tests.benchmarks.publish_100m                      some ten minutes, 20 GiB of disk meanwhile
python -m tests.benchmarks.publish_100m --rows 1000000       the same with a smaller table
```
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts.segment import Segment
from tests.benchmarks.bench import different_rows, segment_bytes
from tests.benchmarks.harness import Result, Side, bounded, interleave, measured, show, write_results
from tests.benchmarks.memory import run_watched
from tests.benchmarks.synthetic import ROW_BYTES, TABLE, publish_synthetic, table_file, view_of
from tests.releases import WIDE_RANGE, FeastRepository

__all__ = ["main"]

BATCH, CALLS, ROUNDS, MOST_UNKNOWN_IDS = 512, 2_000, 5, 10_000_000
MOST_MEMORY_BYTES, MOST_BYTES_PER_ROW, FALSE_POSITIVES = 2 << 30, 40.0, 2**-16
PROGRAMS = Path(sys.executable).parent


def life_of_a_table(root: Path, rows: int) -> Iterator[Result]:
    """Publish, `feast apply`, `feast materialize`, look up, read all back, `facet retire`."""
    repository = FeastRepository.create(root)
    workspace, size = repository.workspace, {"rows": rows, "row_bytes": ROW_BYTES}
    start = time.perf_counter()
    publish_synthetic(workspace, rows)
    yield measured(
        "publish_s", ours=time.perf_counter() - start, unit="s", **size,
        timed="making the random rows and writing them into a release included",
    )
    yield from _materialize(repository, size)
    yield from _look_up(repository, size)
    publish_synthetic(workspace, 1_000, seed=1)  # the current version cannot be retired
    retired = run_watched([str(PROGRAMS / "facet"), "--workspace", str(workspace.root), "retire", "1"], cwd=root)
    left = list(workspace.segments.glob("1/*")) + list((workspace.versions.path(1)).glob("t*/*"))
    if left:
        raise RuntimeError(f"facet retire left {left}")
    yield measured("retire_s", ours=retired.seconds, unit="s", **size, timed="`facet retire` from start to exit")


def _materialize(repository: FeastRepository, size: dict) -> Iterator[Result]:
    feast, days = str(PROGRAMS / "feast"), [day.replace(tzinfo=None).isoformat() for day in WIDE_RANGE]
    repository.apply()
    watched = run_watched([feast, "materialize", *days, "--views", view_of()], cwd=repository.path)
    how = size | {"command": "feast materialize", "timed": "the command from start to exit, hashes and fsync included"}
    yield measured("materialize_s", ours=watched.seconds, unit="s", **how)
    yield measured("materialize_rows_per_s", ours=size["rows"] / watched.seconds, unit="rows/s", **how)
    yield bounded(
        "materialize_peak_memory", ours=watched.peak_bytes, at_most=MOST_MEMORY_BYTES, unit="bytes", **how,
        measured="anonymous and shared memory of the command and its children, sampled 50 times a second",
    )
    directory = repository.workspace.segment(1, TABLE)
    yield bounded(
        "bytes_per_row", ours=segment_bytes(directory) / size["rows"], at_most=MOST_BYTES_PER_ROW, unit="bytes/row",
        **size,
    )


def _look_up(repository: FeastRepository, size: dict) -> Iterator[Result]:
    workspace, rng = repository.workspace, np.random.default_rng(0)
    start = time.perf_counter()
    segment = Segment.open(workspace.segment(1, TABLE))
    yield measured(
        "open_s", ours=time.perf_counter() - start, unit="s", **size, timed="Segment.open: every file hashed and mapped"
    )
    ids = pq.read_table(table_file(workspace), columns=["id"])["id"].to_numpy()
    ask = Side(
        "Segment.lookup", segment.lookup, lambda: [ids[rng.integers(0, len(ids), BATCH)] for _ in range(CALLS)]
    )
    timing = interleave([ask], rounds=ROUNDS, label="lookup")[ask.name]
    how = size | {"batch": BATCH, "rounds": ROUNDS, "calls_a_round": CALLS, "threads": 1, "answer": "packed rows"}
    yield measured("lookup512_median_us", ours=timing.seconds * 1e6, unit="us", **how)
    yield measured("lookup512_p99_us", ours=timing.p99 * 1e6, unit="us", **how)
    yield measured(
        "different_rows", ours=different_rows(workspace), unit="rows", **size,
        checked="every published id looked up and compared, byte for byte",
    )
    strangers = rng.integers(-(2**63), 2**63, min(MOST_UNKNOWN_IDS, 50 * len(ids)), np.int64)
    strangers = strangers[ids[np.minimum(np.searchsorted(ids, strangers), len(ids) - 1)] != strangers]
    yield measured(
        "unknown_ids_taken_for_known", ours=float(segment.lookup(strangers)[1].mean()), unit="share", **size,
        asked=len(strangers), by_design=FALSE_POSITIVES,
    )


@click.command()
@click.option("--rows", type=click.IntRange(min=1), default=100_000_000, show_default=True, help="Rows of the table.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("reports/bench/publish_100m.json"),
    show_default=True,
)
@click.option(
    "--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where to put 20 GiB meanwhile."
)
def main(rows: int, output: Path, scratch: Path | None) -> None:
    """Take one large table from publishing to retiring."""
    logging.getLogger("feast").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="facet-bench-", dir=scratch) as root:
        results = list(life_of_a_table(Path(root), rows))
    write_results(output, results)
    click.echo(show(results))
    click.echo(f"\n{output}")


if __name__ == "__main__":
    main(standalone_mode=False)
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's teardown, in which DuckDB prints pages about objects that Feast keeps open
