"""`make bench-online`: what it costs that rows live on another host, against having them at hand and against Feast.

```
python -m tests.benchmarks.online                                    everything, 20 to 45 minutes
python -m tests.benchmarks.online --only lookup512_p50_vs_grpc_echo  one result and those measured with it
python -m tests.benchmarks.online --before ../before                 and against the code of an earlier commit there
python -m tests.benchmarks.online --quick                            small and short: whether it runs, not how fast
```
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from tests.benchmarks.before import EarlierFleets
from tests.benchmarks.harness import Result, show, write_results
from tests.benchmarks.lookup_rpc import against_echo, against_feast_server
from tests.benchmarks.overload import at_three_times_capacity
from tests.benchmarks.ranking import fetch_against_feast, rank_against_before, rank_against_local, rank_bare
from tests.benchmarks.serving import FULL, QUICK, Serving

__all__ = ["GROUPS", "main"]

GROUPS: dict[Callable[[Serving], Iterator[Result]], tuple[str, ...]] = {
    rank_against_local: (
        "rank500_p50_vs_local", "rank500_p99_vs_local", "rank500_pinned_p50_vs_local", "rank500_pinned_p99_vs_local",
    ),
    rank_against_before: ("rank500_p50_vs_before", "rank500_p99_vs_before"),
    rank_bare: ("rank500_bare_p50_vs_local", "rank500_bare_p99_vs_local"),
    fetch_against_feast: ("fetch500_vs_feast_redis",),
    against_echo: (
        "lookup512_p50_vs_grpc_echo", "lookup512_p99_vs_grpc_echo",
        "lookup512_p50_socket_vs_grpc",
    ),
    against_feast_server: ("lookup_rows_per_s_vs_feast_server", "lookup_rows_per_s_socket_vs_grpc"),
    at_three_times_capacity: ("goodput_at_3x", "goodput_at_3x_pinned"),
}
"""What is measured together, and the names of its results."""


@click.command()
@click.option(
    "--only", type=click.Choice([name for names in GROUPS.values() for name in names]), multiple=True,
    help="Measure this result (and those measured with it); others in the file stay. May be repeated.",
)
@click.option("--quick", is_flag=True, help="Small tables, few calls: whether it runs, not how fast.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("reports/bench/online.json"),
    show_default=True,
)
@click.option(
    "--before", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="WORKTREE",
    help="Compare ranking with the code of an earlier commit, checked out there by `git worktree add`.",
)
@click.option("--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where to put files.")
def main(only: tuple[str, ...], quick: bool, output: Path, before: Path | None, scratch: Path | None) -> None:
    """Measure serving against its rivals."""
    logging.getLogger("feast").setLevel(logging.ERROR)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="facet-bench-", dir=scratch) as directory, ExitStack() as stack:
        serving = Serving(QUICK if quick else FULL, Path(directory), stack)
        if before:
            (earlier := Path(directory) / "before").mkdir()
            serving.before = EarlierFleets(before, "QUICK" if quick else "FULL", earlier)
            stack.callback(serving.before.close)
        for group, names in GROUPS.items():
            if not only or set(only) & set(names):
                measured = list(group(serving))
                write_results(output, measured)  # at once: a later group may fail
                results += measured
    click.echo(show(results))
    click.echo(f"\n{output}")


if __name__ == "__main__":
    main(standalone_mode=False)
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's teardown, in which DuckDB prints pages about objects that Feast keeps open
