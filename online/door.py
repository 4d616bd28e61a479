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

    Raises:
        RuntimeError: not so many threads can be started.

    >>> door = Door(1, "lookup")
    >>> door.submit(lambda: door.refuses).result()
    False
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads, self._free = threads, threads
        self._start_all()
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
            future = super().submit(call, *arguments, **named)
            future.add_done_callback(self._one_left)
            return future
        future = Future()
        self._here.refuses = True
        try:
            future.set_result(call(*arguments, **named))
        finally:
            self._here.refuses = False
        return future

    def _start_all(self) -> None:
        """Now, where an error is seen. Raised by `submit`, it would end gRPC's thread, and with it the port."""
        all_run = threading.Barrier(self.threads)
        try:
            waiting = [super(Door, self).submit(all_run.wait) for _ in range(self.threads)]
        except BaseException:
            all_run.abort()
            raise
        for each in waiting:
            each.result()

    def _one_left(self, _: Future) -> None:
        with self._counting:
            self._free += 1
