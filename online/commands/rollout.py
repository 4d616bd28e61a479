"""`facet rollout`: a new version on all hosts, under traffic, forwards or back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from online.commands.security_options import client_security
from pipelines.contracts.errors import FacetError, InvalidConfig
from pipelines.contracts.freshness import FreshnessLimits
from pipelines.contracts.workspace import Workspace

if TYPE_CHECKING:
    from online.rollout.controller import Rollout
    from online.security.credentials import ClientSecurity

__all__ = ["rollout"]


@click.command()
@click.option("--to", type=click.IntRange(1), help="The version: published, materialized.")
@click.option(
    "--cpu-tier", "cpu_tiers", multiple=True, metavar="HOST:PORT",
    help="Admin address of a CPU host; repeat it for every one, of all shards and replicas.",
)
@click.option(
    "--ranker", "rankers", multiple=True, metavar="HOST:PORT",
    help="Admin address of a ranker; repeat it for every one.",
)
@click.option("--dry-run", is_flag=True, help="Print the steps, what holds already and the invariant; change nothing.")
@click.option("--back", is_flag=True, help="Take the unfinished rollout back.")
@click.option(
    "--pause", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Seconds between phases, to watch the new version before the old one is retired.",
)
@click.option(
    "--patience", type=click.FloatRange(0), default=30.0, show_default=True,
    help="Seconds that a host may be away, such as one that restarts, before the rollout stops.",
)
@click.option(
    "--change-hosts", is_flag=True, help="Go on with the hosts named now, not those that the rollout was begun with.",
)
@click.option(
    "--canary", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
    help="First try the version on this share of the requests, such as 0.05. A rollout that goes on keeps its own.",
)
@click.option(
    "--canary-seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="At least so long."
)
@click.option(
    "--canary-requests", type=click.IntRange(1), default=200, show_default=True,
    help="And until each version has answered so many; halts when they do not come in ten times --canary-seconds.",
)
@click.option(
    "--max-failures", type=click.FloatRange(0, 1, max_open=True), default=0.01, show_default=True,
    help="Share of failed requests that halts the canary.",
)
@click.option(
    "--max-slower", type=click.FloatRange(0, min_open=True), default=1.5, show_default=True,
    help="Halt it when its p95 in the ranker is more than so many times the old version's.",
)
@click.option("--no-rollback", is_flag=True, help="Stop where a canary halts, in place of taking it back.")
@click.option(
    "--pretraining-warn-days", "warn_days", type=int, default=FreshnessLimits.warn_days, show_default=True,
    envvar=FreshnessLimits.WARN_VARIABLE, show_envvar=True,
    help="Warn when the version's fine-tuning data starts more days than this after its pretraining data ends.",
)
@click.option(
    "--pretraining-refuse-days", "refuse_days", type=int, default=FreshnessLimits.refuse_days, show_default=True,
    envvar=FreshnessLimits.REFUSE_VARIABLE, show_envvar=True, help="Refuse to begin past so many.",
)
@click.option("--force-stale", is_flag=True, help="Begin past that limit too, with a warning.")
@client_security
@click.pass_obj
def rollout(
    workspace: Workspace, to: int | None, cpu_tiers: Sequence[str], rankers: Sequence[str], dry_run: bool, back: bool,
    pause: float, patience: float, change_hosts: bool, canary: float | None, canary_seconds: float,
    canary_requests: int, max_failures: float, max_slower: float, no_rollback: bool, warn_days: int, refuse_days: int,
    force_stale: bool, security: "ClientSecurity | None",
) -> None:
    """Roll a version out in three phases: upper models, rows and routing, retirement of the old.

    \b
      facet rollout --to 2 --cpu-tier 127.0.0.1:7071 --ranker 127.0.0.1:7081
      facet rollout --to 2 … --canary 0.05          5 % of the requests first; halted and taken back if it is worse
      facet rollout --to 2 … --dry-run              what would be done
      facet rollout                                 go on with the rollout that was interrupted
      facet rollout --back                          take it back, until the old version is being retired

    Every host that serves must be named: the invariant is that a version which any CPU host can answer is loaded on
    every ranker, and it is checked before each step. Progress lies in <workspace>/rollout/state.json; after a crash or
    a failed step, run the same command again and it goes on. A host that restarts is waited for; what it has lost is
    loaded there again. Only one controller works at a time.

    A canary passes when its share of failed requests is within --max-failures (those that failed before any version
    was known are all counted as its own) and its p95 within --max-slower times the old version's, over at least
    --canary-seconds and --canary-requests; it is halted before that as soon as either is surely exceeded. The counts
    are the rankers' own. Exit status 2 when the version is not served everywhere.
    """
    from online.rollout.canary import CanaryLimits
    from online.rollout.controller import Rollout

    if back:
        plan = Rollout.take_back(workspace, security=security)
    else:
        if to is None or not (cpu_tiers and rankers):
            to, cpu_tiers, rankers = _as_begun(workspace, to, cpu_tiers, rankers)
        limits = canary and CanaryLimits(canary, canary_seconds, canary_requests, max_failures, max_slower)
        plan = Rollout.begin_or_resume(
            workspace, to, cpu_tiers=cpu_tiers, rankers=rankers, canary=limits, change_hosts=change_hosts, dry=dry_run,
            limits=FreshnessLimits(warn_days, refuse_days, force_stale), patience_s=patience, security=security,
        )
    if dry_run:
        _preview(plan, security)
        return
    state = plan.state
    if back or state.plan.turned:
        click.echo(f"taking back the rollout to version {state.plan.to}, to version {state.plan.source}")
    else:
        head = f"rollout to version {state.plan.to},"
        if state.resumed:
            head = f"resuming the rollout to version {state.plan.to}, {state.done} of"
        click.echo(f"{head} {len(state.records)} steps, from {state.old or 'nothing'}")
    walk = plan.walk(pause_s=pause, patience_s=patience, rollback=not no_rollback, say=click.echo)
    try:
        for record, seconds in walk:
            click.echo(f"{record.finished}  {record.step}  {seconds * 1e3:.0f} ms")
    except FacetError:
        click.echo(f"stopped; see `facet status`, and {plan.state.path}", err=True)
        raise
    state = plan.state
    served = state.plan.source if state.plan.turned else state.plan.to
    click.echo(f"version {served} is served everywhere; timeline: {state.timeline}")


def _as_begun(
    workspace: Workspace, to: int | None, cpu_tiers: Sequence[str], rankers: Sequence[str]
) -> tuple[int, Sequence[str], Sequence[str]]:
    """What was not said, as the unfinished rollout has it."""
    from online.rollout.controller import Rollout
    from pipelines.contracts.errors import NotPrepared

    try:
        plan = Rollout.unfinished(workspace).plan
    except NotPrepared as error:
        raise InvalidConfig(
            "options of the rollout", expected="--to, --cpu-tier and --ranker", got="not all of them",
            remedy="Name the version and every host; only a rollout that is under way is remembered.",
        ) from error
    return to or plan.to, cpu_tiers or plan.cpu_tiers, rankers or plan.rankers


def _preview(plan: "Rollout", security: "ClientSecurity | None") -> None:
    from online.rollout.fleet import Fleet
    from online.rollout.plan import preview

    state = plan.state
    fleet = Fleet(state.plan.cpu_tiers, state.plan.rankers, security=security)
    try:
        status = fleet.status()
    finally:
        fleet.close()
    violations = status.violations()
    click.echo(f"invariant: {'; '.join(map(str, violations)) or 'every version a CPU host answers is on every ranker'}")
    for step in state.plan.wanted(status):
        if step.holds(status):
            click.echo(f"holds  {step}")
    for step in preview(state.plan, status):
        click.echo(f"to do  {step}")
