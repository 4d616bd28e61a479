"""A client's throttle: it rejects most of what a server in overload would refuse, before it is sent."""

import math
import random
import threading
import time
from collections.abc import Callable

__all__ = ["Throttle"]

ACCEPTS_MULTIPLIER = 1.25
"""Requests that are sent for each one accepted: what is sent beyond shows that a server has room again."""
WINDOW_S = 0.5  # time constant by which counts decay
MIN_REQUESTS = 5.0  # within the window: so many are always sent, as they say little


class Throttle:
    """Adaptive throttling of the requests to one server: Beyer et al., Site Reliability Engineering (2016), chapter 21.

    A refusal costs a server time in which it could answer. So a client rejects requests by itself, each with the
    probability

        max(0, (requests - ACCEPTS_MULTIPLIER * accepts - MIN_REQUESTS) / requests)

    of the recent requests and of those that the server accepted. Unlike there, counts decay instead of leaving a
    window, and `MIN_REQUESTS` lets a client that sends little send everything. Nothing is counted until the server
    refuses a request for overload. Safe to use from several threads.

    >>> throttle = Throttle()
    >>> any(throttle.rejects() for _ in range(1000))
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
        self._active = False  # from a refusal until the counts have decayed
        self._requests = self._accepts = self._at = 0.0

    def rejects(self) -> bool:
        """Count a request; whether it is not to be sent."""
        if not self._active:
            return False
        with self._counting:
            self._decay()
            self._active = self._requests > 0.01
            self._requests += 1
            probability = (self._requests - ACCEPTS_MULTIPLIER * self._accepts - MIN_REQUESTS) / self._requests
        return self._draw() < probability

    def accepted(self) -> None:
        """The server worked on a request."""
        if self._active:
            with self._counting:
                self._decay()
                self._accepts += 1

    def overloaded(self) -> None:
        """The server refused a request for overload."""
        if not self._active:
            with self._counting:
                self._requests, self._accepts, self._at, self._active = 1.0, 0.0, self._clock(), True

    def _decay(self) -> None:
        now = self._clock()
        left = math.exp((self._at - now) / WINDOW_S)
        self._requests, self._accepts, self._at = self._requests * left, self._accepts * left, now
