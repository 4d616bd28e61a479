"""Work on requests together that came while another was being worked on."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """A function of many items, called by many threads with one item each.

    ```
    thread 1   submit(a) ─ work([a]) ─────────┐
    thread 2      submit(b) ─ waits ──────────┴ work([b, c, d]) ─┐
    thread 3        submit(c) ─ waits ──────────────────────────►┴ its result
    thread 4             submit(d) ─ waits ─────────────────────►┴ its result
    ```

    Whoever finds nobody working works at once, so a lone request waits for nothing; whoever comes meanwhile waits, and
    the first of those works on all of them, itself included, as soon as the work before is done ("flat combining",
    Hendler et al., SPAA 2010, with the lead handed on after every batch). There is no thread and no delay of its own.

    A batch that raises is done again item by item: each thread gets its own item's error or result, so `work` must be
    free to be repeated.

    Args:
        work: items -> as many results, in their order. Never called by two threads at a time.
        max_size: most that a batch holds, in the unit of `size`; one item larger than that is worked on alone.
        size: of one item; 1 each by default.
        observe: told the number of items of each batch.

    >>> double = Batcher(lambda items: [2 * item for item in items])
    >>> double.submit(21)
    42
    """

    def __init__(
        self, work: Callable[[list[T]], Sequence[R]], *, max_size: int = 64, size: Callable[[T], int] = lambda _: 1,
        observe: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._work, self._max_size, self._size, self._observe = work, max_size, size, observe
        self._waiting: deque[_Turn[T, R]] = deque()
        self._working = False
        self._lock = threading.Lock()

    def submit(self, item: T) -> R:
        """The item's result; raises what `work` raises for this item by itself."""
        turn: _Turn[T, R] = _Turn(item, self._size(item))
        with self._lock:
            turn.leads = not self._working
            self._working = True
            self._waiting.append(turn)
        if not turn.leads:
            turn.wake.acquire()
        if turn.leads:
            self._lead()
        return turn.outcome()

    def _lead(self) -> None:
        """Work on the batch at the head of the queue, which holds the leader's own item; then hand the lead on."""
        with self._lock:
            batch = [self._waiting.popleft()]
            total = batch[0].size
            while self._waiting and (total := total + self._waiting[0].size) <= self._max_size:
                batch.append(self._waiting.popleft())
        try:
            self._observe(len(batch))
            self._answer(batch)
        finally:
            with self._lock:
                self._working = bool(self._waiting)
                if self._waiting:
                    self._waiting[0].leads = True
                    self._waiting[0].wake.release()
            for turn in batch:
                if not turn.leads:
                    turn.wake.release()

    def _answer(self, batch: "list[_Turn[T, R]]") -> None:
        try:
            results = self._work([turn.item for turn in batch])
            for turn, result in zip(batch, results, strict=True):
                turn.result, turn.error = result, None
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for turn in batch:
                self._answer([turn])


class _Turn(Generic[T, R]):
    """One item on its way. It waits on a bare lock: an Event costs four times as much and is needed once."""

    __slots__ = ("error", "item", "leads", "result", "size", "wake")

    def __init__(self, item: T, size: int) -> None:
        self.item, self.size = item, size
        self.result: R | None = None
        # stays only if the thread that led was torn down meanwhile
        self.error: Exception | None = RuntimeError("whoever worked on this item was stopped")
        self.leads = False
        self.wake = threading.Lock()
        self.wake.acquire()

    def outcome(self) -> R:
        if self.error is not None:
            raise self.error
        return self.result
