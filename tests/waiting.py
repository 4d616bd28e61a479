"""Waiting for what another thread or process does, and time that passes only when a test says so."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["PATIENCE_S", "PROGRAM_S", "FakeClock", "joined", "until"]

PATIENCE_S = 300.0
"""Bound of every wait in a test. A wait ends when what it waits for happens; it takes so long only if it never will."""
PROGRAM_S = 3000.0
"""Bound of a program that a test runs to its end. The demo, which takes three minutes, took 25 beside much else."""


def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Return once `condition()` holds; fails if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.002)


def joined(*threads: threading.Thread) -> None:
    """Wait for threads to end; fails if one does not."""
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} hangs"


@dataclass
class FakeClock:
    """Stands in for `online.clock.Clock`: whoever sleeps goes on at once, and finds that the time has passed.

    Attributes:
        slept: seconds of every sleep so far.
        meanwhile: called in every sleep, when its time has passed.
    """

    seconds: float = 1000.0
    slept: list[float] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        with self._turn:
            self.seconds += seconds

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        self.slept.append(seconds)
        self.meanwhile()
