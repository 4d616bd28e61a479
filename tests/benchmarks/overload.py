"""Three times what a ranker can do: how much of it is still answered in time, how late, and how soon it recovers."""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from online.load.population import Population
from online.load.traffic import RankTraffic, rank_traffic
from tests.benchmarks.harness import Result, environment, ratio_by_round
from tests.benchmarks.serving import TWO_CORES, Serving, on_two_cores
from tests.releases import AS_OF

__all__ = ["at_three_times_capacity"]

CANDIDATES = 100
DEADLINE_MS = 500.0
"""An answer that comes later is of no use to anybody, and clients say so: it is the deadline of their calls."""
PATIENT, IMPATIENT = 8, 96
"""Threads of the closed loop that finds the maximum, and of the open loop: enough that no request is sent late."""


def at_three_times_capacity(serving: Serving) -> Iterator[Result]:
    """With the cores shared by all; and with a core for the ranker, as if the load came from another machine."""
    yield _flooded(serving, "goodput_at_3x")
    with on_two_cores(serving.fleet()):
        yield _flooded(serving, "goodput_at_3x_pinned", bound=TWO_CORES)


@contextmanager
def _giving_way() -> Iterator[None]:
    """The threads that this one starts meanwhile interrupt nobody by waking up.

    A client of 96 threads is not what is measured, and on a host of its own would cost the server nothing. Here it
    takes a few percent of the goodput, mostly by waking on the server's core while the other is free. `lag_p99_ms` says
    whether it sends in time all the same.
    """
    before, nothing = os.sched_getscheduler(0), os.sched_param(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, nothing)
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, nothing)


def _flooded(serving: Serving, name: str, **conditions: Any) -> Result:
    """Turn by turn: a closed loop that saturates the ranker, an open one at three times that rate, a client alone."""
    # Many short turns: a machine has faster and slower minutes, and what is compared is to fall into the same one.
    rounds, seconds = 4 * serving.sizes.rounds, serving.sizes.burst_s / 2
    address = serving.fleet().rankers[0].address
    population = Population.of_version(serving.repository.workspace, 1, seed=0)

    def drive(number: int, seconds: float, *, concurrency: int, rate: float | None = None) -> dict[str, Any]:
        traffic: RankTraffic = rank_traffic(
            address, population, requests=1, seconds=seconds, concurrency=concurrency, candidates=CANDIDATES,
            now_seconds=AS_OF.timestamp(), seed=number, rate=rate, deadline_ms=DEADLINE_MS,
            timeout_s=DEADLINE_MS / 1e3,
        )
        if concurrency == 1 and (failures := traffic.failures.by_code()):
            raise RuntimeError(f"a lone client was not answered: {failures}")
        return traffic.summary()

    turns: list[dict[str, dict[str, Any]]] = []
    with _giving_way():
        drive(0, seconds, concurrency=PATIENT)  # warms up
        for number in range(1, rounds + 1):
            before = drive(number, seconds / 3, concurrency=1)
            most = drive(number, seconds, concurrency=PATIENT)
            flooded = drive(number, seconds, concurrency=IMPATIENT, rate=3 * most["goodput_per_s"])
            after = drive(number, seconds / 3, concurrency=1)
            turns.append({"alone_before": before, "maximum": most, "flooded": flooded, "alone_after": after})

    def median(which: str, *path: str) -> float:
        values = []
        for turn in turns:
            value: Any = turn[which]
            for key in path:
                value = value[key]
            values.append(float(value))
        return statistics.median(values)

    by_round = [[turn[which]["goodput_per_s"] for turn in turns] for which in ("flooded", "maximum")]
    ratio, interval = ratio_by_round(*by_round)
    return Result(
        name, *map(statistics.median, by_round), "the most it answers in time, closed loop", ratio, "requests/s",
        {
            "ratio_is": "median over rounds of ours / rival", "ratio_interval_95": interval,
            "client": "its threads interrupt no other process (SCHED_BATCH)",
            "candidates": CANDIDATES, "deadline_ms": DEADLINE_MS,
            "rounds": len(turns), "seconds_a_turn": seconds, "offered_per_s": median("flooded", "offered_per_s"),
            "codes": [turn["flooded"]["failures"] for turn in turns],
            "p99_ms_of_answered": median("flooded", "latency_ms", "p99"),
            "p99_ms_at_maximum": median("maximum", "latency_ms", "p99"),
            "lag_p99_ms": median("flooded", "lag_ms", "p99"),
            "alone_p50_ms_before": median("alone_before", "latency_ms", "p50"),
            "alone_p50_ms_after": median("alone_after", "latency_ms", "p50"),
            "alone_first_second_p99_ms_after": statistics.median(
                turn["alone_after"]["timeline"][0]["p99_ms"] for turn in turns
            ),
            "goodput_rounds": by_round,
            **conditions, **environment(),
        },
    )
