"""`facet load`: traffic against servers that run, measured and verified."""

import json
import os
from pathlib import Path

import click

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.workspace import Workspace

__all__ = ["load"]

os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@click.command()
@click.option("--ranker", metavar="HOST:PORT", help="Rank requests to this ranker, each verified afterwards.")
@click.option("--lookup", metavar="HOST:PORT", help="Or: row lookups to this CPU tier, for their latency alone.")
@click.option("--requests", type=click.IntRange(1), default=5000, show_default=True, help="At least so many requests.")
@click.option("--seconds", type=click.FloatRange(0), default=0.0, show_default=True, help="And at least so long.")
@click.option(
    "--until", type=click.Path(path_type=Path), metavar="FILE",
    help="And at least until this file exists, such as a rollout's timeline.",
)
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Threads.")
@click.option("--candidates", type=click.IntRange(1), default=16, show_default=True, help="Items per rank request.")
@click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Ids per lookup.")
@click.option("--table", help="Table to look up; by default the version's first item table.")
@click.option("--version", type=click.IntRange(1), help="Version whose ids are drawn; by default the current one.")
@click.option(
    "--now", type=click.DateTime(), help="Moment of all requests, UTC; by default the end of that version's data."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Recompute every answer offline.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON there instead.")
@click.pass_obj
def load(
    workspace: Workspace, ranker: str | None, lookup: str | None, requests: int, seconds: float, until: Path | None,
    concurrency: int, candidates: int, batch: int, table: str | None, version: int | None, now, verify: bool, seed: int,
    out: Path | None,
) -> None:
    """Send live traffic and say what came of it, as JSON.

    Users and items are drawn zipfian from a version's ids, with 2 % that no version knows. Nothing is retried: every
    failure counts. Afterwards every score is recomputed offline for the version its answer names: `mixed_version`
    counts the answers that are not that version's, `distinguishable` says for how many a mix would have shown.

    SIGTERM or Ctrl-C ends the rank traffic early; what was sent is verified and reported all the same.
    """
    import dataclasses
    import signal
    import threading
    from datetime import UTC

    from online.load import Population, lookup_latency, rank_traffic

    if (ranker is None) == (lookup is None):
        raise InvalidConfig(
            "target of the load", expected="one of --ranker and --lookup", got="both" if ranker else "neither",
            remedy="Name the server to send requests to.",
        )
    manifest = workspace.versions.manifest(version or workspace.versions.current() or 1)
    population = Population.of_version(workspace, manifest.version, seed=seed)
    common = {"requests": requests, "seconds": seconds, "concurrency": concurrency, "seed": seed}
    if lookup:
        name = table or next(spec.name for spec in manifest.tables if spec.entity == "item")
        manifest.table(name)
        result = lookup_latency(lookup, population, version=manifest.version, table=name, batch=batch, **common)
    else:
        moment = now.replace(tzinfo=UTC) if now else manifest.as_of
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        traffic = rank_traffic(
            ranker, population, candidates=candidates, now_seconds=moment.timestamp(), until=until, stop=stop, **common
        )
        result = {**traffic.summary(), "candidates": candidates, "concurrency": concurrency}
        if verify and traffic.answers:
            result |= dataclasses.asdict(_verified(workspace, traffic))
    text = json.dumps(result, indent=1)
    if out:
        with replacing_file(out) as staging:
            staging.write_text(text)
    else:
        click.echo(text)


def _verified(workspace: Workspace, traffic):
    import torch

    from online.context_source import FeastContext
    from online.verify import verify
    from pipelines.contracts.context import CONTEXT_FEATURES

    torch.set_num_threads(1)
    return verify(workspace, traffic.for_verification(), FeastContext(workspace.feature_repo, CONTEXT_FEATURES))
