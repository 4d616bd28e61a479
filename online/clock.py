"""Time as this process sees it, for what waits or measures; a test gives it another."""

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CLOCK", "Clock"]


@dataclass(frozen=True)
class Clock:
    """A clock and how to wait by it.

    Attributes:
        now: seconds since some moment; never runs backwards.
        sleep: returns after so many seconds.

    >>> frozen = Clock(now=lambda: 7.0, sleep=lambda seconds: None)
    >>> frozen.now()
    7.0
    """

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()
