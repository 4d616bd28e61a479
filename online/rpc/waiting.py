"""Calls that wait for their client: for its message, or for it to end a stream."""

import asyncio
from types import TracebackType

import grpc

from online.rpc_error import Code, RpcError

__all__ = ["WaitingCalls"]

MOST = 4096


class WaitingCalls:
    """Bounds how long a call waits for its client, and how many do: one more ends the one that waits longest.

    Such a call costs a coroutine, some ten kilobytes, and nothing else. A client that means it sends its message within
    milliseconds, so it is never among the oldest of many. For the coroutines of one event loop.

    ```
    async with waiting.at_most(10.0):
        message = await context.read()
    ```

    Args:
        most: calls at a time.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._calls: dict[_Bounded, None] = {}  # in the order in which they began to wait

    def __len__(self) -> int:
        return len(self._calls)

    def at_most(self, seconds: float) -> "_Bounded":
        """Ends a block after so many seconds, or earlier where too many wait: `RpcError` DEADLINE."""
        return _Bounded(self, seconds)

    async def message(self, context: grpc.aio.ServicerContext, seconds: float) -> bytes | None:
        """The call's next message; None if it ended without one. Raises `RpcError` DEADLINE if none came in time."""
        async with _Bounded(self, seconds):
            message = await context.read()
        return None if message is grpc.aio.EOF else message

    def _add(self, call: "_Bounded") -> None:
        self._calls[call] = None
        if len(self._calls) > self._most:
            oldest = next(iter(self._calls))
            del self._calls[oldest]
            oldest.end_now()

    def _remove(self, call: "_Bounded") -> None:
        self._calls.pop(call, None)


class _Bounded:
    __slots__ = ("_calls", "_seconds", "_timeout")

    def __init__(self, calls: WaitingCalls, seconds: float) -> None:
        self._calls, self._seconds = calls, seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._calls._add(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls._remove(self)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as over:
            raise RpcError(
                Code.DEADLINE, "the client was waited for", expected=f"its message within {self._seconds:g} s",
                got="nothing", remedy="Send the message together with the call.",
            ) from over

    def end_now(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())
