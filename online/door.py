"""The threads that answer a port's calls, and what happens to who comes while all of them are busy."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Door"]


class Door(ThreadPoolExecutor):
    """At most `threads` calls at a time; any more are refused by the thread that takes calls in.

    ```
    gRPC's thread ──► a thread is free ──► that one reads the message and answers
      takes a call └► none is free ──────► it refuses, here and now: no message is read, no thread is woken
    ```

    In a thread of its own, and after its message was read, a refusal costs a server as much as a small lookup: under
    overload it is refusals that keep it from answering. So it costs half.

    gRPC submits a method's calls to the `experimental_thread_pool` of its behavior, whichever thread the behavior then
    runs in. A behavior asks `refuses` first; if so, it ends the call and waits for nothing.

    >>> door = Door(1, "lookup")
    >>> door.submit(lambda: door.refuses).result()
    False
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads, self._free = threads, threads
        self._counting, self._here = threading.Lock(), threading.local()

    @property
    def refuses(self) -> bool:
        """Whether the call that this thread works on came while all threads were busy."""
        return getattr(self._here, "refuses", False)

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
        with self._counting:
            free = self._free > 0
            self._free -= free
        if free:
            try:
                future = super().submit(call, *arguments, **named)
            except BaseException:  # no thread could be started
                self._one_left()
                raise
            future.add_done_callback(self._one_left)
            return future
        future = Future()
        self._here.refuses = True
        try:
            future.set_result(call(*arguments, **named))
        finally:
            self._here.refuses = False
        return future

    def _one_left(self, _: Future | None = None) -> None:
        with self._counting:
            self._free += 1
