"""`facet serve ranker`: scores, by the model of the version that the rows come from."""

import click

from online.commands.serve_options import ADMIN_PORT, HOST, PORT, THREADS, VERSIONS, current_version, pins_of
from pipelines.contracts.workspace import Workspace

__all__ = ["ranker"]


@click.command()
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
        lambda version: Scorer.load(workspace, version, device=chosen), pin=pins_of(workspace, "ranker", endpoint)
    )
    wanted = versions or current_version(workspace)
    for version in wanted:
        models.load(version)
    context = FeastContext(workspace.feature_repo, models.pin()[wanted[0]].context)
    service = RankService(models, lookup, context, max_candidates=max_candidates, timeout_s=timeout)
    rank_pb2_grpc.add_RankServicer_to_server(service, endpoint.server)
    admin_pb2_grpc.add_RankerAdminServicer_to_server(RankerAdminService(models), admin.server)
    serve_until_stopped([endpoint, admin], lambda: {"role": "ranker", "versions": list(wanted), "device": chosen})
    models.close()
