"""Whether a version that is tried on a share of the requests is as good as the old one, from what the rankers count.

Failures.  A version's failure share is halted on as soon as the lower end of its Wilson interval is above the limit:
           at z = 3, since it is looked at about every second, so that one failure among the first requests does not
           halt it. When the canary is over, the share itself must be within the limit.
Latency.   The p95 of the time in the ranker, from the counts per bin (linear within a bin). Halted on as soon as
           the lower end of the new version's p95 exceeds the allowed multiple of the upper end of the old one's: order
           statistics by the normal approximation, z = 3. When the canary is over, the estimates are compared. Both are
           of the same time on the same rankers: a new version that makes the old one's requests wait too shows less.
Neither.   Requests that failed before any version was known are all held against the canary: whose doing they are
           cannot be told, and as a share of all requests they would hide a canary that fails at all of its few.

A ranker that was restarted counts from zero again; what it had counted before stays in the tally.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from online.proto import admin_pb2
from pipelines.contracts.errors import InvalidConfig

__all__ = ["CanaryLimits", "Counts", "Outcome", "Tally", "Verdict", "quantile", "verdict", "wilson"]

Z = 3.0  # of one look among many
P95 = 0.95
GENEROUS = 10.0  # times the canary's seconds, until the requests must have come


@dataclass(frozen=True)
class CanaryLimits:
    """What is asked of a canary.

    Attributes:
        share: of the requests, above 0 and below 1.
        seconds: it lasts at least so long.
        requests: and at least until each of the two versions has answered so many.
        max_failures: share of failed requests, at most.
        max_slower: the new version's p95 over the old one's, at most.
    """

    share: float
    seconds: float = 60.0
    requests: int = 200
    max_failures: float = 0.01
    max_slower: float = 1.5

    def __post_init__(self) -> None:
        fits = 0 < self.share < 1 and self.seconds >= 0 and self.requests >= 1
        if not (fits and 0 <= self.max_failures < 1 and self.max_slower > 0):
            raise InvalidConfig(
                "canary", expected="a share above 0 and below 1, at least one request, a failure share below 1",
                got=str(self), remedy="Correct the options; leave --canary away for none.",
            )


@dataclass(frozen=True)
class Counts:
    """Requests of one version: how many were answered and failed, and the answered by latency bin."""

    answered: int = 0
    failed: int = 0
    latency: tuple[int, ...] = ()

    @property
    def requests(self) -> int:
        return self.answered + self.failed

    def __add__(self, other: "Counts") -> "Counts":
        if self.latency and other.latency:
            latency = tuple(a + b for a, b in zip(self.latency, other.latency, strict=True))
        else:
            latency = self.latency or other.latency
        return Counts(self.answered + other.answered, self.failed + other.failed, latency)

    def __sub__(self, before: "Counts") -> "Counts":
        latency = (
            tuple(now - then for now, then in zip(self.latency, before.latency, strict=True))
            if before.latency else self.latency
        )
        return Counts(self.answered - before.answered, self.failed - before.failed, latency)

    def is_below(self, before: "Counts") -> bool:
        """Whether some number is smaller than it was: counts only grow while a process lives."""
        gone = self - before
        return min(gone.answered, gone.failed, *gone.latency) < 0


@dataclass
class Tally:
    """Counts by version over all rankers since the first look.

    Attributes:
        counts: version -> what was counted.
        unversioned: requests that failed before any version was known.
        bounds_ms: upper bounds of the latency bins but the last, which is open.
        restarts: how many times a ranker was found to count from zero again.
    """

    counts: dict[int, Counts] = field(default_factory=dict)
    unversioned: int = 0
    bounds_ms: tuple[float, ...] = ()
    restarts: int = 0
    _last: dict[str, tuple[dict[int, Counts], int]] = field(default_factory=dict)

    def look(self, rankers: Mapping[str, admin_pb2.RankerStatus]) -> None:
        """Take in what the rankers, by address, count now; the first look at one is what it is counted from.

        Raises:
            InvalidConfig: two rankers count latencies by different bins.
        """
        for host, answer in rankers.items():
            now = {m.version: Counts(m.answered, m.failed, tuple(m.latency_counts)) for m in answer.models}
            self._take_bounds(host, tuple(answer.latency_bounds_ms))
            if host in self._last:
                self._add(now, answer.failed, *self._last[host])
            self._last[host] = now, answer.failed

    def _add(self, now: dict[int, Counts], failed: int, before: dict[int, Counts], failed_before: int) -> None:
        if failed < failed_before or any(counts.is_below(before.get(v, Counts())) for v, counts in now.items()):
            self.restarts += 1
            before, failed_before = {}, 0
        for version, counts in now.items():
            self.counts[version] = self.of(version) + (counts - before.get(version, Counts()))
        self.unversioned += failed - failed_before

    def _take_bounds(self, host: str, bounds_ms: tuple[float, ...]) -> None:
        self.bounds_ms = self.bounds_ms or bounds_ms
        if bounds_ms and bounds_ms != self.bounds_ms:
            raise InvalidConfig(
                f"latency counts of ranker {host}", expected=f"the bins of the others, {self.bounds_ms}",
                got=str(bounds_ms), remedy="Run the same Facet on all rankers during a canary.",
            )

    def of(self, version: int) -> Counts:
        return self.counts.get(version, Counts())


class Outcome(Enum):
    WATCH = "watch"
    PASS = "pass"
    HALT = "halt"


@dataclass(frozen=True)
class Verdict:
    """What became of a canary so far, and why, in words."""

    outcome: Outcome
    reason: str


def wilson(failed: int, requests: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share: Wilson, J. Am. Stat. Assoc. 22 (1927), 209.

    >>> [round(end, 4) for end in wilson(1, 10, z=1.96)]
    [0.0179, 0.4042]
    """
    if not requests:
        return 0.0, 1.0
    share, square = failed / requests, z * z / requests
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / requests + square / requests / 4)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def quantile(latency: Sequence[int], bounds_ms: Sequence[float], q: float) -> float:
    """The time, ms, below which a share `q` of the counted lies: linear within its bin, infinite in the open one.

    >>> quantile([0, 100, 0], [1.0, 2.0], 0.5)
    1.5
    """
    wanted, below = q * sum(latency), 0
    for position, count in enumerate(latency):
        if count and below + count >= wanted:
            if position >= len(bounds_ms):
                return math.inf
            floor = bounds_ms[position - 1] if position else 0.0
            return floor + (bounds_ms[position] - floor) * (wanted - below) / count
        below += count
    return math.nan  # nothing was counted


def p95_range(counts: Counts, bounds_ms: Sequence[float], z: float = Z) -> tuple[float, float]:
    """Ends between which the p95 lies: the order statistics z standard deviations of the binomial away, ms."""
    spread = z * math.sqrt(P95 * (1 - P95) / max(sum(counts.latency), 1))
    ends = max(P95 - spread, 0.0), min(P95 + spread, 1.0)
    return quantile(counts.latency, bounds_ms, ends[0]), quantile(counts.latency, bounds_ms, ends[1])


def verdict(tally: Tally, *, old: int, new: int, limits: CanaryLimits, elapsed_s: float) -> Verdict:
    """Whether the canary of version `new` beside `old` passes, is to be watched on, or halts."""
    before, tried, bounds = tally.of(old), tally.of(new), tally.bounds_ms
    failed, requests = tried.failed + tally.unversioned, tried.requests + tally.unversioned
    said = _progress(before, tried, bounds, tally.unversioned, old=old, new=new)
    enough = min(before.requests, tried.requests) >= limits.requests
    over = enough and elapsed_s >= limits.seconds

    def halt(why: str) -> Verdict:
        return Verdict(Outcome.HALT, f"{why}; {said}")

    surely, share = wilson(failed, requests)[0], failed / requests if requests else 0.0
    if surely > limits.max_failures or (over and share > limits.max_failures):
        return halt(f"{share:.2%} of its requests failed, over the {limits.max_failures:.2%} allowed")
    allowed = limits.max_slower
    if p95_range(tried, bounds)[0] > allowed * p95_range(before, bounds)[1]:  # never true of nan
        return halt(f"version {new} is surely more than {allowed:g} times as slow")
    if over:
        slow, usual = (quantile(counts.latency, bounds, P95) for counts in (tried, before))
        if math.isfinite(usual) and slow > allowed * usual:
            return halt(f"version {new} is more than {allowed:g} times as slow")
        if not (math.isfinite(slow) and math.isfinite(usual)):
            return halt("the rankers' latencies, none or beyond the slowest bin, do not tell whether it is slower")
        return Verdict(Outcome.PASS, said)
    if not enough and elapsed_s >= GENEROUS * max(limits.seconds, 1.0):
        return halt(f"not {limits.requests} requests of each version within {elapsed_s:.0f} s: too few to tell")
    return Verdict(Outcome.WATCH, said)


def _progress(
    before: Counts, tried: Counts, bounds_ms: Sequence[float], unversioned: int, *, old: int, new: int
) -> str:
    parts = [
        f"version {version}: {counts.requests} requests, {counts.failed} failed"
        + (f", p95 {quantile(counts.latency, bounds_ms, P95):.3g} ms" if sum(counts.latency) else "")
        for version, counts in ((new, tried), (old, before))
    ]
    return "; ".join(parts + [f"{unversioned} failed before any version was known"] * bool(unversioned))
