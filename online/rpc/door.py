"""The threads that answer a port's calls, and what happens to who comes while all of them are busy."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from online.rpc.arrival import Arrivals
from online.rpc.first_message import receive_first, time_left
from online.rpc_error import Code, RpcError

__all__ = ["Door"]


class Door(ThreadPoolExecutor):
    """At most `threads` calls at a time; any more, and those that come too late, are refused by the thread that takes
    calls in.

    ```
    gRPC's thread ──► fewer are here ──► it asks for the message ──► one of the threads answers
      takes a call │                                              └► quick, and nobody else here: it answers itself
                   └► so many are, or the call cannot be answered in time
                                   └───► it refuses, here and now: no message is read, no thread is woken
    ```

    In a thread of its own, and after its message was read, a refusal costs a server as much as a small lookup: under
    overload it is refusals that keep it from answering. So it costs half.

    To wake a thread takes as long as a small lookup. While one client asks at a time, nobody has to.

    gRPC submits a method's calls to the `experimental_thread_pool` of its behavior, if that is an executor of this
    kind, whichever thread the behavior then runs in. A behavior looks at `refusal` first; if there is one, it ends the
    call by it and waits for nothing.

    Args:
        threads: all are started at once, where an error is seen. Raised by `submit`, it would end gRPC's thread, and
            with it the port.
        arrivals: watches over calls whose message does not come. They count, too.

    Attributes:
        is_quick: whether a call with this message is answered without waiting for anything, in the time of a small
            lookup.
        late: given what says how many seconds a call has left, the refusal of one that could not be answered in time;
            as of `online.rpc.admission`.

    Raises:
        RuntimeError: not so many threads can be started.

    >>> door = Door(1, "lookup", Arrivals(10.0))
    >>> door.submit(lambda: door.refusal).result() is None
    True
    """

    def __init__(self, threads: int, name: str, arrivals: Arrivals) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads, self._free, self._arrivals = threads, threads, arrivals
        self.is_quick: Callable[[bytes], bool] = lambda message: False
        self.late: Callable[[Callable[[], float]], RpcError | None] = lambda remaining: None
        self._counting, self._here = threading.Lock(), threading.local()
        self._desks = [_Desk() for _ in range(threads)]
        self._idle = [*self._desks]  # the latest to become idle is the next to work: what it needs is still in caches
        try:
            for number, desk in enumerate(self._desks):
                threading.Thread(target=self._work_at, args=[desk], name=f"{name}_{number}", daemon=True).start()
        except RuntimeError:
            self.shutdown()
            raise

    @property
    def refusal(self) -> RpcError | None:
        """Of the call that this thread works on, if it is to be refused."""
        return getattr(self._here, "refusal", None)

    def submit(self, call: Callable[..., Any], /, *work: Any) -> Future:
        future = Future()
        refusal = self.late(lambda: time_left(work)) or self._let_in()
        if refusal is None:
            self._receive(future, call, work)
        else:
            self._here.refusal = refusal
            try:
                future.set_result(call(*work))
            finally:
                self._here.refusal = None
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, each after what it answers; nothing more is to be submitted."""
        for desk in self._desks:
            desk.put(None)
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _let_in(self) -> RpcError | None:
        with self._counting:
            if self._free:
                self._free -= 1
                return None
        return RpcError(
            Code.OVERLOADED, "this server is at its limit", expected=f"at most {self.threads} requests at a time",
            got="one more", remedy="Ask another replica, or later; nothing was begun.",
        )

    def _receive(self, future: Future, call: Callable[..., Any], work: tuple) -> None:
        """Have the call answered once its message is there."""
        number = None

        def answer(message: bytes | None, work: tuple) -> None:
            desk = self._idle.pop()
            if number is not None:
                self._arrivals.came(number)
            if message is not None and self._free == self.threads - 1 and self.is_quick(message):
                self._answer(desk, future, call, work)
            else:
                desk.put((future, call, work))

        if receiving := receive_first(work, answer):
            number = self._arrivals.expect(receiving)  # in time: it is this thread that will call `answer`
        else:
            answer(None, work)

    def _work_at(self, desk: "_Desk") -> None:
        while task := desk.get():
            self._answer(desk, *task)
            del task  # frees the call now: not when the next one waits for its answer

    def _answer(self, desk: "_Desk", future: Future, call: Callable[..., Any], work: tuple) -> None:
        try:
            result = call(*work)
        except BaseException as error:
            self._is_idle(desk)
            future.set_exception(error)
        else:
            self._is_idle(desk)
            future.set_result(result)

    def _is_idle(self, desk: "_Desk") -> None:
        self._idle.append(desk)  # before it counts as free: whoever is let in finds one
        with self._counting:
            self._free += 1


class _Desk(SimpleQueue):
    """Where one thread waits for its next call, or for None, the end."""
