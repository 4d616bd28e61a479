"""How many requests a server works on at a time; the others wait for their turn, as long as it can come in time."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from online.rpc_error import Code, RpcError

__all__ = ["Admission"]

MEMORY = 1 / 16  # weight of the latest request in the mean time of one
MARGIN = 1.5  # who is let in to wait is to be answered in time, even if it takes longer than it does in the mean


class Admission:
    """At most `slots` requests inside; the others wait in the order in which they came.

    ```
    enter ──► a free slot, nobody waiting ──► inside ──► leave: the slot goes straight to who has waited longest
         ├──► no free slot ─────────────────► waits ───► its deadline passes: DEADLINE
         └──► could not be done in time ────► OVERLOADED, at once
    ```

    Under overload a server thus works at its full rate on requests that still can be answered in time, and who cannot
    be knows at once: most from `online.rpc.door`, which asks `late` before it reads a message, and whose threads
    bound how many wait. Safe to use from many threads.

    >>> admission = Admission(slots=2)
    >>> with admission.admit(lambda: 0.5) as waited_s:
    ...     admission.in_flight, waited_s
    (1, 0.0)

    Args:
        slots: more than 0.

    Attributes:
        in_flight, waiting: requests now.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"expected slots >= 1, got {slots}")
        self.slots = slots
        self.in_flight = 0
        self._waiters: deque[threading.Lock] = deque()  # locked until a request's turn comes
        self._mean_s = 0.0  # time inside, of late
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @contextmanager
    def admit(self, remaining: Callable[[], float | None] = lambda: None) -> Iterator[float]:
        """`enter` and `leave` around a block, which gets the seconds waited."""
        waited_s = self.enter(remaining)
        began = time.perf_counter()
        try:
            yield waited_s
        finally:
            self.leave(time.perf_counter() - began)

    def enter(self, remaining: Callable[[], float | None]) -> float:
        """Wait for a slot, which is the caller's until `leave`; the seconds waited.

        Args:
            remaining: says how many seconds are left until the caller's deadline, None if it has none. Asked for only
                where there is no free slot: to try is then as cheap as to refuse.

        Raises:
            RpcError: OVERLOADED, at once, when the deadline is too near for this request's turn to come; DEADLINE, when
                it is over, or passes while the request waits.
        """
        with self._lock:
            if self.in_flight < self.slots:  # then nobody waits: a freed slot goes to who waits, if anybody does
                self.in_flight += 1
                return 0.0
        return self._wait(remaining())

    def late(self, remaining: Callable[[], float | None]) -> RpcError | None:
        """The refusal of a request that came now and could not be answered in time; None where it is to `enter`."""
        if self.in_flight < self.slots or (remaining_s := remaining()) is None:
            return None
        if remaining_s <= 0:
            return _too_late("the deadline was over when the request came")
        ahead = len(self._waiters)
        if remaining_s < MARGIN * self._mean_s * ((ahead + 1) / self.slots + 1):
            # Not DEADLINE, which is also what is said of a server that hangs: clients send less to one in overload.
            return RpcError(
                Code.OVERLOADED, "this server has too much to do to answer in time",
                expected="fewer requests, or more time",
                got=f"{remaining_s * 1e3:.0f} ms are left, and {ahead} requests wait before this one",
                remedy="Ask another replica, or later; nothing was begun.",
            )
        return None

    def leave(self, inside_s: float) -> None:
        """Free the slot, after so many seconds."""
        with self._lock:
            self._mean_s += (inside_s - self._mean_s) * MEMORY
            self._pass_on()

    def _wait(self, remaining_s: float | None) -> float:
        with self._lock:
            if self.in_flight < self.slots:  # one was freed meanwhile
                self.in_flight += 1
                return 0.0
            if late := self.late(lambda: remaining_s):
                raise late
            turn = threading.Lock()
            turn.acquire()
            self._waiters.append(turn)
        began = time.perf_counter()
        if not turn.acquire(timeout=-1 if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX)):
            self._give_up(turn)
            raise _too_late("it passed while the request waited for its turn")
        waited_s = time.perf_counter() - began
        if remaining_s is not None and remaining_s - waited_s < self._mean_s:  # an answer would come too late
            with self._lock:
                self._pass_on()
            raise _too_late(f"{(remaining_s - waited_s) * 1e3:.0f} ms were left when its turn came")
        return waited_s

    def _give_up(self, turn: threading.Lock) -> None:
        with self._lock:
            if turn in self._waiters:
                self._waiters.remove(turn)
            else:  # it came in this very moment
                self._pass_on()

    def _pass_on(self) -> None:
        if self._waiters:
            self._waiters.popleft().release()  # the slot changes hands; it never is free in between
        else:
            self.in_flight -= 1


def _too_late(got: str) -> RpcError:
    return RpcError(
        Code.DEADLINE, "the request cannot be answered in time", expected="time left for its turn and its answer",
        got=got, remedy="Allow it more time, or ask another replica.",
    )
