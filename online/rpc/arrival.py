"""Calls that were opened but whose message does not come: each holds one of the server's threads, or its place."""

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import grpc

__all__ = ["Arrivals", "Cancellable"]


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Arrivals:
    """Waits for messages, and cancels calls whose message takes too long; by them, anybody who can connect could
    otherwise keep all others out for as long as he likes. Safe from many threads.

    Args:
        limit_s: from when a message is waited for until its call is cancelled, give or take a quarter.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waiting: dict[int, tuple[float, Cancellable]] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._watch, name="arrivals", daemon=True).start()

    def message(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes | None:
        """The call's message; None if it ended without one. Raises what gRPC does when the call is cancelled."""
        number = self.expect(context)
        try:
            return next(messages, None)
        finally:
            self.came(number)

    def expect(self, call: Cancellable) -> int:
        """A message is waited for from now on; until `came` is told the number that this returns."""
        number = next(self._numbers)
        self._waiting[number] = time.monotonic(), call
        return number

    def came(self, number: int) -> None:
        """The message is there, or its call has ended."""
        del self._waiting[number]

    def _watch(self) -> None:
        while True:
            time.sleep(self._limit_s / 4)
            late = time.monotonic() - self._limit_s
            for since, call in list(self._waiting.values()):
                if since <= late:
                    call.cancel()
