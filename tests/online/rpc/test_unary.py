"""Calls that are sent now and waited for later: in the way this gRPC is known to have, and by its futures."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from online.rpc import sent_call
from online.rpc.channel import open_channel
from online.rpc.poller import POLLER
from online.rpc.sent_call import send
from tests.waiting import until

NAME = "/facet.test.Echo/Echo"
TIMEOUT_S = 600.0
MEASURE = "gRPC's client is not what it was: read it, correct `online.rpc.sent_call`, and measure"


class Echo(grpc.GenericRpcHandler):
    """Answers with the message, after `go_on`; refuses what begins with `no`."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.ended: list[bytes] = []
        self.metadata: list[Any] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer) if details.method == NAME else None

    def _answer(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        context.add_callback(lambda: self.ended.append(message))
        self.metadata.append(context.invocation_metadata())
        self.begun.append(message)
        while not self.go_on.wait(0.01) and context.is_active():
            pass
        if message.startswith(b"no"):
            context.set_trailing_metadata((("why", "because"),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")
        return message


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.go_on.set()


@pytest.fixture
def address(echo: Echo) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8), handlers=[echo], options=[("grpc.max_receive_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(params=["known", "not known"])
def known(request, monkeypatch) -> bool:
    assert sent_call.KNOWN, MEASURE
    monkeypatch.setattr(sent_call, "KNOWN", request.param == "known")
    return sent_call.KNOWN


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with open_channel(address) as channel:
        channel.unary_unary(NAME)(b"connected")
        yield channel


@pytest.fixture
def method(channel: grpc.Channel, known: bool) -> Any:
    return channel.unary_unary(NAME, response_deserializer=lambda answer: ("read", answer))


def test_what_is_answered(method) -> None:
    pending = [send(method, b"%d" % number, TIMEOUT_S) for number in range(20)]
    assert [call.result() for call in reversed(pending)] == [("read", b"%d" % number) for number in reversed(range(20))]


def test_a_large_answer_is_whole(method) -> None:
    message = bytes(range(256)) * (32 << 12)
    assert send(method, message, TIMEOUT_S).result() == ("read", message)


def test_it_is_on_its_way_before_anybody_waits(method, echo) -> None:
    echo.go_on.clear()
    pending = send(method, b"sent", TIMEOUT_S)
    until(lambda: b"sent" in echo.begun)
    echo.go_on.set()
    until(lambda: b"sent" in echo.ended)
    assert pending.result() == ("read", b"sent")


def test_no_thread_waits_for_it(method, echo, known) -> None:
    echo.go_on.clear()
    mine = {thread for thread in threading.enumerate() if "ThreadPool" not in thread.name}
    pending = send(method, b"", TIMEOUT_S)
    begun = {thread for thread in threading.enumerate() if "ThreadPool" not in thread.name} - mine
    assert bool(begun) != known
    echo.go_on.set()
    pending.result()


def test_what_is_refused(method) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send(method, b"no", TIMEOUT_S).result()
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "no")
    assert ("why", "because") in [tuple(entry) for entry in error.trailing_metadata()]


def test_an_answer_that_cannot_be_read(channel, known) -> None:
    def unreadable(answer: bytes) -> Any:
        raise ValueError(answer)

    with pytest.raises(grpc.RpcError) as caught:
        send(channel.unary_unary(NAME, response_deserializer=unreadable), b"", TIMEOUT_S).result()
    assert caught.value.code() is grpc.StatusCode.INTERNAL


def test_a_deadline_passes_though_nobody_waits(method, echo) -> None:
    echo.go_on.clear()
    pending = send(method, b"late", 0.05)
    time.sleep(0.1)
    echo.go_on.set()
    with pytest.raises(grpc.RpcError) as caught:
        pending.result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_nobody_listens(known) -> None:
    with open_channel("127.0.0.1:9") as channel, pytest.raises(grpc.RpcError) as caught:
        send(channel.unary_unary(NAME), b"", TIMEOUT_S).result()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_who_cancels_tells_the_server(method, echo) -> None:
    echo.go_on.clear()
    pending = send(method, b"cancelled", TIMEOUT_S)
    until(lambda: b"cancelled" in echo.begun)
    pending.cancel()
    until(lambda: b"cancelled" in echo.ended)
    pending.cancel()  # nothing more


def test_what_nobody_holds_any_more_is_cancelled(channel, echo) -> None:
    echo.go_on.clear()
    method = channel.unary_unary(NAME)
    for message in (b"0", b"1", b"2"):
        pending = send(method, message, TIMEOUT_S)
        until(lambda message=message: message in echo.begun)
        del pending
        gc.collect()
        until(lambda message=message: message in echo.ended)
    echo.go_on.set()
    assert send(method, b"next", TIMEOUT_S).result() == b"next"


def test_a_channel_that_is_closed_meanwhile(channel, echo, known) -> None:
    echo.go_on.clear()
    method = channel.unary_unary(NAME)
    pending, dropped = send(method, b"waited for", TIMEOUT_S), send(method, b"dropped", TIMEOUT_S)
    until(lambda: {b"waited for", b"dropped"} <= {*echo.begun})
    channel.close()
    del dropped
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        pending.result()
    with pytest.raises(ValueError):
        send(method, b"too late", TIMEOUT_S)


def test_threads_get_their_own_answers(method) -> None:
    def ask(thread: int) -> list[bool]:
        return [
            send(method, (message := b"%d-%d" % (thread, number)), TIMEOUT_S).result() == ("read", message)
            for number in range(100)
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(right) for right in pool.map(ask, range(8)))


def test_what_can_send_by_itself_does() -> None:
    class Own:
        def send(self, *asked: Any) -> Any:
            return asked

    assert send(Own(), b"message", 1.0) == (b"message", 1.0)


def test_all_this_with_the_poller_of_our_own_processes(request) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, f"--deselect={request.node.nodeid}"], env={**os.environ, **POLLER},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "1 deselected" in done.stdout, done.stdout + done.stderr
