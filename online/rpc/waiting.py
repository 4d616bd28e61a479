"""Calls that wait for their client: for its message, or for it to end a stream."""

import asyncio
from types import TracebackType

import grpc
import grpc.aio

from online.rpc_error import Code, RpcError

__all__ = ["WaitingCalls"]

MOST = 4096
LOOK_S = 1.0  # longest time between two looks at the calls that wait


class WaitingCalls:
    """Bounds how long a call waits for its client, and how many do: one more ends the one that waits longest.

    Such a call costs a coroutine and nothing else. An ordinary client sends its message within milliseconds, so its
    call is never among the oldest of many. For the coroutines of one event loop.

    ```
    with waiting.at_most(10.0):
        message = await context.read()
    ```

    One timer serves all calls, so a call may wait longer than it is allowed: by a quarter of that time, or by a second
    if that is less.

    Args:
        most: calls at a time.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._calls: dict[_Bounded, None] = {}  # in the order in which they began to wait
        self._looking = False

    def __len__(self) -> int:
        return len(self._calls)

    def at_most(self, seconds: float) -> "_Bounded":
        """Ends a block after so many seconds, or earlier where too many wait: `RpcError` DEADLINE."""
        return _Bounded(self, seconds)

    async def message(self, context: grpc.aio.ServicerContext, seconds: float) -> bytes | None:
        """The call's next message; None if it ended without one. Raises `RpcError` DEADLINE if none came in time."""
        with _Bounded(self, seconds):
            message = await context.read()
        return None if message is grpc.aio.EOF else message

    def _add(self, call: "_Bounded") -> None:
        self._calls[call] = None
        if not self._looking:
            self._look_later(call.seconds)
        if len(self._calls) > self._most:
            self._end(next(iter(self._calls)))

    def _remove(self, call: "_Bounded") -> None:
        self._calls.pop(call, None)

    def _look_later(self, seconds: float) -> None:
        self._looking = True
        asyncio.get_running_loop().call_later(min(seconds / 4, LOOK_S), self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for call in [call for call in self._calls if call.until <= now]:
            self._end(call)
        self._looking = False
        if self._calls:
            self._look_later(min(call.seconds for call in self._calls))

    def _end(self, call: "_Bounded") -> None:
        del self._calls[call]
        call.over = True
        call.task.cancel()


class _Bounded:
    __slots__ = ("_calls", "over", "seconds", "task", "until")

    def __init__(self, calls: WaitingCalls, seconds: float) -> None:
        self._calls, self.seconds, self.over = calls, seconds, False

    def __enter__(self) -> None:
        self.task = asyncio.current_task()
        self.until = self.task.get_loop().time() + self.seconds
        self._calls._add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls._remove(self)
        # uncancel: gRPC may have cancelled the call, too, and that holds.
        if self.over and self.task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise RpcError(
                Code.DEADLINE, "the client was waited for", expected=f"its message within {self.seconds:g} s",
                got="nothing", remedy="Send the message together with the call.",
            ) from error
