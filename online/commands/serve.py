"""`facet serve`: the two servers, each a process of its own."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.workspace import Workspace

if TYPE_CHECKING:
    from online.server import Endpoint

__all__ = ["serve"]

# gRPC's own log repeats on stderr what our errors say.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


class VersionList(click.ParamType):
    """`1` or `1,2`: positive integers, in the order in which they are to be loaded."""

    name = "N[,N]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            versions = tuple(int(part) for part in value.split(","))
        except ValueError:
            versions = ()
        if not versions or min(versions) < 1:
            self.fail(f"expected version numbers such as 1 or 1,2, got {value!r}", param, ctx)
        return versions


VERSIONS = click.option(
    "--versions", type=VersionList(), default=None, help="Versions to load; by default the current one."
)
HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
PORT = click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any free port.")
ADMIN_PORT = click.option(
    "--admin-port", type=click.IntRange(0, 65535), default=0, show_default=True,
    help="Port of the admin service, which `facet rollout` speaks to. 0: any free port.",
)
THREADS = click.option("--threads", type=click.IntRange(1, 256), default=8, show_default=True, help="Request threads.")


@click.group()
def serve() -> None:
    """Answer requests: a CPU tier that holds rows, a ranker that scores.

    \b
    Each prints one JSON line when it is ready, with the ports it took:
      facet serve cpu-tier --port 50051 --admin-port 50052 --versions 1
      facet serve ranker --port 50061 --admin-port 50062 --versions 1 --cpu-tier 127.0.0.1:50051

    Both speak gRPC (online/proto/*.proto) with the standard health service, on loopback unless told otherwise, and stop
    on SIGTERM or Ctrl-C after the requests under way.
    """


@serve.command("cpu-tier")
@HOST
@PORT
@ADMIN_PORT
@VERSIONS
@THREADS
@click.option("--max-ids", type=click.IntRange(1), default=65_536, show_default=True, help="Most ids in one request.")
@click.option(
    "--rows", show_default="as feature_store.yaml says",
    help="Where the rows were materialized to: segments, or redis://HOST:PORT/DB, or unix://SOCKET.",
)
@click.pass_obj
def cpu_tier(
    workspace: Workspace, host: str, port: int, admin_port: int, versions: tuple[int, ...] | None, threads: int,
    max_ids: int, rows: str | None,
) -> None:
    """Serve rows of materialized versions, each request from one version.

    Every segment is hashed before it is served; of rows in Redis, every value when it is read. With several versions
    the first is preferred until `facet rollout` promotes another.
    """
    from online.cpu_tier import CpuTierAdminService, HostedVersions, LookupService
    from online.proto import admin_pb2_grpc, lookup_pb2_grpc
    from online.reader import VersionReader
    from online.server import Endpoint, serve_until_stopped

    endpoint, admin = Endpoint("lookup", host, port, threads), Endpoint("admin", host, admin_port, 2)
    hosted = HostedVersions(
        lambda version: VersionReader.open(workspace, version, rows=rows), pin=_pin(workspace, "cpu-tier", endpoint)
    )
    wanted = versions or _current(workspace)
    for version in wanted:
        hosted.load(version)
    hosted.promote(wanted[0])
    lookup_pb2_grpc.add_LookupServicer_to_server(LookupService(hosted, max_ids=max_ids), endpoint.server)
    admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted), admin.server)
    serve_until_stopped([endpoint, admin], lambda: {"role": "cpu-tier", "versions": list(wanted)})
    hosted.close()


@serve.command()
@HOST
@PORT
@ADMIN_PORT
@VERSIONS
@THREADS
@click.option("--cpu-tier", "cpu_tiers", required=True, multiple=True, metavar="HOST:PORT", help="Repeat for replicas.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where rows are dequantized and scored; auto is CUDA when there is one.",
)
@click.option(
    "--timeout", type=float, default=2.0, show_default=True, help="Seconds to wait for rows, retries included."
)
@click.option(
    "--max-candidates", type=click.IntRange(1), default=4096, show_default=True, help="Most candidates in one request."
)
@click.pass_obj
def ranker(
    workspace: Workspace, host: str, port: int, admin_port: int, versions: tuple[int, ...] | None, threads: int,
    cpu_tiers: tuple[str, ...], device: str, timeout: float, max_candidates: int,
) -> None:
    """Score candidates with the upper model of exactly the version their rows come from.

    Context features are read from the online store of the Feast repository beside the workspace.
    """
    from online.client import LookupClient
    from online.proto import admin_pb2_grpc, rank_pb2_grpc
    from online.server import Endpoint, serve_until_stopped

    endpoint, admin = Endpoint("rank", host, port, threads), Endpoint("admin", host, admin_port, 2)
    lookup = LookupClient(cpu_tiers, timeout_s=timeout)

    import torch

    from online.context_source import FeastContext
    from online.ranker import RankerAdminService, RankService, RunnableModels
    from online.scorer import Scorer, best_device

    torch.set_num_threads(1)  # requests are the parallelism
    chosen = best_device() if device == "auto" else device
    models = RunnableModels(
        lambda version: Scorer.load(workspace, version, device=chosen), pin=_pin(workspace, "ranker", endpoint)
    )
    wanted = versions or _current(workspace)
    for version in wanted:
        models.load(version)
    context = FeastContext(workspace.feature_repo, models.pin()[wanted[0]].context)
    service = RankService(models, lookup, context, max_candidates=max_candidates, timeout_s=timeout)
    rank_pb2_grpc.add_RankServicer_to_server(service, endpoint.server)
    admin_pb2_grpc.add_RankerAdminServicer_to_server(RankerAdminService(models), admin.server)
    serve_until_stopped([endpoint, admin], lambda: {"role": "ranker", "versions": list(wanted), "device": chosen})
    models.close()


def _pin(workspace: Workspace, role: str, endpoint: "Endpoint") -> Callable[[int], AbstractContextManager]:
    address = f"{endpoint.host}:{endpoint.port}"
    return lambda version: workspace.versions.pinned(version, role=role, address=address)


def _current(workspace: Workspace) -> tuple[int, ...]:
    current = workspace.versions.current()
    if current is None:
        raise VersionNotFound(
            "no version to serve", expected="a published version", got="none in this workspace",
            remedy="`facet publish` one, or give --versions or another --workspace.",
        )
    return (current,)
