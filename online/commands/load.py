"""`facet load`: traffic against servers that run, measured and verified."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from online.commands.security_options import client_security
from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.workspace import Workspace

__all__ = ["load"]

REQUESTS = 5000
SWITCH_INTERVAL_S = 0.0005
"""How long one thread may keep another from noting its answer; Python's own 5 ms are longer than most answers take."""


class Rates(click.ParamType):
    """`50` or `50,100,200`: requests a second, one step of the traffic each."""

    name = "R[,R]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(float(part) for part in value.split(","))
        except ValueError:
            rates = ()
        if not rates or not all(0 < rate < 1e6 for rate in rates):
            self.fail(f"expected requests a second such as 50 or 50,100,200, got {value!r}", param, ctx)
        return rates


@click.command()
@click.option(
    "--ranker", "rankers", multiple=True, metavar="HOST:PORT",
    help="Rank requests to this ranker, each verified afterwards. Repeat for several.",
)
@click.option(
    "--lookup", "tiers", multiple=True, metavar="[I/N=]HOST:PORT",
    help="Or: row lookups to this CPU host, for their latency alone. Repeat for replicas and shards.",
)
@click.option("--requests", type=click.IntRange(1), help=f"At least so many; {REQUESTS} unless --rate and --seconds.")
@click.option("--seconds", type=click.FloatRange(0), default=0.0, show_default=True, help="And at least so long.")
@click.option(
    "--until", type=click.Path(path_type=Path), metavar="FILE",
    help="And at least until this file exists, such as a rollout's timeline.",
)
@click.option(
    "--rate", "rates", type=Rates(),
    help="Requests a second of an open loop; several: one step after the other. By default a closed loop.",
)
@click.option(
    "--concurrency", type=click.IntRange(1, 512),
    help="Threads; by default 4, or 64 of an open loop, which needs as many as requests are under way at a time.",
)
@click.option(
    "--think-ms", type=click.FloatRange(0, 60_000), default=0.0, show_default=True,
    help="How long a thread of a closed loop waits before each request.",
)
@click.option("--attempts", type=click.IntRange(1), default=1, show_default=True, help="Tries of a request.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True,
    help="Seconds for a request, tries included.",
)
@click.option("--deadline-ms", type=click.FloatRange(0, min_open=True), help="Answers within it count as goodput.")
@click.option("--candidates", type=click.IntRange(1), default=16, show_default=True, help="Items per rank request.")
@click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Ids per lookup.")
@click.option("--table", help="Table to look up; by default the version's first item table.")
@click.option("--version", type=click.IntRange(1), help="Version whose ids are drawn; by default the current one.")
@click.option("--zipf", type=click.FloatRange(0), default=1.1, show_default=True, help="Exponent of popularity.")
@click.option(
    "--unknown-share", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Of ids no version knows."
)
@click.option(
    "--now", type=click.DateTime(), help="Moment of all requests, UTC; by default the end of that version's data."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Recompute every answer offline.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON there instead.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it there, as SVG.")
@client_security
@click.pass_obj
def load(
    workspace: Workspace, rankers: tuple[str, ...], tiers: tuple[str, ...], requests: int | None, seconds: float,
    until: Path | None, rates: tuple[float, ...] | None, concurrency: int | None, think_ms: float, attempts: int,
    timeout: float, deadline_ms: float | None, candidates: int, batch: int, table: str | None, version: int | None,
    zipf: float, unknown_share: float, now, verify: bool, seed: int, out: Path | None, plot: Path | None, security,
) -> None:
    """Send live traffic and say what came of it, as JSON.

    Users and items are drawn zipfian from a version's ids, with a few that no version knows. Nothing is retried unless
    --attempts says so: every failure counts. Afterwards every score is recomputed offline for the version its answer
    names: `mixed_version` counts the answers that are not that version's, `distinguishable` says for how many a mix
    would have shown.

    \b
    Closed loop: each thread sends its next request when its last was answered, --think-ms later.
    Open loop (--rate): requests arrive at random, R a second, whatever the servers do. Latency counts from when a
    request was due, so that a stall shows in all the requests that it held up; `lag_ms` is how late they were sent.
      facet load --ranker 127.0.0.1:7080 --rate 50,100,200 --seconds 20 --deadline-ms 50 --plot curve.svg

    SIGTERM or Ctrl-C ends the traffic early; what was sent is verified and reported all the same.
    """
    import signal
    import sys
    import threading
    from datetime import UTC

    from online.load.population import Population
    from online.load.traffic import lookup_traffic, rank_traffic

    if bool(rankers) == bool(tiers):
        raise InvalidConfig(
            "target of the load", expected="one of --ranker and --lookup", got="both" if rankers else "neither",
            remedy="Name the servers to send requests to.",
        )
    if rates and think_ms:
        raise InvalidConfig(
            "loop of the load", expected="one of --rate (open) and --think-ms (closed)", got="both",
            remedy="Leave one out.",
        )
    manifest = workspace.versions.manifest(version or workspace.versions.current() or 1)
    population = Population.of_version(
        workspace, manifest.version, seed=seed, unknown_share=unknown_share, zipf_exponent=zipf
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    concurrency = concurrency or (64 if rates else 4)
    loop = {"concurrency": concurrency} | ({} if rates else {"think_ms": think_ms})
    common = {
        "requests": requests or (1 if rates and seconds else REQUESTS), "seconds": seconds, "until": until,
        "concurrency": concurrency, "think_s": think_ms / 1e3, "seed": seed, "attempts": attempts,
        "timeout_s": timeout, "deadline_ms": deadline_ms, "stop": stop, "security": security,
    }
    if tiers:
        name = table or next(spec.name for spec in manifest.tables if spec.entity == "item")
        manifest.table(name)
        about = {"table": name, "version": manifest.version, **loop}

        def step(rate: float | None) -> dict[str, Any]:
            traffic = lookup_traffic(
                tiers, population, version=manifest.version, table=name, batch=batch, rate=rate, **common
            )
            return {**about, **traffic.summary()}
    else:
        moment = now.replace(tzinfo=UTC) if now else manifest.as_of

        def step(rate: float | None) -> dict[str, Any]:
            traffic = rank_traffic(
                rankers, population, candidates=candidates, now_seconds=moment.timestamp(), rate=rate, **common
            )
            verdict = _verified(workspace, traffic) if verify and len(traffic.answers) else {}
            return {**traffic.summary(), "candidates": candidates, **loop, **verdict}

    steps = _steps(step, rates or (None,), stop.is_set)
    text = json.dumps(steps[0] if len(steps) == 1 else {"steps": steps}, indent=1)
    if plot:
        from online.load.plot import plot as draw

        with replacing_file(plot) as staging:
            staging.write_text(draw(steps))
    if out:
        with replacing_file(out) as staging:
            staging.write_text(text)
    else:
        click.echo(text)


def _steps(
    step: Callable[[float | None], dict[str, Any]], rates: tuple[float | None, ...], stopped: Callable[[], bool]
) -> list[dict[str, Any]]:
    """One summary for each rate, in order; at least the first, even when stopped."""
    steps: list[dict[str, Any]] = []
    for rate in rates:
        if steps and stopped():
            break
        steps.append(step(rate))
    return steps


def _verified(workspace: Workspace, traffic) -> dict[str, Any]:
    import dataclasses

    import torch

    from online.ranking.context_source import FeastContext
    from online.ranking.verify import verify
    from pipelines.contracts.context import CONTEXT_FEATURES

    torch.set_num_threads(1)
    context = FeastContext(workspace.feature_repo, CONTEXT_FEATURES)
    return dataclasses.asdict(verify(workspace, traffic.for_verification(), context))
