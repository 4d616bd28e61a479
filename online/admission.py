"""How many requests a server works on at a time; the others wait for their turn, as long as it can come in time."""

import threading
import time
from collections import deque
from types import TracebackType

from online.refusal import Code, Refusal

__all__ = ["Admission"]

MEMORY = 1 / 16  # weight of the latest request in the mean time of one
MARGIN = 1.5  # who is let in to wait is to be answered in time, even if it takes longer than it does in the mean


class Admission:
    """At most `slots` requests inside; the others wait in the order in which they came.

    ```
    admit ──► a free slot, nobody waiting ──► inside ──► the slot goes straight to who has waited longest
         ├──► no free slot ─────────────────► waits ───► its deadline passes: DEADLINE
         └──► could not be done in time ────► DEADLINE, at once
    ```

    Under overload a server thus works at its full rate on requests that still can be answered in time, and who cannot
    be knows at once. How many wait is up to the server's threads (`online.door`). Safe to use from many threads.

    >>> admission = Admission(slots=2)
    >>> with admission.admit(0.5) as waited_s:
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
        self._waiters: deque[_Admitted] = deque()
        self._mean_s = 0.0  # time inside, of late
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def admit(self, remaining_s: float | None = None) -> "_Admitted":
        """A context manager: entering it waits for a slot and gives the seconds waited; leaving it frees the slot.

        Args:
            remaining_s: until the caller's deadline; None: it has none.

        Raises (when it is entered):
            Refusal: DEADLINE, at once, when the deadline is over or too near for this request's turn to come; later,
                when it passes while the request waits.
        """
        return _Admitted(self, remaining_s)

    def _enter(self, request: "_Admitted") -> float:
        remaining_s = request.remaining_s
        if remaining_s is not None and remaining_s <= 0:
            raise _too_late("the deadline was over when the request came")
        with self._lock:
            if self.in_flight < self.slots:  # then nobody waits: a freed slot goes to who waits, if anybody does
                self.in_flight += 1
                return 0.0
            ahead = len(self._waiters)
            if remaining_s is not None and remaining_s < MARGIN * self._mean_s * ((ahead + 1) / self.slots + 1):
                raise _too_late(f"{remaining_s * 1e3:.0f} ms are left, and {ahead} requests wait before this one")
            request.turn = threading.Lock()
            request.turn.acquire()
            self._waiters.append(request)
        began = time.perf_counter()
        if not request.turn.acquire(timeout=-1 if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX)):
            self._give_up(request)
            raise _too_late("it passed while the request waited for its turn")
        waited_s = time.perf_counter() - began
        if remaining_s is not None and remaining_s - waited_s < self._mean_s:  # an answer would come too late
            with self._lock:
                self._pass_on()
            raise _too_late(f"{(remaining_s - waited_s) * 1e3:.0f} ms were left when its turn came")
        return waited_s

    def _give_up(self, request: "_Admitted") -> None:
        with self._lock:
            if request in self._waiters:
                self._waiters.remove(request)
            else:  # its turn came in this very moment
                self._pass_on()

    def _leave(self, inside_s: float) -> None:
        with self._lock:
            self._mean_s += (inside_s - self._mean_s) * MEMORY
            self._pass_on()

    def _pass_on(self) -> None:
        if self._waiters:
            self._waiters.popleft().turn.release()  # the slot changes hands; it never is free in between
        else:
            self.in_flight -= 1


class _Admitted:
    """One request's way through; a class and not a generator, which would take three times as long."""

    __slots__ = ("_admission", "_began", "remaining_s", "turn")

    def __init__(self, admission: Admission, remaining_s: float | None) -> None:
        self._admission, self.remaining_s = admission, remaining_s
        self.turn: threading.Lock | None = None

    def __enter__(self) -> float:
        waited_s = self._admission._enter(self)
        self._began = time.perf_counter()
        return waited_s

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._leave(time.perf_counter() - self._began)


def _too_late(got: str) -> Refusal:
    return Refusal(
        Code.DEADLINE, "the request cannot be answered in time", expected="time left for its turn and its answer",
        got=got, remedy="Allow it more time, or ask another replica.",
    )
