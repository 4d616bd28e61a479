"""The gRPC that is installed is one whose messages can be received first, and they are."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc import first_message
from online.rpc.channel import open_channel
from online.rpc.first_message import receive_first, time_left
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from tests.waiting import until

MEASURE = "gRPC's server is not what it was: read it, correct `online.rpc.first_message`, and measure"


class Answering(lookup_pb2_grpc.LookupServicer):
    def Lookup(self, request: lookup_pb2.LookupRequest, context: Any) -> lookup_pb2.LookupResponse:
        return lookup_pb2.LookupResponse(version=7)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint("lookup", "127.0.0.1", 0, 2, refuse_more=True, limits=Limits(message_s=60))
    lookup_pb2_grpc.add_LookupServicer_to_server(Answering(), endpoint.server)
    endpoint.start()
    yield endpoint
    endpoint.stop().wait()


def test_this_grpc_is_known(endpoint, monkeypatch) -> None:
    assert first_message.KNOWN, MEASURE
    received, left = [], []

    def noting(work: tuple, then: Any) -> Any:
        receiving = receive_first(work, lambda *told: (received.append(told[0]), then(*told)))
        received.append(receiving)
        return receiving

    monkeypatch.setattr("online.rpc.door.receive_first", noting)
    monkeypatch.setattr("online.rpc.door.time_left", lambda work: left.append(time_left(work)) or left[-1])
    endpoint.server.refuse_late(lambda remaining: remaining() and None)
    request = lookup_pb2.LookupRequest(request_id="a")
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        assert lookup_pb2_grpc.LookupStub(channel).Lookup(request, timeout=5).version == 7
        call, message = received
        assert lookup_pb2_grpc.LookupStub(channel).Lookup(request).version == 7
    assert call is not None and message == request.SerializeToString(), MEASURE
    assert 0 < left[0] <= 5 and left[1] > 1e6, MEASURE


def test_a_call_without_a_message_wakes_no_thread(endpoint, monkeypatch) -> None:
    waited, message = [], endpoint.server._arrivals.message
    monkeypatch.setattr(
        endpoint.server._arrivals, "message",
        lambda *given: (waited.append(threading.current_thread().name), message(*given))[1],
    )
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(30)
        return
        yield

    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        stalled = channel.stream_unary("/facet.v1.Lookup/Lookup").future(nothing())
        until(lambda: len(endpoint.server._arrivals._waiting) == 1)
        answered = lookup_pb2_grpc.LookupStub(channel).Lookup(lookup_pb2.LookupRequest(), timeout=5)
        assert answered.version == 7 and not waited
        silence.set()  # the call ends, without a message
        with pytest.raises(grpc.RpcError) as refused:
            stalled.result(timeout=5)
        assert dict(refused.value.trailing_metadata())["facet-error"] == "MALFORMED_REQUEST"
        until(lambda: not endpoint.server._arrivals._waiting)


@pytest.mark.parametrize("work", [(), (print, 1), (None,) * 7])
def test_what_is_not_known_is_left_to_grpc(work) -> None:
    assert receive_first(work, lambda message, work: pytest.fail("called")) is None
    assert time_left(work) == math.inf


def test_a_call_that_does_not_say_its_deadline_has_none() -> None:
    assert time_left((grpc._server._unary_response_in_pool, object())) == math.inf
