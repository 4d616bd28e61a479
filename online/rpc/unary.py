"""A remote method that takes one message and answers with one: called, or started now and waited for later."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from online.rpc_error import Code, RpcError

__all__ = ["StartedCall", "UnaryMethod"]


class UnaryMethod:
    """A method of a service, on a channel of `open_channel`. Safe to use from several threads.

    ```
    gRPC's future     starts a thread that waits ──► the thread wakes, and takes the interpreter from what the caller
                      does meanwhile ──► the caller wakes
    `start`           sends the request ──► the caller does what else it has to do, and reads the answer itself
    ```

    `start` asks for a stream of answers, which `open_channel` has gRPC read in the caller's thread. Of one answer a
    stream has the same bytes on the wire.

    Args:
        clock: seconds; runs as gRPC's deadlines do.
    """

    def __init__(
        self, channel: grpc.Channel, method: MethodDescriptor, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        name = f"/{method.containing_service.full_name}/{method.name}"
        serialize = GetMessageClass(method.input_type).SerializeToString
        parse = GetMessageClass(method.output_type).FromString
        self._unary = channel.unary_unary(name, serialize, parse)
        self._stream = channel.unary_stream(name, serialize, parse)
        self._clock = clock
        self._abandoned: deque[tuple[float, Any]] = deque()  # deadline and call
        self._freeing = threading.Lock()

    def __call__(self, request: Any, *, timeout: float) -> Any:
        """The answer. `timeout`: seconds. Raises `grpc.RpcError`."""
        return self._unary(request, timeout=timeout)

    def start(self, request: Any, *, timeout: float) -> "StartedCall":
        """Send the request and return at once. `timeout`: seconds."""
        self._free_abandoned()
        return StartedCall(self._stream(request, timeout=timeout), self._clock() + timeout, self._abandoned)

    @property
    def abandoned(self) -> int:
        """Calls that nobody waits for and whose memory gRPC still holds: at most those of the last timeout."""
        return len(self._abandoned)

    def _free_abandoned(self) -> None:
        """Read abandoned calls that are past their deadline, which does not block: gRPC frees a call when it was read.

        A call that is cancelled cannot be read any more: its memory would stay until the channel is closed.
        """
        if not self._abandoned or not self._freeing.acquire(blocking=False):
            return
        try:
            while self._abandoned and self._abandoned[0][0] <= self._clock():
                with suppress(grpc.RpcError):
                    for _ in self._abandoned.popleft()[1]:
                        pass
        finally:
            self._freeing.release()


class StartedCall:
    """A call under way. One that nobody holds any more is abandoned: it ends at its deadline."""

    __slots__ = ("_abandoned", "_answers", "_deadline")

    def __init__(self, answers: Any, deadline: float, abandoned: deque[tuple[float, Any]]) -> None:
        self._answers, self._deadline, self._abandoned = answers, deadline, abandoned

    def result(self) -> Any:
        """Wait for the answer, in one thread, once.

        Raises:
            grpc.RpcError: it was refused, or did not come within the timeout.
            RpcError: INTERNAL, the server sent no answer, or more than one.
        """
        answers, self._answers = self._answers, None
        answer = next(answers, None)
        if answer is None or next(answers, None) is not None:
            self._answers = answers  # there may be more
            raise RpcError(
                Code.INTERNAL, "answer of a call", expected="one message",
                got="none" if answer is None else "more than one", remedy="Check what listens at that address.",
            )
        return answer

    def __del__(self) -> None:
        if self._answers is not None:
            self._abandoned.append((self._deadline, self._answers))
