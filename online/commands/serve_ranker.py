"""`facet serve ranker`: scores, by the model of the version that the rows come from."""

import click

from online.commands.logging_options import logging_options
from online.commands.security_options import cpu_tier_security
from online.commands.serve_options import VERSIONS, current_version, listens
from pipelines.contracts.workspace import Workspace

__all__ = ["ranker"]

LOCAL = "local"


@click.command()
@VERSIONS
@click.option(
    "--name", help="What this ranker is called, such as ranker-1. A ranker with a name comes back with the models it "
    "had when it was stopped or killed: --versions then counts only the first time.",
)
@click.option(
    "--cpu-tier", "cpu_tiers", required=True, multiple=True, metavar="[I/N=]HOST:PORT|local",
    help="Where rows come from. Repeat for replicas; I/N= says that a host has part I of N of the ids. `local`: from "
    "segments on this machine, mapped into this process.",
)
@click.option(
    "--lookup-connections", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Connections to each CPU host; with one, all of this ranker's lookups go to one of its workers.",
)
@click.option(
    "--rows", show_default="as feature_store.yaml says",
    help="For `--cpu-tier local`: where the rows were materialized to, as for `facet serve cpu-tier`.",
)
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
@listens(
    slots=8, queue=16,
    slots_help="Requests worked on at a time. Those that meet share a read of context and a pass of the model.",
)
@cpu_tier_security
@logging_options
@click.pass_obj
def ranker(
    workspace: Workspace, versions: tuple[int, ...] | None, name: str | None, cpu_tiers: tuple[str, ...],
    lookup_connections: int, rows: str | None, device: str, timeout: float, max_candidates: int, listening,
    client_security,
) -> None:
    """Score candidates with the upper model of exactly the version their rows come from.

    Context features are read from the online store of the Feast repository beside the workspace. It says that it is
    ready when its models are loaded and warm and a first request has been tried.

    \b
      facet serve ranker --port 7080 --admin-port 7081 --name ranker-1 --cpu-tier 127.0.0.1:7070
      facet serve ranker … --cpu-tier 127.0.0.1:7070 --cpu-tier 127.0.0.1:7072           two replicas
      facet serve ranker … --cpu-tier 0/2=127.0.0.1:7070 --cpu-tier 1/2=127.0.0.1:7072   tables in two parts
      facet serve ranker … --cpu-tier local                                              rows and models in one process

    With `local`, the admin port answers for both: give it to `facet rollout` as --cpu-tier and as --ranker.
    """
    local = LOCAL in cpu_tiers
    if local and len(cpu_tiers) > 1:
        raise click.BadParameter("`local` stands alone", param_hint="--cpu-tier")
    if rows and not local:
        raise click.BadParameter("only for `--cpu-tier local`; elsewhere it is the CPU tier's", param_hint="--rows")

    from online.host_state import HostMemory
    from online.ranking.host import RankHost

    RankHost(
        workspace=workspace, listening=listening, cpu_tiers=() if local else cpu_tiers,
        lookup_connections=lookup_connections, rows=rows, device=device, timeout_s=timeout,
        max_candidates=max_candidates, client_security=client_security,
        memory=HostMemory(workspace, name).claimed() if name else None,
        rows_memory=HostMemory(workspace, f"{name}.rows") if name and local else None,
    ).serve(versions or current_version(workspace))
