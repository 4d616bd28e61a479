"""How many requests a server works on at a time; the others wait for their turn, as long as it can come in time."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from online.rpc_error import Code, RpcError

__all__ = ["Admission"]

MEMORY = 1 / 16  # weight of the latest request in the mean time of one
MARGIN = 1.5  # a request that may wait is to be answered in time, even if it takes longer than the mean


class Admission:
    """At most `slots` requests inside and `queue` waiting, in the order in which they came.

    ```
    enter ──► a free slot ─────────────────► inside ──► leave: the slot goes to the request that has waited longest
         ├──► no free slot ────────────────► waits ───► its call ends, by its deadline or by its client
         └──► the queue is full, or its turn would come too late ──► OVERLOADED, at once
    ```

    Under overload a server thus works at its full rate on requests that can still be answered in time, and refuses the
    others at once. For the coroutines of one event loop: there is no lock.

    Args:
        slots: more than 0.
        queue: not negative.
        clock: seconds.

    Attributes:
        in_flight, waiting: requests now.
    """

    def __init__(self, slots: int, queue: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        if slots < 1 or queue < 0:
            raise ValueError(f"expected slots >= 1 and queue >= 0, got {slots} and {queue}")
        self.slots, self.queue, self._clock = slots, queue, clock
        self.in_flight = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._mean_s = 0.0  # time inside, of late

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def check(self, remaining_s: float | None) -> None:
        """Raise what `enter` would raise at once.

        Args:
            remaining_s: until the request's deadline; None: it has none.
        """
        if self.in_flight < self.slots:
            return  # to try is as cheap as to refuse
        ahead = len(self._waiters)
        if ahead >= self.queue:
            raise RpcError(
                Code.OVERLOADED, "this server is at its limit",
                expected=f"at most {self.slots} requests that are worked on, and {self.queue} that wait",
                got="one more", remedy="Ask another replica, or later; nothing was begun.",
            )
        if remaining_s is None:
            return
        if remaining_s <= 0:
            raise _too_late("the deadline was over when the request came")
        if remaining_s < MARGIN * self._mean_s * ((ahead + 1) / self.slots + 1):
            # Not DEADLINE, which is also what is said of a server that hangs: clients send less to one in overload.
            raise RpcError(
                Code.OVERLOADED, "this server has too much to do to answer in time",
                expected="fewer requests, or more time",
                got=f"{remaining_s * 1e3:.0f} ms are left, and {ahead} requests wait before this one",
                remedy="Ask another replica, or later; nothing was begun.",
            )

    async def enter(self, remaining_s: float | None = None) -> float:
        """Wait for a slot, which is the caller's until `leave`; returns the seconds waited. Cancelled, it gets none.

        Args:
            remaining_s: until the request's deadline; None: it has none.

        Raises:
            RpcError: OVERLOADED, at once, when the queue is full, or the deadline is too near for this request's turn
                to come; DEADLINE, when it is over, or so near that the answer would come too late.
        """
        if self.in_flight < self.slots:  # then none waits: a freed slot goes to a waiting request, if there is one
            self.in_flight += 1
            return 0.0
        self.check(remaining_s)
        turn = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        began = self._clock()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came in this very moment
                self._pass_on()
            elif turn in self._waiters:
                self._waiters.remove(turn)
            raise
        waited_s = self._clock() - began
        if remaining_s is not None and remaining_s - waited_s < self._mean_s:
            self._pass_on()
            raise _too_late(f"{(remaining_s - waited_s) * 1e3:.0f} ms were left when its turn came")
        return waited_s

    def leave(self, inside_s: float) -> None:
        """Free the slot, after so many seconds."""
        self._mean_s += (inside_s - self._mean_s) * MEMORY
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiters:
            turn = self._waiters.popleft()
            if not turn.done():  # one that was cancelled is about to remove itself
                turn.set_result(None)  # the slot changes hands; it never is free in between
                return
        self.in_flight -= 1


def _too_late(got: str) -> RpcError:
    return RpcError(
        Code.DEADLINE, "the request cannot be answered in time", expected="time left for its turn and its answer",
        got=got, remedy="Allow it more time, or ask another replica.",
    )
