"""`facet status`: the hosts of a fleet, what they hold, what they answer from, and how far a rollout is."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from online.commands.security_options import client_security
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.workspace import Workspace

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["status"]


@click.command()
@click.option(
    "--cpu-tier", "cpu_tiers", multiple=True, metavar="HOST:PORT", help="Admin address of a CPU host; repeat it."
)
@click.option(
    "--ranker", "rankers", multiple=True, metavar="HOST:PORT", help="Admin address of a ranker; repeat it."
)
@click.option(
    "--interval", type=click.FloatRange(0), default=2.0, show_default=True,
    help="Seconds over which the traffic by version is counted.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the table.")
@client_security
@click.pass_obj
def status(
    workspace: Workspace, cpu_tiers: Sequence[str], rankers: Sequence[str], interval: float, as_json: bool,
    security: "ClientSecurity | None",
) -> None:
    """Show every host's versions, the traffic by version, and the rollout's phase and next step.

    \b
      facet status                                  the hosts of the workspace's last rollout
      facet status --cpu-tier 127.0.0.1:7071 --ranker 127.0.0.1:7081
      facet status --json | jq .traffic

    Counts and percentiles are the servers' own since they started. A host that does not answer is shown as such. Exit
    status 1 if a CPU host can answer a version that some ranker cannot run; 3 if nobody can tell, because a host did
    not answer or no host of one kind was named.
    """
    import time

    from online.rollout.fleet import Fleet
    from online.rollout.state import RolloutState
    from online.rollout.view import render, view

    state = RolloutState.read(RolloutState.path_in(workspace))
    if not (cpu_tiers or rankers):
        if state is None:
            raise InvalidConfig(
                "hosts to ask", expected="--cpu-tier and --ranker", got="neither, and no rollout in this workspace",
                remedy="Name the admin addresses of the hosts.",
            )
        cpu_tiers, rankers = state.plan.cpu_tiers, state.plan.rankers
    fleet = Fleet(cpu_tiers, rankers, security=security)
    try:
        began, before = time.perf_counter(), fleet.ask()
        time.sleep(interval)
        now = fleet.ask()
        shown = view(before, now, time.perf_counter() - began, state)
    finally:
        fleet.close()
    click.echo(json.dumps(shown, indent=1) if as_json else render(shown))
    if shown["invariant"]:
        raise SystemExit(1)
    if shown["unseen"]:
        raise SystemExit(3)
