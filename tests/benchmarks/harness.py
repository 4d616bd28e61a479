"""Ours and its rivals, turn by turn: medians of at least five rounds, and the file that the figures go to.

```
round 0 (not counted)   ours | rival | rival      everything is compiled, filled and touched
round 1                 ours | rival | rival
round 2                 rival | rival | ours      every other round backwards, so that nobody always goes first
...
```
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig

__all__ = [
    "MIN_ROUNDS", "Result", "Side", "Timing", "bounded", "interleave", "interval_of_ratio", "measured",
    "median_with_interval", "overhead",
    "ratio_by_round", "show", "sizes_compared", "speeds_compared", "timed", "write_results",
]

MIN_ROUNDS = 5
RESAMPLES = 1000
PACKAGES = ("feast", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "redis", "hiredis", "numba", "numpy", "pyarrow", "duckdb")


def _nothing() -> None:
    pass


class Contestant(Protocol):
    """What `interleave` needs of one: its turns, timed, and what clears up after each."""

    @property
    def name(self) -> str: ...

    def turn(self) -> Sequence[float]: ...

    def after(self) -> None: ...


@dataclass(frozen=True)
class Side:
    """One contestant, called and timed in this process.

    Attributes:
        name: what it is, in words a reader of the figures understands.
        call: what is timed, once per input.
        inputs: makes a round's inputs, one per call; not timed.
        after: checks and clears what a round left; not timed.
    """

    name: str
    call: Callable[[Any], Any]
    inputs: Callable[[], Iterable[Any]] = lambda: (None,)
    after: Callable[[], None] = _nothing

    def turn(self) -> Sequence[float]:
        """Seconds of every call of one round."""
        return [timed(self.call, given) for given in self.inputs()]


@dataclass(frozen=True)
class Timing:
    """What a side took.

    Attributes:
        turns: seconds of every call, round by round.
    """

    name: str
    turns: tuple[tuple[float, ...], ...]

    @property
    def rounds(self) -> tuple[float, ...]:
        """Seconds per call, one figure per round: the median of that round's calls."""
        return tuple(map(statistics.median, self.turns))

    @property
    def calls(self) -> int:
        """How many calls a round has."""
        return len(self.turns[0])

    @property
    def p99(self) -> float:
        """Seconds that 99 % of all calls stay under."""
        return float(np.quantile(np.concatenate(self.turns), 0.99, method="higher"))

    @property
    def seconds(self) -> float:
        """Median over the rounds; raises `InvalidConfig` if there are fewer than `MIN_ROUNDS`."""
        if len(self.rounds) < MIN_ROUNDS:
            raise InvalidConfig(
                f"a figure for {self.name}", expected=f"at least {MIN_ROUNDS} rounds", got=str(len(self.rounds)),
                remedy="Measure more rounds: one run on a shared machine says little.",
            )
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Result:
    """One line of a report; `ratio` says how many times better ours is, or for a bound, which part of it is used."""

    name: str
    ours: float
    rival: float | None
    rival_name: str
    ratio: float | None
    unit: str
    conditions: dict[str, Any] = field(default_factory=dict)


def interleave(sides: Sequence[Contestant], *, rounds: int, label: str) -> dict[str, Timing]:
    """Time every side once a round, by turns; the first turn of all is not counted.

    Returns:
        name -> `Timing`, in the order of `sides`.
    """
    spent: dict[str, list[list[float]]] = {side.name: [] for side in sides}
    with tqdm(total=(rounds + 1) * len(sides), desc=label, unit="turn", disable=None) as progress:
        for number in range(rounds + 1):
            for side in sides if number % 2 else reversed(sides):
                progress.set_postfix_str(side.name)
                turn = side.turn()
                side.after()
                if number:
                    spent[side.name].append(turn)
                progress.update()
    return {name: Timing(name, tuple(map(tuple, turns))) for name, turns in spent.items()}


def interval_of_ratio(ours: Timing, rival: Timing, figure: Callable[[Timing], float]) -> tuple[float, float]:
    """95 % interval of `figure(ours) / figure(rival)`, by bootstrap over rounds: both sides of a round go together.

    What calls of one round have in common, such as a busy neighbour, is thus not taken for many observations.
    """
    random, ratios = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(ours.turns), size=len(ours.turns))
        ratios.append(
            figure(replace(ours, turns=tuple(ours.turns[round_] for round_ in drawn)))
            / figure(replace(rival, turns=tuple(rival.turns[round_] for round_ in drawn)))
        )
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def ratio_by_round(ours: Sequence[float], rival: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median over rounds of `ours / rival`, and its 95 % interval by bootstrap over rounds.

    For few long turns on a machine with fast and slow minutes: both turns of a round mostly fall into the same one,
    while each side's own median jumps from what it is in the fast ones to what it is in the slow ones.
    """
    return median_with_interval(np.asarray(ours, float) / np.asarray(rival, float))


def median_with_interval(figures: Sequence[float] | np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median of figures (N,), and its 95 % interval by bootstrap."""
    figures = np.asarray(figures, float)
    drawn = np.random.default_rng(0).integers(len(figures), size=(RESAMPLES, len(figures)))
    low, high = np.quantile(np.median(figures[drawn], axis=1), [0.025, 0.975])
    return float(np.median(figures)), (float(low), float(high))


def speeds_compared(
    name: str, *, ours: Timing, rival: Timing, amount: int | None = None, **conditions: Any
) -> Result:
    """A result from two timings: rows per second where `amount` (rows of a call) is given, else microseconds a call."""
    figures = [timing.seconds * 1e6 if amount is None else amount / timing.seconds for timing in (ours, rival)]
    spread = {
        f"{who}_slowest_to_fastest_round_s": [max(timing.rounds), min(timing.rounds)]
        for who, timing in (("ours", ours), ("rival", rival))
    }
    if ours.calls > 1:
        spread |= {"ours_p99_us": ours.p99 * 1e6, "rival_p99_us": rival.p99 * 1e6}
    return Result(
        name, figures[0], figures[1], rival.name, rival.seconds / ours.seconds,
        "us" if amount is None else "rows/s",
        {"ours_name": ours.name, "rounds": len(ours.rounds), "calls_a_round": ours.calls, **spread, **conditions}
        | environment(),
    )


def sizes_compared(name: str, *, ours: float, rival: float, rival_name: str, **conditions: Any) -> Result:
    """A result from two sizes, bytes per row."""
    return Result(name, ours, rival, rival_name, rival / ours, "bytes/row", conditions | environment())


def overhead(name: str, *, ours: float, rival: float, rival_name: str, unit: str, **conditions: Any) -> Result:
    """What ours costs on top of a rival that does less: `ratio` is ours over the rival's, 1 is nothing."""
    said = {"ratio_is": "ours / rival"}
    return Result(name, ours, rival, rival_name, ours / rival, unit, said | conditions | environment())


def bounded(name: str, *, ours: float, at_most: float, unit: str, **conditions: Any) -> Result:
    """A result against a limit: `ratio` is ours over the limit, good up to 1."""
    return Result(name, ours, at_most, "at most", ours / at_most, unit, conditions | environment())


def measured(name: str, *, ours: float, unit: str, **conditions: Any) -> Result:
    """A figure that has neither rival nor limit."""
    return Result(name, ours, None, "none", None, unit, conditions | environment())


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write `{"results": [...]}`; results of other names that are there already stay, each with its own conditions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["results"] if path.is_file() else []
    lines = {line["name"]: line for line in before} | {result.name: asdict(result) for result in results}
    with replacing_file(path) as staging:
        staging.write_text(json.dumps({"results": list(lines.values())}, indent=1) + "\n")


def show(results: Sequence[Result]) -> str:
    """The results as a table to read."""
    header = ("name", "ours", "rival", "ratio", "unit", "rival is")
    lines = [header]
    lines += [(r.name, _short(r.ours), _short(r.rival), _short(r.ratio), r.unit, r.rival_name) for r in results]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def environment() -> dict[str, Any]:
    """The machine, the versions and the moment, for a result's conditions."""
    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(), "versions": _versions(), "load_1m": round(os.getloadavg()[0], 1),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def timed(call: Callable[[Any], Any], given: Any) -> float:
    """Seconds that a call took."""
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # of FBGEMM's two builds, one is installed
    if program := shutil.which("redis-server"):
        words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
        found["redis-server"] = next(word.removeprefix("v=") for word in words if word.startswith("v="))
    return found


def _short(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"
