"""A call's message, received before a thread is woken for the call; and its deadline, known before that.

```
gRPC by itself   a call comes ──► a thread wakes, asks for the message, waits ──► it comes ──► the thread wakes again
here             a call comes ──► its message is asked for ──► it comes ──► a thread wakes
```

To wake a thread is a large part of a small lookup. gRPC has no public way to do it once: this one uses what
`grpc._server` calls its own. Where that is not as it was when this was written, calls go gRPC's way, which is as right;
`tests/online/test_first_message.py` then fails.
"""

import inspect
import math
import time
from collections.abc import Callable
from typing import Any

from grpc import _server
from grpc._cython import cygrpc

__all__ = ["KNOWN", "Received", "receive_first", "time_left"]

_NO_FLAGS = 0


def _is_known() -> bool:
    try:
        arguments = [*inspect.signature(_server._unary_response_in_pool).parameters]
        receiving = [*inspect.signature(_server._receive_message).parameters]
    except (AttributeError, TypeError, ValueError):
        return False
    return (
        arguments == [
            "rpc_event", "state", "behavior", "argument_thunk", "request_deserializer", "response_serializer"
        ]
        and receiving == ["state", "call", "request_deserializer"]
        and hasattr(_server, "_RECEIVE_MESSAGE_TOKEN") and hasattr(cygrpc, "ReceiveMessageOperation")
        and {"condition", "due", "request"} <= {*vars(_server._RPCState())}
    )  # fmt: skip


KNOWN = _is_known()
"""Whether the gRPC that is installed is one that this knows."""


def _is_call(work: tuple) -> bool:
    return KNOWN and bool(work) and work[0] is _server._unary_response_in_pool


class Received:
    """What a method is given in place of the messages that it would wait for: the one that is there."""

    __slots__ = ("message",)

    def __init__(self, message: bytes) -> None:
        self.message = message


def receive_first(work: tuple, then: Callable[[bytes | None, tuple], None]) -> Any:
    """Ask for a call's message now; `then` is called when it is there, with it and the work that is to be done.

    Args:
        work: what gRPC's server submits for a method that takes messages and answers once: a function, its arguments.
        then: called once, by the thread that takes calls in, which must not wait and must not be raised at. If the call
            ended without a message: with None, and the work as it was.

    Returns:
        What has a method `cancel`; None, and nothing is begun, if gRPC or the work is not one that this knows.
    """
    if not _is_call(work):
        return None
    answer, event, state, behavior, _, parse, *serialize = work
    note = _server._receive_message(state, event.call, parse)

    def received(message_event: Any) -> Any:
        finished = note(message_event)
        message, state.request = state.request, None
        if message is None:
            then(None, work)
        else:
            then(message, (answer, event, state, behavior, lambda: Received(message), parse, *serialize))
        return finished

    with state.condition:
        event.call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), received)
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
    return event.call


def time_left(work: tuple) -> float:
    """Seconds until the deadline of the call that is to be answered by `work`, as `receive_first` takes it; below 0
    where it is over, infinite if the call has none or is not one that this knows."""
    if not _is_call(work):
        return math.inf
    try:
        return work[1].call_details.deadline - time.time()
    except AttributeError:
        return math.inf
