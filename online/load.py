"""Live traffic: many requests from several threads, every answer kept, every failure counted, nothing retried."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from online.client import LookupClient, RankClient, RankedScores
from online.refusal import Refusal
from online.verify import Answers
from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace

__all__ = ["Population", "RankTraffic", "drive", "lookup_latency", "percentiles", "rank_traffic"]

logger = logging.getLogger(__name__)

UNKNOWN_SHARE = 0.02
ZIPF_EXPONENT = 1.1


class Population:
    """Users and items to ask for: zipfian over the ids of a version's tables, and a few that no version knows.

    Args:
        ids: entity -> int64 (N,), unique.
        unknown_share: probability that an id is drawn from outside.
    """

    def __init__(self, ids: dict[str, np.ndarray], *, seed: int, unknown_share: float = UNKNOWN_SHARE) -> None:
        shuffle = np.random.default_rng(seed)
        self._ids = {entity: shuffle.permutation(values) for entity, values in ids.items()}
        self._cumulative = {}
        for entity, values in ids.items():
            weight = 1.0 / np.arange(1, len(values) + 1) ** ZIPF_EXPONENT
            self._cumulative[entity] = np.cumsum(weight / weight.sum())
        self._unknown_share = unknown_share

    @classmethod
    def of_version(cls, workspace: Workspace, version: int, *, seed: int) -> "Population":
        """All ids that any table of the version has a row for."""
        manifest = workspace.versions.manifest(version)
        ids: dict[str, np.ndarray] = {}
        for spec in manifest.tables:
            path = workspace.versions.path(version) / Manifest.table_path(spec.name)
            known = pq.read_table(path, columns=["id"])["id"].to_numpy()
            ids[spec.entity] = np.union1d(ids.get(spec.entity, np.empty(0, np.int64)), known)
        if empty := [entity for entity, values in ids.items() if not len(values)]:
            raise VersionNotFound(
                f"ids of version {version}", expected="at least one per entity", got=f"none of {empty}",
                remedy="Publish a version with rows.",
            )
        return cls(ids, seed=seed)

    def draw(self, entity: str, size: int, random: np.random.Generator) -> np.ndarray:
        """int64 (size,), popular ids more often; unknown ones are negative."""
        rank = np.searchsorted(self._cumulative[entity], random.random(size))
        ids = self._ids[entity][np.minimum(rank, len(self._ids[entity]) - 1)]
        unknown = random.random(size) < self._unknown_share
        return np.where(unknown, -random.integers(1, 2**62, size), ids)


def drive(
    send: Callable[[int, np.random.Generator], None], *, requests: int, seconds: float, concurrency: int, seed: int,
    until: Path | None = None, stop: threading.Event | None = None,
) -> float:
    """Closed loop: `concurrency` threads, each sending its next request when the last was answered.

    Args:
        send: takes the request's number and the thread's random generator; what it raises ends the drive.
        requests, seconds, until: the drive ends when both numbers are reached and the file exists (None: no file).
        stop: set it to end the drive early.

    Returns:
        Seconds it took.
    """
    numbers, began, over = count(), time.perf_counter(), threading.Event()

    def work(thread: int) -> None:
        random = np.random.default_rng([seed, thread])
        try:
            while not (over.is_set() or (stop is not None and stop.is_set())):
                number = next(numbers)
                if (
                    number >= requests
                    and time.perf_counter() - began >= seconds
                    and (until is None or until.exists())
                ):
                    return
                send(number, random)
                bar.update()
        except BaseException:
            over.set()
            raise

    progress = tqdm(total=requests, desc="requests", unit="req", disable=None)
    with progress as bar, ThreadPoolExecutor(concurrency) as pool:
        threads = [pool.submit(work, number) for number in range(concurrency)]
        try:
            for thread in threads:
                thread.result()
        finally:
            over.set()
    return time.perf_counter() - began


@dataclass
class RankTraffic:
    """What happened to every request, in the order of completion."""

    users: list[int] = field(default_factory=list)
    candidates: list[np.ndarray] = field(default_factory=list)
    answers: list[RankedScores] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)  # since the start
    latency_ms: list[float] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    now_seconds: float = 0.0
    began: str = ""  # ISO time of the first request
    wall_s: float = 0.0

    def for_verification(self) -> Answers:
        lengths = [len(candidates) for candidates in self.candidates]
        tasks = max((answer.scores.shape[1] for answer in self.answers), default=0)
        return Answers(
            request=np.repeat(np.arange(len(self.answers)), lengths),
            users=np.repeat(np.array(self.users, np.int64), lengths),
            items=np.concatenate(self.candidates) if self.candidates else np.empty(0, np.int64),
            now_seconds=np.full(sum(lengths), self.now_seconds),
            scores=np.concatenate([answer.scores for answer in self.answers]) if self.answers else np.empty((0, tasks)),
            version=np.array([answer.version for answer in self.answers], np.int64),
            manifest_sha256=[answer.manifest_sha256 for answer in self.answers],
        )

    def summary(self) -> dict[str, Any]:
        """Counts, latency and which version answered in which second; all failures by code."""
        versions = [answer.version for answer in self.answers]
        stages = {stage for answer in self.answers for stage in answer.timing_ms}
        return {
            "requests": len(self.answers) + len(self.failures),
            "failed": len(self.failures),
            "failures": dict(Counter(failure["code"] for failure in self.failures)),
            "first_failures": self.failures[:5],
            "versions_seen": {str(version): n for version, n in sorted(Counter(versions).items())},
            "manifests": {str(answer.version): answer.manifest_sha256 for answer in self.answers},
            "began": self.began,
            "wall_s": round(self.wall_s, 3),
            "requests_per_s": round(len(self.answers) / self.wall_s, 1) if self.wall_s else 0.0,
            "latency_ms": percentiles(self.latency_ms),
            "stages_p50_ms": {
                stage: round(float(np.median([answer.timing_ms.get(stage, 0.0) for answer in self.answers])), 3)
                for stage in sorted(stages)
            },
            "timeline": self._timeline(),
        }

    def _timeline(self) -> list[dict[str, Any]]:
        seconds: dict[int, dict[str, Any]] = {}

        def bucket(sent_s: float) -> dict[str, Any]:
            return seconds.setdefault(int(sent_s), {"second": int(sent_s), "versions": Counter(), "failed": 0})

        for sent_s, answer in zip(self.sent_s, self.answers, strict=True):
            bucket(sent_s)["versions"][str(answer.version)] += 1
        for failure in self.failures:
            bucket(failure["sent_s"])["failed"] += 1
        return [{**entry, "versions": dict(entry["versions"])} for _, entry in sorted(seconds.items())]


def rank_traffic(
    target: str, population: Population, *, requests: int, seconds: float, concurrency: int, candidates: int,
    now_seconds: float, seed: int, until: Path | None = None, stop: threading.Event | None = None,
) -> RankTraffic:
    """Drive a ranker; every answer is kept for `online.verify`.

    Args:
        now_seconds: moment named in every request, seconds since 1970.
        requests, seconds, concurrency, until, stop: as for `drive`.
    """
    client, recording = RankClient(target), threading.Lock()
    traffic = RankTraffic(now_seconds=now_seconds, began=datetime.now(UTC).isoformat(timespec="milliseconds"))
    began = time.perf_counter()

    def send(number: int, random: np.random.Generator) -> None:
        user = int(population.draw("user", 1, random)[0])
        items = population.draw("item", candidates, random)
        sent = time.perf_counter()
        try:
            answer = client.rank(user, items, now_seconds=now_seconds, request_id=f"load-{number}")
        except Refusal as refusal:
            failure = {"code": refusal.code.name, "sent_s": round(sent - began, 3), "message": str(refusal)}
            with recording:
                traffic.failures.append(failure)
            return
        latency_ms = (time.perf_counter() - sent) * 1e3
        with recording:
            traffic.users.append(user)
            traffic.candidates.append(items)
            traffic.answers.append(answer)
            traffic.sent_s.append(sent - began)
            traffic.latency_ms.append(latency_ms)

    traffic.wall_s = drive(
        send, requests=requests, seconds=seconds, concurrency=concurrency, seed=seed, until=until, stop=stop
    )
    client.close()
    return traffic


def lookup_latency(
    target: str, population: Population, *, version: int, table: str, batch: int, requests: int, seconds: float,
    concurrency: int, seed: int,
) -> dict[str, Any]:
    """Round trips of one lookup of `batch` ids of a table, as a client sees them: percentiles and a histogram."""
    client = LookupClient([target], attempts=1)
    entity = table.partition(".")[0]
    latency_ms: list[float] = []
    failures: Counter[str] = Counter()
    found_share: list[float] = []

    def send(number: int, random: np.random.Generator) -> None:
        ids = population.draw(entity, batch, random)
        sent = time.perf_counter()
        try:
            rows = client.lookup([version], {table: ids}, request_id=f"load-{number}")
        except Refusal as refusal:
            failures[refusal.code.name] += 1
            return
        latency_ms.append((time.perf_counter() - sent) * 1e3)
        found_share.append(float(rows.found[table].mean()))

    drive(send, requests=min(200, requests), seconds=0.0, concurrency=1, seed=seed + 1)  # pages and channel warm
    latency_ms.clear()
    found_share.clear()
    wall_s = drive(send, requests=requests, seconds=seconds, concurrency=concurrency, seed=seed)
    client.close()
    edges = np.geomspace(0.05, 1000, 201)
    counts, _ = np.histogram(np.clip(latency_ms, edges[0], edges[-1]), edges)
    return {
        "table": table, "version": version, "batch": batch, "concurrency": concurrency,
        "requests": len(latency_ms) + sum(failures.values()), "failed": sum(failures.values()),
        "failures": dict(failures), "found_share": round(float(np.mean(found_share)), 4) if found_share else 0.0,
        **{f"{name}_ms": value for name, value in percentiles(latency_ms).items()},
        "rows_per_s": round(batch * len(latency_ms) / wall_s), "wall_s": round(wall_s, 3),
        "histogram": {"edges_ms": [round(float(edge), 4) for edge in edges], "counts": counts.tolist()},
    }


def percentiles(latency_ms: list[float]) -> dict[str, float]:
    """p50, p90, p99, max and mean in milliseconds; zeros when there is nothing."""
    values = np.array(latency_ms or [0.0])
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        name: round(float(value), 3)
        for name, value in (("p50", p50), ("p90", p90), ("p99", p99), ("max", values.max()), ("mean", values.mean()))
    }
