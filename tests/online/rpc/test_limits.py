"""When a port ends a connection: once it is idle, or old; and what becomes of the calls on it."""

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.limits import Limits
from pipelines.contracts.errors import InvalidConfig
from tests.online.http2 import call_beginning, frame
from tests.waiting import PATIENCE_S, until

DATA, SETTINGS, PING, GOAWAY = 0, 4, 6, 7
MAX_STREAMS, MAX_METADATA = 3, 6  # settings
NEVER_S = 3600.0


class Connection:
    """An HTTP/2 connection that notes the kinds of the frames that come."""

    def __init__(self, port: int, *, with_call: bool) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        beginning = call_beginning("/facet.v1.Lookup/Lookup", timeout=f"{NEVER_S:.0f}S")  # no test ends by it
        if with_call:  # and its message, which is empty
            self._socket.sendall(beginning + frame(0, 1, 1, bytes(5)))
        else:
            self._socket.sendall(beginning[: len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")] + frame(4, 0, 0, b""))
        self._bytes, self.ended = b"", False

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Kind and payload of the frames so far; of the last one, as much as is there."""
        rest = self._bytes
        while len(rest) >= 9:
            end = 9 + int.from_bytes(rest[:3])
            yield rest[3], rest[9:end]
            rest = rest[end:]

    def kinds(self) -> set[int]:
        return {kind for kind, _ in self.frames()}

    def read_until(self, kind: int) -> None:
        while kind not in self.kinds():
            assert self._take(), f"it ended without a frame of kind {kind}"

    def read_to_its_end(self) -> None:
        while self._take():
            pass

    def read_what_is_there(self) -> None:
        self._socket.setblocking(False)
        try:
            while self._take():
                pass
        except BlockingIOError:
            pass
        self._socket.settimeout(PATIENCE_S)

    def _take(self) -> bool:
        received = self._socket.recv(1 << 16)
        self._bytes += received
        self.ended = not received
        return bool(received)

    def close(self) -> None:
        self._socket.close()


class Lookup(lookup_pb2_grpc.LookupServicer):
    """Answers calls without a name when it may, all others at once, a number with so many bytes; keeps who called."""

    def __init__(self) -> None:
        self.go_on, self.called, self.peers = threading.Event(), threading.Event(), []

    def Lookup(self, request, context) -> lookup_pb2.LookupResponse:
        self.peers.append(context.peer())
        if not request.request_id:
            self.called.set()
            assert self.go_on.wait(2 * PATIENCE_S)  # whoever waits for an answer gives up first
        size = int(request.request_id) if request.request_id.isdigit() else 0
        return lookup_pb2.LookupResponse(version=7, manifest_sha256="x" * size)


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(**limits: float) -> tuple[int, Lookup]:
        service = Lookup()
        server = grpc.server(ThreadPoolExecutor(4), options=Limits(**limits).options())
        lookup_pb2_grpc.add_LookupServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append((server, service))
        return port, service

    yield start
    for server, service in servers:
        service.go_on.set()
        server.stop(0).wait(PATIENCE_S)


def test_an_idle_connection_is_ended_and_one_with_a_call_is_not(serve) -> None:
    port, service = serve(idle_s=0.2, age_s=NEVER_S)
    busy = Connection(port, with_call=True)
    assert service.called.wait(PATIENCE_S)
    for _ in range(3):  # each takes as long as the busy one could last, if it were for its age
        idle = Connection(port, with_call=False)
        idle.read_to_its_end()
        assert GOAWAY in idle.kinds() and idle.ended
        idle.close()
    busy.read_what_is_there()
    assert GOAWAY not in busy.kinds() and not busy.ended
    service.go_on.set()
    busy.read_until(DATA)
    busy.close()


def test_an_old_connection_takes_no_new_call_and_answers_those_under_way(serve) -> None:
    port, service = serve(idle_s=NEVER_S, age_s=0.1, grace_s=NEVER_S)
    busy = Connection(port, with_call=True)
    busy.read_until(GOAWAY)
    assert DATA not in busy.kinds()
    service.go_on.set()
    busy.read_until(DATA)
    busy.close()


def test_a_call_on_an_old_connection_has_the_grace_to_end(serve) -> None:
    port, service = serve(idle_s=NEVER_S, age_s=0.1, grace_s=0.1)
    busy = Connection(port, with_call=True)
    busy.read_to_its_end()
    assert DATA not in busy.kinds() and not service.go_on.is_set()
    busy.close()


def test_a_connection_is_told_how_many_calls_and_how_large_metadata_it_may_have(serve) -> None:
    port, _ = serve(streams=7, metadata_bytes=3000)
    connection = Connection(port, with_call=False)
    connection.read_until(SETTINGS)
    payload = next(payload for kind, payload in connection.frames() if kind == SETTINGS)
    settings = dict(struct.unpack_from(">HI", payload, at) for at in range(0, len(payload), 6))
    assert (settings[MAX_STREAMS], settings[MAX_METADATA]) == (7, 3000)
    connection.close()


def test_a_silent_connection_is_asked_whether_anybody_is_there(serve) -> None:
    port, _ = serve(keepalive_s=0.1, idle_s=NEVER_S, age_s=NEVER_S)
    connection = Connection(port, with_call=False)
    connection.read_until(PING)
    connection.close()


def test_a_connection_that_does_not_begin_is_ended(serve) -> None:
    port, _ = serve(handshake_s=0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S / 5) as connection:  # gRPC itself: 120 s
        while connection.recv(1 << 16):
            pass


def test_an_answer_that_is_too_large_is_not_sent(serve) -> None:
    port, _ = serve(response_bytes=1000)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = lookup_pb2_grpc.LookupStub(channel)
        for size, status in ((900, "OK"), (1100, "RESOURCE_EXHAUSTED")):
            call = stub.Lookup.future(lookup_pb2.LookupRequest(request_id=f"{size}"), timeout=PATIENCE_S)
            assert call.code().name == status


def test_a_request_has_room_for_twice_its_ids_and_for_names() -> None:
    assert [Limits().for_ids(count).request_bytes for count in (0, 1000)] == [65_536, 81_536]
    assert (Limits().for_admin().request_bytes, Limits().for_admin().call_s) == (65_536, 3600.0)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_is_positive(value: float) -> None:
    with pytest.raises(InvalidConfig, match="idle_s="):
        Limits(idle_s=value)


@pytest.mark.parametrize("limits", [{"age_s": 0.1}, {"age_s": 0.1, "idle_s": 0.02}, {"idle_s": 0.02}])
def test_no_call_fails_when_connections_end_by_age_or_idleness(serve, limits) -> None:
    port, service = serve(grace_s=NEVER_S, **limits)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = lookup_pb2_grpc.LookupStub(channel)
        connected = []
        channel.subscribe(connected.append)

        def another() -> bool:
            request = lookup_pb2.LookupRequest(request_id="at once")
            assert stub.Lookup(request, timeout=PATIENCE_S).version == 7
            if "age_s" not in limits:  # a connection is idle when nobody calls
                before = len(connected)
                until(lambda: len(connected) > before)
            return len(set(service.peers)) >= 4

        until(another)
