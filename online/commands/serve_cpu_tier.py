"""`facet serve cpu-tier`: rows, by version."""

import sys

import click

from online.commands.logging_options import logging_options
from online.commands.serve_options import VERSIONS, current_version, listens
from pipelines.contracts.workspace import Workspace

__all__ = ["cpu_tier"]


@click.command("cpu-tier")
@VERSIONS
@click.option(
    "--name", help="What this host is called, such as cpu-1. A host with a name comes back as what it was when it was "
    "stopped or killed: --versions then counts only the first time.",
)
@click.option(
    "--shard", default="0/1", show_default=True, metavar="I/N",
    help="Answer only ids of part I of N; start N hosts, or N times as many replicas, with one I each.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Processes that answer on the port, over the same pages: about one for every core that lookups may use.",
)
@click.option("--max-ids", type=click.IntRange(1), default=65_536, show_default=True, help="Most ids in one request.")
@click.option(
    "--rows", show_default="as feature_store.yaml says",
    help="Where the rows were materialized to: segments, or redis://HOST:PORT/DB, or unix://SOCKET.",
)
@click.option("--worker", "worker_socket", hidden=True, help="This process is a worker; its admin service's socket.")
@listens(
    slots=4, queue=32,
    slots_help="Requests that a worker answers at a time. More than a few pay only where rows come from Redis.",
)
@logging_options
@click.pass_obj
def cpu_tier(
    workspace: Workspace, versions: tuple[int, ...] | None, name: str | None, shard: str, workers: int, max_ids: int,
    rows: str | None, worker_socket: str | None, listening,
) -> None:
    """Serve rows of materialized versions, each request from one version.

    Every segment is hashed before it is served; of rows in Redis, every value when it is read. With several versions
    the first is preferred until `facet rollout` promotes another.

    \b
      facet serve cpu-tier --port 7070 --admin-port 7071 --name cpu-1 --workers 4
      facet serve cpu-tier --port 7070 --admin-port 7071 --name cpu-1 --shard 0/2     a table too large for one host
    """
    from online.host_state import HostMemory
    from online.lookup.host import CpuHost
    from online.lookup.shards import Shard

    told = CpuHost(
        workspace=workspace, listening=listening, shard=Shard.parse(shard), max_ids=max_ids, rows=rows,
        memory=HostMemory(workspace, name).claimed() if name and not worker_socket else None,
    )
    if worker_socket:
        told.serve_as_worker(worker_socket)
    elif workers == 1:
        told.serve(versions or current_version(workspace))
    else:
        again = [sys.executable, "-P", "-c", "from pipelines.cli import main; main()", *sys.argv[1:]]
        told.serve_with_workers(versions or current_version(workspace), again, workers)
