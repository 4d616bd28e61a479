"""Live traffic: rank requests or lookups, every answer recorded, every failure counted, nothing left out."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from online.clock import CLOCK, Clock
from online.load.drive import Begin, drive
from online.load.population import Population
from online.load.recording import NOT_SENT, Failures, Growing, histogram, percentiles
from online.lookup.client import LookupClient
from online.proto import rank_pb2
from online.ranking.client import RankClient, RankedScores
from online.rpc_error import RpcError
from online.security.credentials import ClientSecurity

if TYPE_CHECKING:
    from online.ranking.verify import Answers

__all__ = ["LookupTraffic", "RankTraffic", "Traffic", "lookup_traffic", "rank_traffic"]

STAGES = tuple(field.name for field in rank_pb2.Timing.DESCRIPTOR.fields)

WRONG_SHAPE = "WRONG_SHAPE"
"""Code of an answer that has not one score per candidate and task of the first answer."""

WARM_REQUESTS = 200

_LATE = "no thread was free before its client would have given up; allow more concurrency, or a lower rate"
_TIMES = {"since_s": (np.float32, ()), "lag_ms": (np.float32, ()), "latency_ms": (np.float32, ())}


class Answered(NamedTuple):
    """An answer, and the moments, by the traffic's clock, at which its request was due and was sent."""

    answer: Any
    due: float
    sent: float


class Traffic:
    """When each request was due, when it was sent and when it was answered.

    Args:
        deadline_ms: an answer within it is good; what `goodput_per_s` counts. None: every answer is.
        rate: of an open loop, requests a second; None: a closed loop.
        columns: what else is recorded of an answer.
        clock: what requests are due, sent and answered by.

    Attributes:
        answers: rows of `since_s` (after the start; of an open loop: when it was due), `lag_ms` (from then until it was
            sent), `latency_ms` (from then until it was answered), and `columns`.
        began: ISO time of the first request.
        wall_s: seconds until the last answer.
    """

    def __init__(
        self, *, deadline_ms: float | None = None, rate: float | None = None,
        columns: dict[str, tuple[Any, tuple[int, ...]]] | None = None, clock: Clock = CLOCK,
    ) -> None:
        self._columns = {**_TIMES, **(columns or {})}
        self.answers, self.failures = Growing(self._columns), Failures()
        self.deadline_ms, self.rate, self._clock = deadline_ms, rate, clock
        self.began, self.wall_s, self._start = "", 0.0, 0.0

    def start(self) -> None:
        """Now is second 0; forgets what was recorded before."""
        self.answers, self.failures = Growing(self._columns), Failures()
        self.began, self._start = datetime.now(UTC).isoformat(timespec="milliseconds"), self._clock.now()

    def ask(self, call: Callable[[], Any], begin: Begin, timeout_s: float) -> Answered | None:
        """Make a request's call when it is due; None: it failed, or was too late to be made, and was recorded as that.

        Args:
            call: answers, or raises `RpcError`.
            timeout_s: until its client would give up.
        """
        due = begin()
        sent = self._clock.now()
        if sent - due > timeout_s:
            self.fail(NOT_SENT, due, _LATE)
            return None
        try:
            return Answered(call(), due, sent)
        except RpcError as refusal:
            self.fail(refusal.code.name, due, str(refusal))
            return None

    def fail(self, code: str, due: float, message: str) -> None:
        """A request that was due at the moment `due` was not answered."""
        self.failures.append(code, due - self._start, message)

    def _times(self, due: float, sent: float) -> dict[str, float]:
        now = self._clock.now()
        return {"since_s": due - self._start, "lag_ms": (sent - due) * 1e3, "latency_ms": (now - due) * 1e3}

    def figures(self) -> dict[str, Any]:
        """Counts, failures by code, latency, goodput."""
        latency_ms, failed = self.answers.column("latency_ms"), len(self.failures)
        good = len(latency_ms) if self.deadline_ms is None else int((latency_ms <= self.deadline_ms).sum())
        figures = {
            "requests": len(latency_ms) + failed,
            "failed": failed,
            "failures": self.failures.by_code(),
            "first_failures": self.failures.first,
            "began": self.began,
            "wall_s": round(self.wall_s, 3),
            "requests_per_s": self._per_second(len(latency_ms)),
            "loop": "closed" if self.rate is None else "open",
            "latency_ms": percentiles(latency_ms),
            "histogram": histogram(latency_ms),
            "deadline_ms": self.deadline_ms,
            "answered_in_time": good,
            "goodput_per_s": self._per_second(good),
        }
        if self.rate is not None:
            figures |= {
                "rate": self.rate, "offered_per_s": self._per_second(figures["requests"]),
                "lag_ms": percentiles(self.answers.column("lag_ms")),
            }
        return figures

    def timeline(self) -> list[dict[str, Any]]:
        """By second since the start: how many answers and failures of the requests that were due in it, and latency."""
        answered, failed = self.answers.column("since_s").astype(int), self.failures.since_s().astype(int)
        order = np.argsort(answered, kind="stable")
        latency_ms, failures = self.answers.column("latency_ms")[order], Counter(failed.tolist())
        seconds = np.union1d(answered, failed)
        first, last = (np.searchsorted(answered[order], seconds, side) for side in ("left", "right"))
        return [
            {
                "second": second, "answered": int(end - start), "failed": failures[second],
                **{f"{name}_ms": value for name, value in percentiles(latency_ms[start:end]).items()
                   if name in ("p50", "p99", "max")},
            }
            for second, start, end in zip(seconds.tolist(), first, last, strict=True)
        ]

    def _per_second(self, requests: int) -> float:
        return round(requests / self.wall_s, 1) if self.wall_s else 0.0


class RankTraffic(Traffic):
    """Answers of rankers, with all that it takes to recompute them.

    Args:
        candidates: C of every request.
        now_seconds: moment named in every request, seconds since 1970.
    """

    def __init__(
        self, *, candidates: int = 0, now_seconds: float = 0.0, deadline_ms: float | None = None,
        rate: float | None = None, clock: Clock = CLOCK,
    ) -> None:
        columns = {
            "user": (np.int64, ()), "candidates": (np.int64, (candidates,)), "name": (np.int32, ()),
            "stages_ms": (np.float32, (len(STAGES),)),
        }
        super().__init__(deadline_ms=deadline_ms, rate=rate, columns=columns, clock=clock)
        self.candidates, self.now_seconds = candidates, now_seconds
        self._scores: Growing | None = None  # once it is known how many tasks there are
        self._tasks: tuple[str, ...] = ()
        self._names: dict[tuple[int, str], int] = {}  # (version, manifest) -> number
        self._naming = threading.Lock()

    def record(self, user: int, candidates: np.ndarray, answer: RankedScores, *, due: float, sent: float) -> None:
        """An answer that came just now to a request of `user` for `candidates` (int64 (C,))."""
        times, name = self._times(due, sent), (answer.version, answer.manifest_sha256)
        with self._naming:
            if self._scores is None:
                self._scores = Growing({"scores": (np.float32, (self.candidates, len(answer.tasks)))})
                self._tasks = answer.tasks
            if answer.scores.shape != (self.candidates, len(self._tasks)):
                self.fail(WRONG_SHAPE, due, f"scores of shape {answer.scores.shape} for {self.candidates} candidates")
                return
            number = self._names.setdefault(name, len(self._names))
            self._scores.append(scores=answer.scores)
            self.answers.append(
                user=user, candidates=candidates, name=number,
                stages_ms=[answer.timing_ms.get(stage, 0.0) for stage in STAGES], **times,
            )

    def for_verification(self) -> "Answers":
        from online.ranking.verify import Answers  # which needs torch, as only this does

        requests, count = len(self.answers), self.candidates
        names, number = list(self._names), self.answers.column("name")
        scores = self._scores.column("scores") if self._scores else np.empty((0, count, 0), np.float32)
        return Answers(
            request=np.repeat(np.arange(requests), count),
            users=np.repeat(self.answers.column("user"), count),
            items=self.answers.column("candidates").reshape(-1),
            now_seconds=np.full(requests * count, self.now_seconds),
            scores=scores.reshape(requests * count, scores.shape[2]),
            version=np.array([version for version, _ in names], np.int64)[number],
            manifest_sha256=[names[index][1] for index in number.tolist()],
        )

    def summary(self) -> dict[str, Any]:
        """Counts, latency and which version answered in which second; all failures by code."""
        stages_ms = self.answers.column("stages_ms")
        versions = [version for version, _ in self._names]
        number = self.answers.column("name")
        counts = Counter()
        for index, count in enumerate(np.bincount(number, minlength=len(versions)).tolist()):
            counts[versions[index]] += count
        return {
            **self.figures(),
            "versions_seen": {str(version): n for version, n in sorted(counts.items())},
            "manifests": {str(version): manifest for version, manifest in self._names},
            "stages_p50_ms": {
                stage: round(float(np.median(stages_ms[:, index])), 3)
                for index, stage in enumerate(STAGES) if len(stages_ms) and stages_ms[:, index].any()
            },
            "timeline": self._timeline_by_version(versions, number),
        }

    def _timeline_by_version(self, versions: list[int], number: np.ndarray) -> list[dict[str, Any]]:
        second = self.answers.column("since_s").astype(int)
        pairs, counts = np.unique(np.stack([second, number]), axis=1, return_counts=True)
        answered: dict[int, Counter] = {}
        for at, name, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            answered.setdefault(at, Counter())[str(versions[name])] += count
        return [{**entry, "versions": dict(answered.get(entry["second"], {}))} for entry in self.timeline()]


class LookupTraffic(Traffic):
    """Answers of a CPU tier."""

    def __init__(
        self, *, batch: int = 0, deadline_ms: float | None = None, rate: float | None = None, clock: Clock = CLOCK
    ) -> None:
        super().__init__(deadline_ms=deadline_ms, rate=rate, columns={"found": (np.int32, ())}, clock=clock)
        self.batch = batch

    def record(self, found: np.ndarray, *, due: float, sent: float) -> None:
        """Rows that came just now; `found`: bool (B,)."""
        self.answers.append(found=np.count_nonzero(found), **self._times(due, sent))

    def summary(self) -> dict[str, Any]:
        """Counts, latency and the share of the ids that had a row."""
        figures, answered = self.figures(), len(self.answers)
        found = int(self.answers.column("found").sum())
        return {
            "batch": self.batch, **figures,
            "found_share": round(found / (answered * self.batch), 4) if answered else 0.0,
            **{f"{name}_ms": value for name, value in figures["latency_ms"].items()},
            "rows_per_s": round(self.batch * answered / self.wall_s) if self.wall_s else 0,
            "timeline": self.timeline(),
        }


def rank_traffic(
    targets: str | Sequence[str], population: Population, *, requests: int, seconds: float, concurrency: int,
    candidates: int, now_seconds: float, seed: int, until: Path | None = None, stop: threading.Event | None = None,
    attempts: int = 1, timeout_s: float = 5.0, rate: float | None = None, think_s: float = 0.0,
    deadline_ms: float | None = None, security: ClientSecurity | None = None, clock: Clock = CLOCK,
) -> RankTraffic:
    """Drive rankers; every answer is kept for `online.ranking.verify`.

    Args:
        candidates: per request.
        now_seconds: moment named in every request, seconds since 1970.
        requests, seconds, concurrency, until, stop, rate, think_s: as for `online.load.drive.drive`.
        attempts: how often a request is tried; with 1, whoever measures sees every failure.
        timeout_s: for a request, attempts included. One of an open loop that could not be sent within it after it was
            due counts as failed by `NOT_SENT`.
        deadline_ms: for `goodput_per_s`.
    """
    client = RankClient(targets, timeout_s=timeout_s, attempts=attempts, security=security)
    traffic = RankTraffic(
        candidates=candidates, now_seconds=now_seconds, deadline_ms=deadline_ms, rate=rate, clock=clock
    )

    def send(number: int, random: np.random.Generator, begin: Begin) -> None:
        user = int(population.draw("user", 1, random)[0])
        items = population.draw("item", candidates, random)
        call = partial(client.rank, user, items, now_seconds=now_seconds, request_id=f"load-{seed}-{number}")
        if answered := traffic.ask(call, begin, timeout_s):
            traffic.record(user, items, answered.answer, due=answered.due, sent=answered.sent)

    with closing(client):
        traffic.start()
        traffic.wall_s = drive(
            send, requests=requests, seconds=seconds, concurrency=concurrency, seed=seed, rate=rate, think_s=think_s,
            until=until, stop=stop, clock=clock,
        )
    return traffic


def lookup_traffic(
    targets: Sequence[str], population: Population, *, version: int, table: str, batch: int, requests: int,
    seconds: float, concurrency: int, seed: int, until: Path | None = None, stop: threading.Event | None = None,
    attempts: int = 1, timeout_s: float = 2.0, rate: float | None = None, think_s: float = 0.0,
    deadline_ms: float | None = None, security: ClientSecurity | None = None, clock: Clock = CLOCK,
) -> LookupTraffic:
    """Drive a CPU tier by lookups of `batch` ids of a table, as a client sees them.

    Args:
        targets: as for `online.lookup.client.LookupClient`.
        version: the only one that is accepted.
        Others: as for `rank_traffic`.
    """
    client = LookupClient(targets, timeout_s=timeout_s, attempts=attempts, security=security)
    entity = table.partition(".")[0]
    traffic = LookupTraffic(batch=batch, deadline_ms=deadline_ms, rate=rate, clock=clock)

    def send(number: int, random: np.random.Generator, begin: Begin) -> None:
        ids = population.draw(entity, batch, random)
        call = partial(client.lookup, [version], {table: ids}, request_id=f"load-{seed}-{number}")
        if answered := traffic.ask(call, begin, timeout_s):
            traffic.record(answered.answer.found[table], due=answered.due, sent=answered.sent)

    with closing(client):
        warm = min(WARM_REQUESTS, requests)  # pages and connections
        drive(send, requests=warm, seconds=0.0, concurrency=1, seed=seed + 1, stop=stop, clock=clock)
        traffic.start()
        traffic.wall_s = drive(
            send, requests=requests, seconds=seconds, concurrency=concurrency, seed=seed, rate=rate, think_s=think_s,
            until=until, stop=stop, clock=clock,
        )
    return traffic
