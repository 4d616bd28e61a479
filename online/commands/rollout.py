"""`facet rollout`: a new version on all hosts, under traffic."""

import os

import click

from pipelines.contracts.freshness import FreshnessLimits
from pipelines.contracts.workspace import Workspace

__all__ = ["rollout"]

os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@click.command()
@click.option("--to", required=True, type=click.IntRange(1), help="The version: published, materialized.")
@click.option(
    "--cpu-tier", "cpu_tiers", required=True, multiple=True, metavar="HOST:PORT",
    help="Admin address of a CPU host; repeat it for every one.",
)
@click.option(
    "--ranker", "rankers", required=True, multiple=True, metavar="HOST:PORT",
    help="Admin address of a ranker; repeat it for every one.",
)
@click.option(
    "--pause", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Seconds between phases, to watch the new version before the old one is retired.",
)
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
@click.pass_obj
def rollout(
    workspace: Workspace, to: int, cpu_tiers: tuple[str, ...], rankers: tuple[str, ...], pause: float, warn_days: int,
    refuse_days: int, force_stale: bool,
) -> None:
    """Roll a version out in three phases: upper models, rows and routing, retirement of the old.

    Every host that serves must be named: the invariant is that a version which any CPU host can answer is loaded on
    every ranker, and it is checked before each step. Progress lies in <workspace>/rollout/state.json; after a crash or
    a failed step, run the same command again and it goes on.
    """
    from online.rollout import Rollout

    plan = Rollout.begin_or_resume(
        workspace, to, cpu_tiers=cpu_tiers, rankers=rankers,
        limits=FreshnessLimits(warn_days, refuse_days, force_stale),
    )
    done = sum(step.finished is not None for step in plan.steps)
    head = f"resuming the rollout to version {to}, {done} of" if plan.resumed else f"rollout to version {to},"
    click.echo(f"{head} {len(plan.steps)} steps, from {plan.old or 'nothing'}")
    for step, seconds in plan.walk(pause_s=pause):
        click.echo(f"{step.finished}  {step}  {seconds * 1e3:.0f} ms")
    click.echo(f"version {to} is served everywhere; timeline: {plan.timeline}")
