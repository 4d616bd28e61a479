"""`make chaos`: requests, rollouts and SIGKILLs at once, and every answer recomputed offline.

```
python -m tests.benchmarks.chaos                                         a million requests, 25 to 100 minutes
python -m tests.benchmarks.chaos --requests 20000 --rollouts 3           a shorter series
python -m tests.benchmarks.chaos --seed N                                the kills of an earlier series, as far as
                                                                         the machine lets time repeat itself
```

```
24 threads of requests ──► rankers ──► CPU hosts (shards x replicas)      one process each; versions 1, 2, 3
                              ▲            ▲
facet rollout 2, 3, 1, 2 … ───┤            │          killed at random: any host that has a living twin, and the
                              │            │          controller; brought back at once with the same command line.
                              │            │          One in five of the hosts is frozen for a moment instead
hostile clients ──────────────┴────────────┘          silent, unread, junk: all the while, at every port
```
"""

import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch

from online.load.population import Population
from online.load.traffic import RankTraffic, rank_traffic
from online.ranking.context_source import FeastContext
from online.ranking.verify import verify
from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.durable import replacing_file
from pipelines.publish import publish
from tests.benchmarks.harness import environment
from tests.fleet import Fleet, Host
from tests.hostile import HostileClients
from tests.releases import AS_OF, FeastRepository, entity_ids, write_context_views, write_release

__all__ = ["Chaos", "main", "published_versions"]

log = logging.getLogger(__name__)

VERSIONS = (1, 2, 3)
ATTEMPTS, TIMEOUT_S = 100, 120.0
"""How often, and how long in all, a client tries one request. A ranker takes some ten seconds to come back; beside a
test suite it took more than 20, and requests failed for want of a processor. The report says how long answers took."""
MOST_TRIES_OF_A_ROLLOUT = 50
FROZEN_SHARE, MOST_FROZEN_S = 0.2, 3.0
"""Of what happens to hosts: being frozen instead of killed, and for how long."""


def published_versions(root: Path, *, rows: int) -> FeastRepository:
    """A repository with versions 1 to 3, published, applied and materialized, and context for every id."""
    repository = FeastRepository.create(root)
    for version in VERSIONS:
        as_of = AS_OF + timedelta(days=version - 1)
        release = write_release(root / f"release{version}", seed=version, rows=rows, as_of=as_of)
        publish(repository.workspace, release, parents=(version - 1,) if version > 1 else ())
    write_context_views(repository.workspace, entity_ids("user", rows), entity_ids("item", rows))
    repository.apply()
    repository.materialize()
    return repository


@dataclass
class Chaos:
    """One series over a fleet that runs.

    Attributes:
        requests, rollouts, kills: how many at least; the series goes on until all are reached.
        kill_every_s: mean time between kills, where hosts come back sooner.
        think_s: how long each of `concurrency` clients waits before a request.
        killed: what was killed, in order: `controller` or a host's name.
        frozen: hosts that were stopped for a moment with all their connections open.
        rolled: the finished rollouts, in order: to which version, how many times its controller was killed, seconds.
        hostile: what hostile clients did, by kind.
    """

    fleet: Fleet
    requests: int
    rollouts: int
    kills: int
    kill_every_s: float
    seed: int
    concurrency: int = 24
    think_s: float = 0.0
    candidates: int = 4
    killed: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    rolled: list[dict[str, Any]] = field(default_factory=list)
    hostile: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._over = threading.Event()
        self._away: set[str] = set()
        self._came_back_s = 0.0  # how long the latest took
        self._coming_back: list[threading.Thread] = []
        self._controller: subprocess.Popen | None = None
        self._errors: list[BaseException] = []

    def run(self, directory: Path) -> RankTraffic:
        """All of it at once; returns what became of every request. Raises what went wrong beside the traffic."""
        enough, manifest = directory / "enough", self.fleet.workspace.versions.manifest(1)
        works = [self._roll_out_again_and_again, self._kill_again_and_again, lambda: self._say_when(enough)]
        threads = [threading.Thread(target=self._guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        population = Population.of_version(self.fleet.workspace, 1, seed=self.seed)
        ports = [address for host in self.fleet.hosts for address in (host.address, host.admin)]
        hostile = HostileClients(ports, versions=VERSIONS, seed=self.seed)
        self.hostile = hostile.done
        try:
            with hostile:
                return rank_traffic(
                    [ranker.address for ranker in self.fleet.rankers], population,
                    requests=self.requests, seconds=0, concurrency=self.concurrency, think_s=self.think_s,
                    candidates=self.candidates, now_seconds=manifest.as_of.timestamp(), seed=self.seed, until=enough,
                    stop=self._over, attempts=ATTEMPTS, timeout_s=TIMEOUT_S,
                )
        finally:
            self._over.set()
            for thread in threads:  # the killer first, which starts those that come back
                thread.join()
            for thread in self._coming_back:
                thread.join()
            if self._errors:
                raise self._errors[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
            self._over.set()

    def _say_when(self, enough: Path) -> None:
        while not self._over.wait(0.2):
            if len(self.rolled) >= self.rollouts and len(self.killed) >= self.kills:
                enough.touch()

    # -- rollouts -------------------------------------------------------------------------------------------------

    def _roll_out_again_and_again(self) -> None:
        for to in cycle((*VERSIONS[1:], VERSIONS[0])):
            if self._over.wait(self._random.uniform(0, 2 * self.kill_every_s)):
                return
            began, killed = time.monotonic(), 0
            for _ in range(MOST_TRIES_OF_A_ROLLOUT):
                self._controller = self.fleet.rollout(to)
                said, _ = self._controller.communicate()
                if self._controller.returncode == 0:
                    break
                killed += self._controller.returncode < 0
                log.info("rollout to %d: exit status %d: %s", to, self._controller.returncode, said[-300:])
                if self._over.is_set():
                    return
            else:
                raise RuntimeError(f"the rollout to version {to} never ended: {said[-3000:]}")
            seconds = round(time.monotonic() - began, 1)
            self.rolled.append({"to": to, "controller_killed": killed, "seconds": seconds})
            log.info("version %d rolled out in %.0f s", to, seconds)

    # -- kills ----------------------------------------------------------------------------------------------------

    def _kill_again_and_again(self) -> None:
        # On a slow machine hosts would die faster than they come back, and no rollout would ever find all of them.
        while not self._over.wait(self._random.expovariate(1 / max(self.kill_every_s, self._came_back_s))):
            victim = self._random.choice(["controller", *self.fleet.hosts])
            if victim == "controller":
                if self._controller and self._controller.poll() is None:
                    self._controller.kill()
                    self.killed.append("controller")
            elif self._has_a_living_twin(victim):
                self._away.add(victim.name)
                if self._random.random() < FROZEN_SHARE:
                    self.frozen.append(victim.name)
                    self._aside(lambda host=victim: self._freeze(host))
                else:
                    victim.kill()
                    self.killed.append(victim.name)
                    self._aside(lambda host=victim: self._bring_back(host))

    def _has_a_living_twin(self, host: Host) -> bool:
        """Whether somebody else answers what this host does; with nobody left, no system could."""
        if host.name in self._away:
            return False
        twins = [other for other in self.fleet.hosts if (other.role, other.shard) == (host.role, host.shard)]
        return any(twin is not host and twin.name not in self._away for twin in twins)

    def _aside(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,))
        thread.start()
        self._coming_back.append(thread)

    def _freeze(self, host: Host) -> None:
        host.freeze(self._random.uniform(0.2, MOST_FROZEN_S))
        self._away.discard(host.name)

    def _bring_back(self, host: Host) -> None:
        began = time.monotonic()
        host.start().wait_ready()
        self._came_back_s = time.monotonic() - began
        self._away.discard(host.name)


def report(chaos: Chaos, traffic: RankTraffic) -> dict[str, Any]:
    """What `reports/bench/chaos.json` holds; every answer is recomputed here."""
    torch.set_num_threads(2)
    workspace, summary = chaos.fleet.workspace, traffic.summary()
    verdict = verify(workspace, traffic.for_verification(), FeastContext(workspace.feature_repo, CONTEXT_FEATURES))
    return {
        "requests": summary["requests"],
        "rollouts": len(chaos.rolled),
        "kills": len(chaos.killed),
        "mixed": verdict.mixed_version,
        "failed": summary["failed"],
        "wrong_scores": verdict.wrong_scores,
        "recomputed": asdict(verdict),
        "kills_by_victim": dict(Counter(chaos.killed)),
        "freezes": len(chaos.frozen),
        "hostile": dict(chaos.hostile),
        "controllers_killed_on_the_way": sum(rollout["controller_killed"] for rollout in chaos.rolled),
        "rolled_out": chaos.rolled,
        "failures": summary["failures"],
        "first_failures": summary["first_failures"],
        "versions_seen": summary["versions_seen"],
        "latency_ms": summary["latency_ms"],
        "requests_per_s": summary["requests_per_s"],
        "wall_s": summary["wall_s"],
        "conditions": {
            "cpu_tiers": [tier.target for tier in chaos.fleet.cpu_tiers], "rankers": len(chaos.fleet.rankers),
            "concurrency": chaos.concurrency, "candidates": chaos.candidates, "seed": chaos.seed,
            "kill_every_s": chaos.kill_every_s, "attempts": ATTEMPTS, "timeout_s": TIMEOUT_S, **environment(),
        },
    }


def series(
    directory: Path, *, requests: int, rollouts: int, kills: int, kill_every_s: float, shards: int, seed: int,
    rows: int = 2000, concurrency: int = 24, think_s: float = 0.0,
) -> dict[str, Any]:
    """Publish, serve, do it all at once, recompute; returns the report."""
    repository = published_versions(directory, rows=rows)
    with Fleet(repository.workspace, logs=directory / "logs", shards=shards, replicas=2, rankers=2) as fleet:
        chaos = Chaos(
            fleet, requests=requests, rollouts=rollouts, kills=kills, kill_every_s=kill_every_s, seed=seed,
            concurrency=concurrency, think_s=think_s,
        )
        traffic = chaos.run(directory)
    return report(chaos, traffic)


@click.command()
@click.option("--requests", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--rollouts", type=click.IntRange(1), default=10, show_default=True, help="At least so many.")
@click.option("--kills", type=click.IntRange(0), default=100, show_default=True, help="At least so many.")
@click.option(
    "--kill-every", type=click.FloatRange(0.1), default=8.0, show_default=True,
    help="Mean seconds; more where hosts take longer to come back.",
)
@click.option("--shards", type=click.IntRange(1), default=1, show_default=True, help="Each on two CPU hosts.")
@click.option("--seed", type=int, help="By default another one each time; it is in the report.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("reports/bench/chaos.json"),
    show_default=True,
)
def main(
    requests: int, rollouts: int, kills: int, kill_every: float, shards: int, seed: int | None, output: Path
) -> None:
    """Kill, roll out and ask, all at once; then recompute every answer. Exit status 1 if one was mixed or failed,
    or if versions were so alike that nobody could tell."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("feast").setLevel(logging.ERROR)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="facet-chaos-") as directory:
        result = series(
            Path(directory), requests=requests, rollouts=rollouts, kills=kills, kill_every_s=kill_every,
            shards=shards, seed=seed,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(output) as staging:
        staging.write_text(json.dumps(result, indent=1) + "\n")
    short = (
        "requests", "rollouts", "kills", "mixed", "failed", "wrong_scores", "kills_by_victim", "freezes", "hostile",
        "requests_per_s",
    )
    click.echo(json.dumps({key: result[key] for key in short}, indent=1))
    could_tell = result["recomputed"]["distinguishable"] == result["recomputed"]["checked"]
    sys.exit(any(result[key] for key in ("mixed", "failed", "wrong_scores")) or not could_tell)


if __name__ == "__main__":
    main()
