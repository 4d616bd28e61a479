"""`make soak`: a quarter of an hour of everything at once; no process may grow.

```
python -m tests.benchmarks.soak                 15 minutes
python -m tests.benchmarks.soak --minutes 1     shorter: says less
```

Ranking and lookups from several threads, broken requests among them, hostile clients at every port, and one rollout
after another; meanwhile memory that no file backs and open descriptors of every process are noted. A process has grown
if the median of its last third lies above that of its second third by more than the bound: what fills up once, such as
a cache or an arena of the allocator, has done so by then.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np

from online.lookup.client import LookupClient
from online.ranking.client import RankClient
from online.rpc_error import Code, RpcError
from pipelines.contracts.durable import replacing_file
from tests.benchmarks.chaos import VERSIONS, published_versions
from tests.benchmarks.harness import environment
from tests.fleet import Fleet, anonymous_bytes, descriptors
from tests.hostile import HostileClients
from tests.releases import AS_OF, entity_ids

__all__ = ["main", "soak"]

ROWS = 2000
GROWTH_BYTES, GROWTH_DESCRIPTORS = 16 << 20, 4
"""What the allocator may keep between two thirds, and connections that come and go with rollouts."""


@dataclass
class Noted:
    """What was seen of each process, by its host's name and its number among the host's processes."""

    bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    descriptors: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def look(self, fleet: Fleet) -> None:
        for host in fleet.hosts:
            for number, pid in enumerate(host.pids):
                self.bytes[f"{host.name}/{number}"].append(anonymous_bytes(pid))
                self.descriptors[f"{host.name}/{number}"].append(descriptors(pid))

    def growth(self, seen: dict[str, list[int]]) -> dict[str, float]:
        """Process -> median of the last third less that of the second."""
        return {
            process: statistics.median(values[2 * len(values) // 3 :])
            - statistics.median(values[len(values) // 3 : 2 * len(values) // 3])
            for process, values in seen.items()
        }


def soak(directory: Path, *, seconds: float, every_s: float = 2.0) -> dict[str, Any]:
    """Returns what `reports/bench/soak.json` holds; raises `RuntimeError` if a good request failed."""
    repository, noted, rolled = published_versions(directory, rows=ROWS), Noted(), 0
    fleet = Fleet(
        repository.workspace, logs=directory / "logs", replicas=2, rankers=2, tier_options=("--workers", "2")
    )
    with fleet, _traffic(fleet) as said, _hostile(fleet) as hostile:
        over, targets = time.monotonic() + seconds, cycle((*VERSIONS[1:], VERSIONS[0]))
        rollout = None
        while time.monotonic() < over:
            if rollout is None or rollout.poll() is not None:
                rolled += rollout is not None and _ended_well(rollout)
                rollout = fleet.rollout(next(targets), "--pause", "5")
            noted.look(fleet)
            time.sleep(every_s)
        rolled += _ended_well(rollout)
    grown = noted.growth(noted.bytes), noted.growth(noted.descriptors)
    return {
        "seconds": seconds, "rollouts": rolled, "answered": dict(said), "hostile": dict(hostile.done),
        "largest_growth_bytes": max(grown[0].values()), "largest_growth_descriptors": max(grown[1].values()),
        "bound_bytes": GROWTH_BYTES, "bound_descriptors": GROWTH_DESCRIPTORS,
        "grew": sorted({name for name, by in grown[0].items() if by > GROWTH_BYTES}
                       | {name for name, by in grown[1].items() if by > GROWTH_DESCRIPTORS}),
        "growth_bytes": grown[0], "growth_descriptors": grown[1],
        "memory_bytes": noted.bytes, "descriptors": noted.descriptors,
        "conditions": {"seconds_between": every_s, "rows": ROWS, **environment()},
    }


def _hostile(fleet: Fleet) -> HostileClients:
    addresses = [address for host in fleet.hosts for address in (host.address, host.admin)]
    return HostileClients(addresses, versions=VERSIONS)


def _ended_well(rollout: subprocess.Popen) -> bool:
    said, _ = rollout.communicate()
    if rollout.returncode:
        raise RuntimeError(f"a rollout failed: {said[-3000:]}")
    return True


@contextmanager
def _traffic(fleet: Fleet) -> Iterator[Counter]:
    """Threads that ask while the block runs; yields what they were answered. Raises what a good request failed with."""
    users, items = entity_ids("user", ROWS), entity_ids("item", ROWS)
    rankers = RankClient([ranker.address for ranker in fleet.rankers], attempts=5, timeout_s=10)
    rows = LookupClient([tier.target for tier in fleet.cpu_tiers], connections=2, timeout_s=10)

    def rank(random: np.random.Generator) -> str:
        rankers.rank(
            int(random.choice(users)), random.choice(items, int(random.integers(1, 200))), now_seconds=AS_OF.timestamp()
        )
        return "ranked"

    def look_up(random: np.random.Generator) -> str:
        ids = random.choice(items, int(random.choice([0, 1, 512, 20_000])))
        rows.lookup(VERSIONS, {"item.kge": ids, "item.contrastive": ids[:100]})
        return "looked up"

    def spoil(random: np.random.Generator) -> str:
        """A request that has to be refused, by either server."""
        time.sleep(0.01)
        wrong: list[Callable[[], Any]] = [
            lambda: rows.lookup(VERSIONS, {"no.such_table": items[:3]}),
            lambda: rows.lookup([999], {"item.kge": items[:3]}),
            lambda: rows.lookup(VERSIONS, {"item.kge": np.zeros(1_000_000, np.int64)}),
            lambda: rankers.rank(1, np.empty(0, np.int64)),
            lambda: rankers.rank(1, np.zeros(100_000, np.int64)),
            lambda: rankers.rank(1, items[:3], now_seconds=float("nan")),
        ]
        try:
            wrong[int(random.integers(len(wrong)))]()
        except RpcError as refusal:
            if refusal.code in (Code.INTERNAL, Code.LOOKUP_UNAVAILABLE):
                raise
            return f"refused: {refusal.code.name}"
        raise RuntimeError("a wrong request was answered")

    said: Counter[str] = Counter()
    errors: list[BaseException] = []
    over, counting = threading.Event(), threading.Lock()

    def keep_asking(ask: Callable[[np.random.Generator], str], seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            while not over.is_set():
                what = ask(random)
                with counting:
                    said[what] += 1
        except BaseException as error:
            errors.append(error)

    asks = [rank, rank, rank, look_up, look_up, spoil]
    threads = [threading.Thread(target=keep_asking, args=(ask, seed)) for seed, ask in enumerate(asks)]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        over.set()
        for thread in threads:
            thread.join()
        rankers.close()
        rows.close()
    if errors:
        raise RuntimeError("a good request failed, or a wrong one did not") from errors[0]


@click.command()
@click.option("--minutes", type=click.FloatRange(0.1), default=15.0, show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("reports/bench/soak.json"),
    show_default=True,
)
def main(minutes: float, output: Path) -> None:
    """Serve for a while and watch every process; exit status 1 if one grew."""
    logging.getLogger("feast").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="facet-soak-") as directory:
        result = soak(Path(directory), seconds=60 * minutes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(output) as staging:
        staging.write_text(json.dumps(result, indent=1) + "\n")
    short = ("seconds", "rollouts", "answered", "hostile", "largest_growth_bytes", "largest_growth_descriptors", "grew")
    click.echo(json.dumps({key: result[key] for key in short}, indent=1))
    sys.exit(bool(result["grew"]))


if __name__ == "__main__":
    main()
