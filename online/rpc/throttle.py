"""A client's throttle: most of what a server in overload would refuse is not even sent to it."""

import math
import random
import threading
import time
from collections.abc import Callable

__all__ = ["Throttle"]

SPARE = 1.25
"""What is sent, as a multiple of what is taken: a server that has room again is noticed by what is sent beyond."""
WINDOW_S = 0.5  # for which requests count; older ones fade
FEW = 5.0  # requests within it say little: so many are always sent


class Throttle:
    """Whether a request is sent to a server that has refused others for overload.

    A refusal costs a server time that it could answer in. So a client holds requests back, each with the probability

        max(0, (requests - SPARE * taken - FEW) / requests)

    of what it was asked to send and what the server took, over the last moments: "adaptive throttling", Beyer et al.,
    Site Reliability Engineering (2016), chapter 21, with counts that fade in place of a window, and with `FEW`, so that
    who asks now and then is not held back by what was. While a server refuses nothing, nothing is counted. Safe to use
    from several threads.

    >>> throttle = Throttle()
    >>> any(throttle.holds_back() for _ in range(1000))
    False

    Args:
        clock: seconds.
        draw: numbers in [0, 1).
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random
    ) -> None:
        self._clock, self._draw = clock, draw
        self._counting = threading.Lock()
        self._watching = False  # since a refusal, until what was counted has faded
        self._requests = self._taken = self._at = 0.0

    def holds_back(self) -> bool:
        """Whether the next request is not to be sent; it counts as one that was to be."""
        if not self._watching:
            return False
        with self._counting:
            self._fade()
            self._watching = self._requests > 0.01
            self._requests += 1
            probability = (self._requests - SPARE * self._taken - FEW) / self._requests
        return self._draw() < probability

    def taken(self) -> None:
        """The server worked on a request."""
        if self._watching:
            with self._counting:
                self._fade()
                self._taken += 1

    def refused(self) -> None:
        """The server was at its limit."""
        if not self._watching:
            with self._counting:
                self._requests, self._taken, self._at, self._watching = 1.0, 0.0, self._clock(), True

    def _fade(self) -> None:
        now = self._clock()
        left = math.exp((self._at - now) / WINDOW_S)
        self._requests, self._taken, self._at = self._requests * left, self._taken * left, now
