"""What a call passes on its way to a service and back."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

from online.observe import metrics, request_log
from online.printable import printable
from online.rpc.executor import Executor
from online.rpc.gate import Gate
from online.rpc.limits import Limits
from online.rpc.message import parsed
from online.rpc.unread import UnreadAnswers
from online.rpc.waiting import WaitingCalls
from online.rpc_error import RpcError, abort, rpc_error_of
from pipelines.contracts.errors import FacetError

__all__ = ["Call", "Guard"]

Handler = grpc.RpcMethodHandler
GIVEN_UP_S = 0.1  # after a call has ended without a message, until it is taken for one of a wrong client


class Call(NamedTuple):
    """What a service is told of a call beside its message.

    Attributes:
        arrived: when it came, of `time.perf_counter()`.
        waited_s: seconds until it was its turn.
        deadline: of `time.monotonic()`.
    """

    arrived: float
    waited_s: float
    deadline: float

    def time_remaining(self) -> float:
        """Seconds until the deadline, not negative."""
        return max(self.deadline - time.monotonic(), 0.0)


class Guard:
    """Puts the same steps before every method of a port.

    ```
    call ──► credentials ──► deadline ──► room? ──► message ──► a thread ──► answer ──► read by the client
             who may call    of at most   work and  counted,    works on it             or the call ends
                             `call_s`     unread    parsed
                                          answers
    ```

    Everything but the work is done by coroutines of one event loop. Before its message is there, and after its work is
    done, a call thus holds nothing that another call could be waiting for. gRPC itself ends a call at its deadline,
    also one whose answer is not read: that is why every call has to have one.

    Methods are plain functions of a message and a `Call`, as generated servicers have them. They run in a thread of the
    executor; one that is quick, and comes while nothing else is worked on, in the event loop itself: to wake a thread
    takes as long as a small lookup.

    Args:
        name: what the metrics call the port.
        gate: None: everybody may call.
        audited: whether every call is logged, with its outcome.
        is_quick: whether a message is answered without waiting for anything, in the time of a small lookup.

    Attributes:
        unread: answers that were given to gRPC.
    """

    def __init__(
        self, name: str, executor: Executor, waiting: WaitingCalls, limits: Limits, *, gate: Gate | None = None,
        audited: bool = False, is_quick: Callable[[bytes], bool] = lambda message: False,
    ) -> None:
        self._name, self._executor, self._waiting, self._limits = name, executor, waiting, limits
        self._gate, self._audited, self.is_quick = gate, audited, is_quick
        self.unread = UnreadAnswers(of_connection=limits.unread_bytes, of_all=limits.all_unread_bytes)

    def handler(self, handler: Handler, method: str) -> Handler:
        """A handler for gRPC's asyncio server that guards one of a servicer.

        As one of a stream of messages, which is the same to a client: gRPC would wait for a single message before
        anybody is asked whether the caller may send it.

        Raises:
            TypeError: the method streams.
        """
        if handler.unary_unary is None:
            raise TypeError(f"{method} streams; only calls of one request and one answer are guarded")

        async def answer(_: Any, context: grpc.aio.ServicerContext) -> bytes:
            return await self._answer(handler, method, context)

        return grpc.stream_unary_rpc_method_handler(answer)

    async def _answer(self, handler: Handler, method: str, context: grpc.aio.ServicerContext) -> bytes:
        arrived = time.perf_counter()
        served = _Served(method)
        error: RpcError | None = None
        try:
            answer = await self._work(handler, served, context, arrived)
        except asyncio.CancelledError:  # by the client, or by gRPC at the deadline
            if not served.counted:
                metrics.observe_request(self._name, "CANCELLED", 0.0)
            raise
        except Exception as raised:
            if not isinstance(raised, FacetError):
                request_log.log_defect(served.name, raised)
            error = rpc_error_of(raised, served.name)
        if self._audited:
            outcome = error.code.name if error else "OK"
            request_log.audit(
                method.lstrip("/"), served.caller, served.version, outcome, time.perf_counter() - arrived,
                peer=context.peer(),
            )
        if error is None:
            return answer
        if not served.counted:
            request_log.count_refused(self._name, error, peer=context.peer())
        await abort(context, error)

    async def _work(
        self, handler: Handler, served: "_Served", context: grpc.aio.ServicerContext, arrived: float
    ) -> bytes:
        admission, connection = self._executor.admission, context.peer()
        if self._gate:
            served.caller = self._gate.admit(context)
        remaining_s = self._limits.remaining_s(context)
        admission.check(remaining_s)  # before the message: under overload, it is reading that costs
        self.unread.check(connection)
        raw = await self._waiting.message(context, min(self._limits.message_s, remaining_s))
        if raw is None:  # also of a call that was given up, which gRPC says, by ending this, only now
            await asyncio.sleep(GIVEN_UP_S)
        request = parsed(raw, handler.request_deserializer)
        served.request = request
        deadline = time.monotonic() + remaining_s - (time.perf_counter() - arrived)

        def work(waited_s: float) -> bytes:
            served.counted = True
            return handler.response_serializer(handler.unary_unary(request, Call(arrived, waited_s, deadline)))

        if not admission.in_flight and self.is_quick(raw):
            answer = work(0.0)
        else:
            answer = await self._executor.run(work, deadline - time.monotonic())
        size, served.counted = len(answer), False
        self.unread.check(connection, size)
        self.unread.add(connection, size)
        context.add_done_callback(lambda _: self.unread.remove(connection, size))
        return answer


class _Served:
    """A call as far as it is known.

    Attributes:
        request: once it was read.
        counted: whether the service is at it, which counts and logs what becomes of its requests.
    """

    __slots__ = ("_method", "caller", "counted", "request")

    def __init__(self, method: str) -> None:
        self._method, self.caller, self.request, self.counted = method, "", None, False

    @property
    def name(self) -> str:
        """For the log, and for the client if the call fails by a defect."""
        request_id = getattr(self.request, "request_id", "")
        return f"request {printable(request_id)}" if request_id else self._method

    @property
    def version(self) -> int:
        """That the request names, if it does."""
        return getattr(self.request, "version", 0)
