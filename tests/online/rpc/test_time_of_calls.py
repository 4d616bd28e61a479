"""How long a call may last, as its service and its turn are told."""

import threading
import time
from collections.abc import Iterator

import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.guard import Call
from online.rpc.limits import Limits
from tests.holding import holding, lasted
from tests.online.rpc.test_guard import METHOD, WAIT_S, ask, code_of, served
from tests.waiting import PATIENCE_S, until


class Timed(lookup_pb2_grpc.LookupServicer):
    """Keeps the deadline of the latest call."""

    def __init__(self) -> None:
        self.deadline, self.go = 0.0, threading.Semaphore(0)

    def Lookup(self, request: lookup_pb2.LookupRequest, call: Call) -> lookup_pb2.LookupResponse:
        self.deadline = call.deadline
        return lookup_pb2.LookupResponse()


def test_the_time_that_a_message_took_to_come_is_not_given_again() -> None:
    go_on = threading.Event()

    def late() -> Iterator[bytes]:
        assert go_on.wait(PATIENCE_S)
        yield b""

    with served(Timed()) as (service, endpoint, channel):
        call = channel.stream_unary(METHOD).future(late(), timeout=WAIT_S)
        until(lambda: len(endpoint.waiting) == 1)
        arrived = time.monotonic()
        until(lambda: time.monotonic() > arrived + 0.5)
        go_on.set()
        assert code_of(call) == "OK"
    assert service.deadline <= arrived + WAIT_S


def test_no_time_is_left_after_the_deadline() -> None:
    assert Call(0.0, 0.0, time.monotonic() - 5.0).time_remaining() == 0.0


def test_whose_turn_comes_too_late_is_refused_then() -> None:
    with served() as (service, endpoint, channel):
        service.go.release(10)
        lasted(endpoint, 5.0)
        endpoint.admission._clock = iter([0.0, WAIT_S - 1.0]).__next__  # when it begins and ends to wait for its turn
        with holding(endpoint):
            call = ask(channel)
            until(lambda: endpoint.admission.waiting == 1)
        assert code_of(call) == "DEADLINE" and not service.threads


@pytest.mark.parametrize(("timeout", "code"), [(300.0, "OK"), (3000.0, "OK"), (4000.0, "NO_DEADLINE")])
def test_a_rollout_may_take_an_hour(timeout: float, code: str) -> None:
    with served(limits=Limits().for_admin()) as (service, _, channel):
        service.go.release(10)
        assert code_of(ask(channel, timeout=timeout)) == code


def test_the_longest_deadline_is_taken_though_grpc_rounds_it_up_on_its_way() -> None:
    """To whole seconds, from a hundred on."""
    with served(limits=Limits(call_s=300.2)) as (service, _, channel):
        service.go.release(10)
        assert code_of(ask(channel, timeout=300.2)) == "OK"
