"""What the online benchmarks ask: a version of four tables, processes that serve it, and the threads of a client."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.publish import publish
from tests.benchmarks.before import EarlierFleets
from tests.fleet import Fleet, descendants, facet_environment
from tests.releases import FeastRepository, entity_ids, write_context_views, write_release

__all__ = [
    "FULL", "QUICK", "TWO_CORES", "Serving", "Sizes", "Spent", "cpu_seconds", "keep_asking", "on_two_cores",
]

DIM = 64
TABLES = ("user.contrastive", "user.kge", "item.contrastive", "item.kge")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """How much is asked, and how often.

    Attributes:
        rows: of each table.
        candidates, batch: ids of a rank request, and of a lookup.
        calls: requests a round of a latency comparison.
        short_rounds, short_calls: the same where a ratio is asked for within a few percent: many short rounds, since
            what a machine does beside it changes within seconds.
        rank_rounds, rank_calls: the same of rank requests, which take a tenth of a second, to one pair of processes.
        pairs: of processes, ours and the rival's, that such a ratio is asked of: of two that do the same, one is often
            a percent or two faster than the other for as long as they live.
        burst_s: seconds of a round in which a server is saturated.
    """

    rows: int
    candidates: int
    batch: int
    rounds: int
    calls: int
    short_rounds: int
    short_calls: int
    rank_rounds: int
    rank_calls: int
    pairs: int
    burst_s: float


FULL = Sizes(
    rows=200_000, candidates=500, batch=512, rounds=5, calls=300, short_rounds=80, short_calls=50, rank_rounds=60,
    rank_calls=3, pairs=8, burst_s=6.0
)
QUICK = Sizes(
    rows=400, candidates=20, batch=32, rounds=5, calls=5, short_rounds=5, short_calls=5, rank_rounds=5, rank_calls=5,
    pairs=2, burst_s=0.3
)


class Spent(NamedTuple):
    """What threads that kept asking got, and what that cost the server."""

    answers: int
    wall_s: float
    server_cpu_s: float


@dataclass
class Serving:
    """Version 1, version 2 with the same rows and a model without context, and what serves them.

    Everything is made when it is first asked for, and ended with the stack.

    Attributes:
        before: fleets of an earlier commit, if there are any to compare with.
    """

    sizes: Sizes
    scratch: Path
    stack: ExitStack
    before: EarlierFleets | None = None
    _made: dict[str, Any] = field(default_factory=dict)
    _fleets: Iterator[int] = field(default_factory=count)

    @property
    def repository(self) -> FeastRepository:
        return self._once("repository", self._publish)

    def fleet(self) -> Fleet:
        """A CPU host and a ranker that asks it, which stay."""
        return self._once("fleet", lambda: self.stack.enter_context(self.new_fleet()))

    def new_fleet(self, *, local: bool = False, version: int = 1) -> Fleet:
        """A CPU host and a ranker that asks it, to be entered; `local`: a ranker with the tables in its own process."""
        name = f"fleet-{next(self._fleets)}"
        return Fleet(
            self.repository.workspace, logs=self.scratch / f"logs-{name}", prefix=f"{name}-", versions=str(version),
            replicas=0 if local else 1, ranker_options=("--cpu-tier", "local") if local else (),
        )

    def ids(self, entity: str) -> np.ndarray:
        return entity_ids(entity, self.sizes.rows)

    def socket_server(self) -> tuple[str, int]:
        """The lookup service over a Unix socket: its path and process."""
        path = str(self.scratch / "lookup.sock")
        workspace = str(self.repository.workspace.root)
        process, _ = self._once("socket", lambda: self.start("tests.benchmarks.socket_server", workspace, path))
        return path, process.pid

    def start(self, *command: str) -> tuple[subprocess.Popen, str]:
        """A process of the benchmarks' own, and the first line it prints; stopped with the stack."""
        process = self.run(*command)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{command} did not start")
        return process, line.strip()

    def run(self, *command: str) -> subprocess.Popen:
        """A process of the benchmarks' own, with pipes to it and from it; stopped with the stack."""
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=facet_environment(),
        )
        for end in (process.stdin.close, process.stdout.close, process.wait, process.kill):  # the last one first
            self.stack.callback(end)
        return process

    def _publish(self) -> FeastRepository:
        root = self.scratch / "serving"
        root.mkdir()
        repository = FeastRepository.create(root)
        for version, context in ((1, CONTEXT_FEATURES), (2, ())):
            release = write_release(
                root / f"release{version}", rows=self.sizes.rows, dims=dict.fromkeys(TABLES, DIM), cross_rank=32,
                hidden=(128, 64), context=context,
            )
            publish(repository.workspace, release)
        write_context_views(repository.workspace, self.ids("user"), self.ids("item"))
        repository.apply()
        repository.materialize()
        return repository

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


TWO_CORES = "client and CPU host on one, rankers on the other"


@contextmanager
def on_two_cores(*fleets: Fleet) -> Iterator[None]:
    """This process and the CPU hosts on the first core, the rankers on the last: each as if on a machine of its own."""
    cores = sorted(os.sched_getaffinity(0))
    first, last = {cores[0]}, {cores[-1]}
    everything = {os.getpid(): first}
    everything |= {pid: first for fleet in fleets for tier in fleet.cpu_tiers for pid in tier.pids}
    everything |= {pid: last for fleet in fleets for ranker in fleet.rankers for pid in ranker.pids}
    for pid, bound in everything.items():
        _bind(pid, bound)
    try:
        yield
    finally:
        for pid in everything:
            _bind(pid, set(cores))


def _bind(pid: int, cores: set[int]) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):  # threads that are there do not follow the process
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def keep_asking(
    ask: Callable[[np.random.Generator], None], *, threads: int, seconds: float, pid: int, seed: int
) -> Spent:
    """Closed loop of several threads for some seconds against a server; `ask` raises if it is not answered."""
    began, before, over = time.perf_counter(), cpu_seconds(pid), time.perf_counter() + seconds

    def work(thread: int) -> int:
        random, answers = np.random.default_rng([seed, thread]), 0
        while time.perf_counter() < over:
            ask(random)
            answers += 1
        return answers

    with ThreadPoolExecutor(threads) as pool:
        answers = sum(pool.map(work, range(threads)))
    return Spent(answers, time.perf_counter() - began, cpu_seconds(pid) - before)


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time, in user and system mode, of a process and all that it started, the dead included."""
    while True:
        try:
            return sum(_cpu_ticks(each) for each in (pid, *descendants(pid))) / os.sysconf("SC_CLK_TCK")
        except FileNotFoundError:  # one ended just now: what it used is now counted by who started it
            if not Path(f"/proc/{pid}").exists():
                raise


def _cpu_ticks(pid: int) -> int:
    """Of a process, and of its children that ended."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
