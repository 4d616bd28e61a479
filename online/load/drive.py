"""Driving servers: a closed loop, where each thread waits for its answer, and an open one, which waits for nobody.

A closed loop asks what a fixed number of patient clients would see: while the server stalls, nobody asks, so one long
answer stands for all that would have been long. An open loop asks at its own rate, and counts every latency from the
moment when the request was due; the requests that a stall holds up all show it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from online.clock import CLOCK, Clock

__all__ = ["Begin", "Send", "drive"]

Begin = Callable[[], float]
"""Call once, when the request is ready to be sent: returns the moment, by the drive's clock, from which its latency
counts."""

Send = Callable[[int, np.random.Generator, Begin], None]
"""Makes request `number` from the thread's random generator, calls `begin`, and sends it."""

NAP_S = 0.25  # longest sleep before looking whether the drive is over


class _Ended(Exception):
    """No further request is to be sent."""


class _Pace(Protocol):
    def begin(self) -> float:
        """Wait for the turn of a request; raises `_Ended` when there is none."""
        ...


class _Closed:
    def __init__(self, think_s: float, enough: Callable[[int, float], bool], clock: Clock) -> None:
        self._think_s, self._enough, self._sent, self._clock = think_s, enough, count(), clock
        self._began = clock.now()

    def begin(self) -> float:
        if self._think_s:
            self._clock.sleep(self._think_s)
        now = self._clock.now()
        if self._enough(next(self._sent), now - self._began):
            raise _Ended
        return now


class _Poisson:
    """Arrivals at `rate` a second, independent of each other and of the answers.

    One thread at a time waits for the next arrival. When all are busy, arrivals are late, which `begin` does not hide:
    it returns when the request was due.
    """

    def __init__(
        self, rate: float, seed: int, *, enough: Callable[[int, float], bool], ended: Callable[[], bool], clock: Clock
    ) -> None:
        self._mean_gap_s, self._random = 1 / rate, np.random.default_rng([seed, 0xA7])
        self._enough, self._ended, self._clock = enough, ended, clock
        self._turn, self._arrivals = threading.Lock(), 0
        self._began = clock.now()
        self._due_s = self._random.exponential(self._mean_gap_s)

    def begin(self) -> float:
        with self._turn:
            if self._enough(self._arrivals, self._due_s):
                raise _Ended
            due = self._began + self._due_s
            while (early_s := due - self._clock.now()) > 0:
                self._clock.sleep(min(early_s, NAP_S))
                if early_s > NAP_S and self._ended():
                    raise _Ended
            self._arrivals += 1
            self._due_s += self._random.exponential(self._mean_gap_s)
            return due


def drive(
    send: Send, *, requests: int, seconds: float, concurrency: int, seed: int, rate: float | None = None,
    think_s: float = 0.0, until: Path | None = None, stop: threading.Event | None = None, clock: Clock = CLOCK,
) -> float:
    """Send requests from `concurrency` threads until there were enough.

    Args:
        send: what it raises ends the drive.
        requests, seconds, until: the drive ends when both numbers are reached and the file exists (None: no file).
        rate: requests a second of an open loop, as Poisson arrivals; None: a closed loop, each thread sending its next
            request when its last was answered.
        think_s: how long a thread of a closed loop waits before each of its requests.
        concurrency: also of an open loop; with too few threads requests are sent late.
        stop: set it to end the drive early.
        clock: what arrivals are due by, and waited for by.

    Returns:
        Seconds it took.
    """
    over, numbers = threading.Event(), count()

    def ended() -> bool:
        return over.is_set() or (stop is not None and stop.is_set())

    def enough(sent: int, after_s: float) -> bool:
        return ended() or (sent >= requests and after_s >= seconds and (until is None or until.exists()))

    pace: _Pace
    if rate is None:
        pace = _Closed(think_s, enough, clock)
    else:
        pace = _Poisson(rate, seed, enough=enough, ended=ended, clock=clock)

    def work(thread: int) -> None:
        random = np.random.default_rng([seed, thread])
        try:
            while True:
                send(next(numbers), random, pace.begin)
                bar.update()
        except _Ended:
            return
        except BaseException:
            over.set()
            raise

    began = clock.now()
    progress = tqdm(total=requests, desc="requests", unit="req", disable=None)
    with progress as bar, ThreadPoolExecutor(concurrency, thread_name_prefix="load") as pool:
        threads = [pool.submit(work, number) for number in range(concurrency)]
        try:
            for thread in threads:
                thread.result()
        finally:
            over.set()
    return clock.now() - began
