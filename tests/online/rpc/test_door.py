"""Who comes while every thread is busy is refused by the thread that takes calls in, and nobody is forgotten."""

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc import first_message, gate
from online.rpc.arrival import Arrivals
from online.rpc.channel import open_channel
from online.rpc.door import Door
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from tests.waiting import until

THREADS = 3


class Holding(lookup_pb2_grpc.LookupServicer):
    """Answers when it is let go; a request named `fail` ends in a defect."""

    def __init__(self) -> None:
        self.inside, self.most, self.go = 0, 0, threading.Semaphore(0)
        self._counting = threading.Lock()

    def Lookup(self, request: lookup_pb2.LookupRequest, context: Any) -> lookup_pb2.LookupResponse:
        with self._counting:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            assert self.go.acquire(timeout=30)
            if request.request_id == "fail":
                raise ZeroDivisionError
            return lookup_pb2.LookupResponse(version=7)
        finally:
            with self._counting:
                self.inside -= 1


@pytest.fixture(params=[True, False], ids=["message first", "thread first"])
def first(request, monkeypatch) -> bool:
    """Whether a message is received before a thread is woken, or this gRPC is one that is not known."""
    monkeypatch.setattr(first_message, "KNOWN", request.param)
    return request.param


@pytest.fixture
def served(first) -> Iterator[tuple[Holding, grpc.Channel]]:
    service, endpoint = Holding(), Endpoint("lookup", "127.0.0.1", 0, THREADS, refuse_more=True)
    lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)
    endpoint.start()
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        yield service, channel
        service.go.release(1000)
    endpoint.stop().wait()


def ask(channel: grpc.Channel, name: str = "") -> Any:
    return lookup_pb2_grpc.LookupStub(channel).Lookup.future(lookup_pb2.LookupRequest(request_id=name), timeout=30)


def code_of(call: Any) -> str:
    error = call.exception()
    return dict(error.trailing_metadata()).get("facet-error", error.code().name) if error else "OK"


def test_as_many_as_threads_are_answered_and_all_others_refused_without_one(served, monkeypatch) -> None:
    service, channel = served
    refused_by = []
    turn_away = gate._turn_away
    monkeypatch.setattr(
        gate, "_turn_away", lambda *given: (refused_by.append(threading.current_thread().name), turn_away(*given))
    )
    for _ in range(5):  # every thread is free again afterwards
        refused_by.clear()
        inside = [ask(channel) for _ in range(THREADS)]
        until(lambda: service.inside == THREADS)
        assert [code_of(ask(channel)) for _ in range(20)] == ["OVERLOADED"] * 20
        assert len(refused_by) == 20 and not [name for name in refused_by if name.startswith("lookup")]
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        service.go.release(THREADS)
        assert [code_of(call) for call in inside] == ["OK"] * THREADS
        until(lambda: service.inside == 0)
    assert service.most == THREADS


def test_a_call_that_cannot_be_answered_in_time_is_refused_without_a_thread(first, monkeypatch) -> None:
    service, endpoint = Holding(), Endpoint("lookup", "127.0.0.1", 0, THREADS, refuse_more=True)
    lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)
    refused_by, turn_away = [], gate._turn_away
    monkeypatch.setattr(
        gate, "_turn_away", lambda *given: (refused_by.append(threading.current_thread().name), turn_away(*given))
    )
    late = RpcError(Code.OVERLOADED, "late", expected="an hour", got="less", remedy="Wait.")
    endpoint.server.refuse_late(lambda remaining: late if remaining() < 3600 else None)
    endpoint.start()
    service.go.release(1000)
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        stub = lookup_pb2_grpc.LookupStub(channel)
        for _ in range(2 * THREADS):  # no thread is lost by it
            calls = [stub.Lookup.future(lookup_pb2.LookupRequest(), timeout=timeout_s) for timeout_s in (30, 7200)]
            assert [code_of(call) for call in calls] == ["OVERLOADED" if first else "OK", "OK"]
            until(lambda: endpoint.server._door._free == THREADS)
    assert len(refused_by) == (2 * THREADS if first else 0)
    assert not [name for name in refused_by if name.startswith("lookup")]
    endpoint.stop().wait()


def test_a_call_that_fails_or_is_given_up_frees_its_thread(served) -> None:
    service, channel = served
    for _ in range(3):
        calls = [ask(channel, "fail"), ask(channel), ask(channel)]
        until(lambda: service.inside == THREADS)
        calls[1].cancel()
        service.go.release(THREADS)
        assert (code_of(calls[0]), code_of(calls[2])) == ("UNKNOWN", "OK")
        until(lambda: service.inside == 0)
    assert code_of_answered(service, channel) == "OK"


def test_a_quick_call_is_answered_by_the_thread_that_takes_it_in_if_nobody_else_is_here(first) -> None:
    answered_by = []

    class Named(Holding):
        def Lookup(self, request: lookup_pb2.LookupRequest, context: Any) -> lookup_pb2.LookupResponse:
            answered_by.append("lookup" in threading.current_thread().name)
            return super().Lookup(request, context) if request.request_id == "slow" else lookup_pb2.LookupResponse()

    service, endpoint = Named(), Endpoint("lookup", "127.0.0.1", 0, THREADS, refuse_more=True)
    lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)
    endpoint.server.answer_at_once(lambda message: b"slow" not in message)
    endpoint.start()
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        for _ in range(3):
            assert code_of(ask(channel, "quick")) == "OK"
            until(lambda: endpoint.server._door._free == THREADS)
        assert answered_by == [not first] * 3
        slow = ask(channel, "slow")
        until(lambda: service.inside == 1)
        assert code_of(ask(channel, "quick")) == "OK"
        assert answered_by[3:] == [True, True]
        service.go.release()
        assert code_of(slow) == "OK"
    endpoint.stop().wait()


def code_of_answered(service: Holding, channel: grpc.Channel) -> str:
    """Of a call that is let go at once, asked again while threads of calls just answered are not yet free."""
    service.go.release()
    codes: list[str] = []
    until(lambda: codes.append(code_of(ask(channel))) or codes[-1] != "OVERLOADED")
    return codes[-1]


def test_callers_that_send_no_message_count_only_until_their_time_is_over(first) -> None:
    service = Holding()
    endpoint = Endpoint("lookup", "127.0.0.1", 0, THREADS, refuse_more=True, limits=Limits(message_s=2.0))
    lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)
    endpoint.start()
    service.go.release(1000)
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(30)
        return
        yield

    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        stalled = [channel.stream_unary("/facet.v1.Lookup/Lookup").future(nothing()) for _ in range(THREADS)]
        until(lambda: len(endpoint.server._arrivals._waiting) == THREADS)
        codes = [code_of(ask(channel))]
        assert codes == ["OVERLOADED"]
        until(lambda: codes.append(code_of(ask(channel))) or codes[-1] == "OK")
        assert all(call.exception().code() is grpc.StatusCode.CANCELLED for call in stalled)
        silence.set()
    endpoint.stop().wait()


@settings(max_examples=10, deadline=None)
@given(threads=st.integers(1, 4), fails=st.lists(st.booleans(), min_size=30, max_size=30))
def test_every_call_runs_here_or_there_and_no_thread_is_lost(threads, fails) -> None:
    door, counting, inside, most = Door(threads, "test", Arrivals(10.0)), threading.Lock(), [0], [0]

    def call(fail: bool) -> str:
        if door.refusal:
            return "refused"
        with counting:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            if fail:
                raise KeyError
            return "answered"
        finally:
            with counting:
                inside[0] -= 1

    def outcome(future: Future) -> str:
        return "failed" if future.exception() else future.result()

    with ThreadPoolExecutor(4) as callers:
        outcomes = [outcome(future) for future in callers.map(lambda fail: door.submit(call, fail), fails)]
    assert set(outcomes) <= {"answered", "refused", "failed"} and outcomes.count("failed") <= sum(fails)
    assert most[0] <= threads
    until(lambda: outcome(door.submit(call, False)) == "answered")
    assert door.refusal is None
    door.shutdown()


def test_the_thread_that_was_idle_last_works_next() -> None:
    door = Door(4, "test", Arrivals(10.0))
    names = {door.submit(lambda: threading.current_thread().name).result(timeout=5) for _ in range(20)}
    assert len(names) == 1
    door.shutdown()


def test_what_was_answered_is_not_kept_until_the_next_call() -> None:
    class Asked:
        pass

    door, asked = Door(1, "test", Arrivals(10.0)), Asked()
    kept = weakref.ref(asked)
    door.submit(lambda given: None, asked).result(timeout=5)
    del asked
    until(lambda: kept() is None)
    door.shutdown()


def test_threads_that_cannot_be_started_are_noticed_before_anybody_calls(monkeypatch) -> None:
    arrivals = Arrivals(10.0)
    before, start, started = threading.active_count(), threading.Thread.start, []

    def starts_two(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starts_two)
        with pytest.raises(RuntimeError):
            Door(3, "test", arrivals)
        until(lambda: threading.active_count() <= before)  # those that did start have ended
    door = Door(3, "test", arrivals)
    assert threading.active_count() >= before + 3
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", starts_two)  # none is needed any more
        assert [door.submit(lambda: door.refusal).result(timeout=5) for _ in range(9)] == [None] * 9
    door.shutdown()
