"""Methods of one message and one answer over real channels: called, or started and waited for later."""

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.proto.lookup_pb2 import LookupRequest, LookupResponse
from online.rpc.channel import open_channel
from online.rpc.unary import UnaryMethod
from online.rpc_error import Code, RpcError
from tests.grpc_server import grpc_server
from tests.waiting import PATIENCE_S, until

METHOD = lookup_pb2.DESCRIPTOR.services_by_name["Lookup"].methods_by_name["Lookup"]
PATH = "/facet.v1.Lookup/Lookup"
TIMEOUT_S = PATIENCE_S


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Echo(lookup_pb2_grpc.LookupServicer):
    """Answers with the request id, after `go_on`; refuses what begins with `no`."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.metadata: list[Any] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def Lookup(self, request: LookupRequest, context: grpc.ServicerContext) -> LookupResponse:
        context.add_callback(lambda: self.ended.append(request.request_id))
        self.metadata.append(context.invocation_metadata())
        self.begun.append(request.request_id)
        while not self.go_on.wait(0.01) and context.is_active():
            pass
        if request.request_id.startswith("no"):
            context.set_trailing_metadata((("why", "because"),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")
        return LookupResponse(manifest_sha256=request.request_id)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def address(echo: Echo) -> Iterator[str]:
    with grpc_server(lambda server: lookup_pb2_grpc.add_LookupServicer_to_server(echo, server)) as address:
        yield address
        echo.go_on.set()


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with open_channel(address) as channel:
        yield channel


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def method(channel: grpc.Channel, clock: Clock) -> UnaryMethod:
    method = UnaryMethod(channel, METHOD, clock=clock)
    method(LookupRequest(request_id="connected"), timeout=TIMEOUT_S)
    return method


def start(method: UnaryMethod, name: str, timeout: float = TIMEOUT_S) -> Any:
    return method.start(LookupRequest(request_id=name), timeout=timeout)


def called(method: UnaryMethod, name: str, timeout: float = TIMEOUT_S) -> LookupResponse:
    return method(LookupRequest(request_id=name), timeout=timeout)


def started(method: UnaryMethod, name: str, timeout: float = TIMEOUT_S) -> LookupResponse:
    return start(method, name, timeout).result()


both_ways = pytest.mark.parametrize("ask", [called, started])


@both_ways
def test_what_is_answered(ask, method) -> None:
    assert ask(method, "größe") == LookupResponse(manifest_sha256="größe")


def test_answers_may_be_read_in_any_order(method) -> None:
    calls = [start(method, str(number)) for number in range(20)]
    assert [call.result().manifest_sha256 for call in reversed(calls)] == [str(n) for n in reversed(range(20))]
    assert method.abandoned == 0


@both_ways
def test_a_large_answer_is_whole(ask, method) -> None:
    name = "0123456789abcdef" * (2 << 20)  # 32 MiB
    assert ask(method, name).manifest_sha256 == name


def test_it_is_on_its_way_before_anybody_waits(method, echo) -> None:
    echo.go_on.clear()
    call = start(method, "sent")
    until(lambda: "sent" in echo.begun)
    echo.go_on.set()
    until(lambda: "sent" in echo.ended)
    assert call.result().manifest_sha256 == "sent"


def test_no_thread_waits_for_it(method, echo) -> None:
    echo.go_on.clear()

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if not thread.name.startswith("server")}

    before = threads()
    call = start(method, "held")
    until(lambda: "held" in echo.begun)
    assert threads() <= before
    echo.go_on.set()
    call.result()


@both_ways
def test_what_is_refused(ask, method) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(method, "no")
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "no")
    assert ("why", "because") in [tuple(entry) for entry in error.trailing_metadata()]
    assert method.abandoned == 0


@both_ways
def test_a_deadline_passes(ask, method, echo) -> None:
    echo.go_on.clear()
    with pytest.raises(grpc.RpcError) as caught:
        ask(method, "late", 0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_passes_though_nobody_waits(method, echo) -> None:
    """The server sees it pass of a call that it has begun; on a machine that stood still, of one that has more time."""
    echo.go_on.clear()
    calls = {str(seconds): start(method, str(seconds), seconds) for seconds in (1.0, 30.0, PATIENCE_S / 2)}
    until(lambda: {*echo.begun} & {*echo.ended} & calls.keys())
    passed = {*echo.begun} & {*echo.ended} & calls.keys()
    with pytest.raises(grpc.RpcError) as caught:
        calls[passed.pop()].result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@both_ways
def test_nobody_listens(ask) -> None:
    with open_channel("127.0.0.1:9") as channel, pytest.raises(grpc.RpcError) as caught:
        ask(UnaryMethod(channel, METHOD), "")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_what_nobody_holds_is_read_after_its_deadline_and_not_before(method, echo, clock) -> None:
    echo.go_on.clear()
    call = start(method, "abandoned", 0.05)
    other = start(method, "held", 0.05)
    del call
    gc.collect()
    assert method.abandoned == 1
    clock.now = 0.04
    start(method, "no longer held")
    assert method.abandoned == 2
    clock.now = 0.06
    echo.go_on.set()
    assert started(method, "next").manifest_sha256 == "next"
    assert method.abandoned == 1  # the one with minutes left
    clock.now = TIMEOUT_S + 1
    assert started(method, "next").manifest_sha256 == "next"
    assert method.abandoned == 0
    with suppress(grpc.RpcError):
        other.result()


def test_a_channel_that_is_closed_meanwhile(channel, method, echo) -> None:
    echo.go_on.clear()
    call, dropped = start(method, "waited for"), start(method, "dropped")
    until(lambda: {"waited for", "dropped"} <= {*echo.begun})
    channel.close()
    del dropped
    until(lambda: {"waited for", "dropped"} <= {*echo.ended})
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result()
    with pytest.raises(ValueError):
        start(method, "too late")


def test_threads_get_their_own_answers(method) -> None:
    def ask(thread: int) -> bool:
        names = [f"{thread}-{number}" for number in range(100)]
        return [started(method, name).manifest_sha256 for name in names] == names

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def answering(behavior: Any) -> Any:
    handler = grpc.method_handlers_generic_handler(PATH.split("/")[1], {"Lookup": behavior})
    return grpc_server(lambda server: server.add_generic_rpc_handlers((handler,)))


@both_ways
def test_an_answer_that_cannot_be_read(ask) -> None:
    raw = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff\xff")
    with answering(raw) as address, open_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        ask(UnaryMethod(channel, METHOD), "")
    assert caught.value.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(("answers", "got"), [(0, "none"), (2, "more than one")])
def test_a_started_call_takes_one_answer(answers, got) -> None:
    stream = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b""] * answers))
    with answering(stream) as address, open_channel(address) as channel:
        method = UnaryMethod(channel, METHOD)
        call = start(method, "")
        with pytest.raises(RpcError, match=got) as caught:
            call.result()
        assert caught.value.code is Code.INTERNAL
        del call, caught
        gc.collect()
        assert method.abandoned == 1  # there may be more to read
