"""A call that is sent now and waited for later, by the thread that sent it.

```
gRPC's future   sends the call, and begins a thread that waits ──► the thread wakes for the answer, and takes the
                interpreter from what the caller does meanwhile ──► the caller wakes
here            sends the call ──► the caller does what else it has to do, and reads the answer that lies there
```

A lookup overlaps with work in the same interpreter, which pays for that thread. gRPC has no public way to do without:
this one uses what `grpc._channel` calls its own, as gRPC's calls that block do. Where that is not as it was when this
was written, a call is gRPC's future, which is as right; `tests/online/test_sent_call.py` then fails.
"""

import inspect
import time
from typing import Any, Protocol

import grpc
from grpc import _channel, _common
from grpc._cython import cygrpc

__all__ = ["KNOWN", "Pending", "send"]


class Pending(Protocol):
    """A call under way."""

    def result(self) -> Any:
        """Wait for the answer, by one thread, once; raises `grpc.RpcError`."""
        ...

    def cancel(self) -> Any:
        """Wait for it no longer."""
        ...


def _is_known() -> bool:
    try:
        method = _channel._UnaryUnaryMultiCallable
        parameters = [
            [*inspect.signature(function).parameters]
            for function in (method._prepare, _channel._handle_event, _channel._end_unary_response_blocking)
        ]
    except (AttributeError, TypeError, ValueError):
        return False
    return (
        parameters == [
            ["self", "request", "timeout", "metadata", "wait_for_ready", "compression"],
            ["event", "state", "response_deserializer"],
            ["state", "call", "with_call", "deadline"],
        ]
        and {"_channel", "_context", "_method", "_response_deserializer", "_target"} <= {*method.__slots__}
        and "_registered_call_handle" in method.__annotations__
        and hasattr(_channel, "_determine_deadline") and hasattr(_common, "decode")
        and hasattr(cygrpc, "PropagationConstants") and hasattr(cygrpc.Channel, "segregated_call")
        and hasattr(cygrpc.SegregatedCall, "next_event") and hasattr(cygrpc.SegregatedCall, "cancel")
    )  # fmt: skip


KNOWN = _is_known()
"""Whether the gRPC that is installed is one that this knows."""


class _Sent:
    """A call with a completion queue of its own, at which nobody looks before its result is asked for."""

    __slots__ = ("_call", "_method", "_state")

    def __init__(self, method: Any, request: Any, timeout: float, metadata: Any) -> None:
        self._call, self._method = None, method
        state, operations, deadline, error = method._prepare(request, timeout, metadata, None, None)
        if error is not None:
            raise error
        state.rpc_start_time = time.perf_counter()
        state.method, state.target = _common.decode(method._method), _common.decode(method._target)
        self._state = state
        self._call = method._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS, method._method, None,
            _channel._determine_deadline(deadline), metadata, None, ((operations, None),), method._context,
            method._registered_call_handle,
        )  # fmt: skip

    def result(self) -> Any:
        call, state = self._call, self._state
        event = call.next_event()
        self._call = None
        _channel._handle_event(event, state, self._method._response_deserializer)
        return _channel._end_unary_response_blocking(state, call, False, None)

    def cancel(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel(grpc.StatusCode.CANCELLED.value[0], "nobody waits for it")
            call.next_event()  # comes at once; then gRPC forgets the call

    def __del__(self) -> None:
        if self._call is not None:
            self.cancel()


def send(method: Any, request: Any, timeout: float, metadata: Any = None) -> Pending:
    """Make a call, and return at once. One that nobody holds any more is cancelled.

    With the poller of our own processes (`poller`), what does not leave at once leaves when somebody waits, for
    this call or another one: where the connection has to be made first, or of a message of more than 64 KiB, the rest.

    Args:
        method: what a channel makes of the name of a method that takes one message and answers by one; or whatever has
            a `send` of its own.
        timeout: seconds.
    """
    if not isinstance(method, _channel._UnaryUnaryMultiCallable):
        return method.send(request, timeout)
    if KNOWN:
        return _Sent(method, request, timeout, metadata)
    return method.future(request, timeout=timeout, metadata=metadata)
