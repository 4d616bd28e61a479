"""`make bench-publish`: publishing and reading a version, against Feast, Redis and FBGEMM, into a JSON file.

```
python -m tests.benchmarks.publish                                   everything, about half an hour on two cores
python -m tests.benchmarks.publish --only lookup512_vs_fbgemm        one result and those measured with it
python -m tests.benchmarks.publish --rows 1000000                    no table larger than this
```
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from tests.benchmarks.bench import FULL, QUICK, Bench
from tests.benchmarks.deltas import deltas
from tests.benchmarks.footprint import bytes_per_row
from tests.benchmarks.harness import Result, show, write_results
from tests.benchmarks.lookup import lookups
from tests.benchmarks.materialize import against_feast, against_redis, against_sorted_array

__all__ = ["GROUPS", "main"]

GROUPS: dict[Callable[[Bench], Iterator[Result]], tuple[str, ...]] = {
    against_feast: (
        "materialize_vs_feast_sqlite", "materialize_vs_feast_redis", "materialize_vs_feast_redis_skip_dedup",
    ),
    against_redis: (
        "materialize_vs_redis_mset", "redis_packed_write_vs_redis_mset", "materialize_vs_redis_wire",
        "materialize_different_rows",
    ),
    against_sorted_array: ("index_build_vs_sorted_array",),
    deltas: ("delta_1pct_materialize_vs_full", "delta_1pct_bytes_vs_full", "delta_1pct_lookup512_vs_full"),
    lookups: (
        "lookup512_vs_fbgemm", "lookup512_vs_index_select", "index_lookup_vs_sorted_array", "lookup512_vs_redis_mget",
        "redis_packed_lookup512", "lookup512_vs_feast_redis", "get_online_features512_vs_feast_redis",
    ),
    bytes_per_row: (
        "bytes_per_row_segment", "bytes_per_row_redis", "bytes_per_row_vs_feast_redis",
        "bytes_per_row_segment_larger_table", "bytes_per_row_redis_larger_table",
    ),
}
"""What is measured together, and the names of its results."""


@click.command()
@click.option(
    "--only", type=click.Choice([name for names in GROUPS.values() for name in names]), multiple=True,
    help="Measure this result (and those measured with it); others in the file stay. May be repeated.",
)
@click.option("--rows", type=click.IntRange(min=1), help="No table larger than this.")
@click.option("--quick", is_flag=True, help="Tiny tables: whether it runs, not how fast.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("reports/bench/publish.json"),
    show_default=True,
)
@click.option(
    "--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where to put some GiB meanwhile."
)
def main(only: tuple[str, ...], rows: int | None, quick: bool, output: Path, scratch: Path | None) -> None:
    """Measure publishing against its rivals."""
    logging.getLogger("feast").setLevel(logging.ERROR)  # it warns of context views, which have no rows here
    sizes = QUICK if quick else FULL
    if rows:
        sizes = sizes.at_most(rows)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="facet-bench-", dir=scratch) as directory:
        bench = Bench(sizes, Path(directory))
        for group, names in GROUPS.items():
            if not only or set(only) & set(names):
                measured = list(group(bench))
                write_results(output, measured)  # at once: a later group may fail
                results += measured
    click.echo(show(results))
    click.echo(f"\n{output}")


if __name__ == "__main__":
    main(standalone_mode=False)
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's teardown, in which DuckDB prints pages about objects that Feast keeps open
