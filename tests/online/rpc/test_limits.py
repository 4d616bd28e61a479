"""When a port ends a connection: once it is idle, or old; and what becomes of the calls on it."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.limits import Limits
from tests.online.http2 import call_beginning, frame
from tests.waiting import PATIENCE_S, until

DATA, GOAWAY = 0, 7
NEVER_S = 3600.0


class Connection:
    """An HTTP/2 connection that notes the kinds of the frames that come."""

    def __init__(self, port: int, *, with_call: bool) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        beginning = call_beginning("/facet.v1.Lookup/Lookup")
        if with_call:  # and its message, which is empty
            self._socket.sendall(beginning + frame(0, 1, 1, bytes(5)))
        else:
            self._socket.sendall(beginning[: len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")] + frame(4, 0, 0, b""))
        self._bytes, self.ended = b"", False

    def kinds(self) -> set[int]:
        """Of the frames so far."""
        kinds, rest = set(), self._bytes
        while len(rest) >= 9:
            kinds.add(rest[3])
            rest = rest[9 + int.from_bytes(rest[:3]) :]
        return kinds

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
    """Answers calls named `wait` when it may, all others at once; keeps who called."""

    def __init__(self) -> None:
        self.go_on, self.called, self.peers = threading.Event(), threading.Event(), []

    def Lookup(self, request, context) -> lookup_pb2.LookupResponse:
        self.peers.append(context.peer())
        if not request.request_id:
            self.called.set()
            assert self.go_on.wait(PATIENCE_S)
        return lookup_pb2.LookupResponse(version=7)


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
