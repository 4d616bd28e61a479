"""Calls that are sent again, to real servers, by a clock that the tests turn."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any

import grpc
import pytest

from online.lookup.client import LookupClient
from online.proto import lookup_pb2, lookup_pb2_grpc
from online.proto.lookup_pb2 import LookupRequest, LookupResponse
from online.ranking.client import RankClient
from online.rpc.replicas import EJECTION_S, Replicas
from online.rpc.retry import RetryingCall, RetryPolicy
from online.rpc.unary import UnaryMethod
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig
from tests.grpc_server import end_by, grpc_server
from tests.waiting import PATIENCE_S

METHOD = lookup_pb2.DESCRIPTOR.services_by_name["Lookup"].methods_by_name["Lookup"]
REAL_TIMEOUT_S = PATIENCE_S  # of calls that a server answers
HANG = "hang"
POLICY = RetryPolicy(
    4, frozenset({Code.OVERLOADED, Code.LOOKUP_UNAVAILABLE, Code.DEADLINE, Code.VERSION_NOT_AVAILABLE}),
    frozenset({Code.DEADLINE, Code.VERSION_NOT_AVAILABLE}),
)  # fmt: skip


class Clock:
    """Seconds that pass only by sleeping, or when a test says so."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


class Always(Random):
    """Draws one number only."""

    def __init__(self, number: float) -> None:
        super().__init__(0)
        self.number = number

    def random(self) -> float:
        return self.number


class Scripted(lookup_pb2_grpc.LookupServicer):
    """Refuses by the codes of a script, one after the other, or hangs; then it answers."""

    def __init__(self, *script: Code | str) -> None:
        self.script, self.asked, self.over = list(script), 0, threading.Event()

    def Lookup(self, request: LookupRequest, context: grpc.ServicerContext) -> LookupResponse:
        self.asked += 1
        does = self.script.pop(0) if self.script else None
        if does == HANG:
            self.over.wait(REAL_TIMEOUT_S)
        elif does is not None:
            end_by(context, RpcError(does, "no", expected="-", got="-", remedy="-"))
        return LookupResponse(version=1)


class OnClock:
    """A remote method for which the clock runs: a server that hangs takes all of its timeout, in a moment."""

    def __init__(self, channel: grpc.Channel, clock: Clock, timeouts: list[float]) -> None:
        self._method, self._clock, self._timeouts = UnaryMethod(channel, METHOD), clock, timeouts
        self.hangs = False

    def __call__(self, request: Any, *, timeout: float) -> Any:
        self._timeouts.append(timeout)
        try:
            return self._method(request, timeout=0.2 if self.hangs else REAL_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._clock.now += timeout
            raise

    def start(self, request: Any, *, timeout: float) -> Any:
        self._timeouts.append(timeout)
        return self._method.start(request, timeout=REAL_TIMEOUT_S)


class Servers:
    """Replicas of real servers; `call` asks them."""

    def __init__(self, stack: ExitStack, draw: float, *scripts: tuple[Code | str, ...]) -> None:
        self.clock, self.timeouts, self.services = Clock(), [], [Scripted(*script) for script in scripts]
        add = lookup_pb2_grpc.add_LookupServicer_to_server
        addresses = [stack.enter_context(grpc_server(partial(add, service))) for service in self.services]
        for service in self.services:
            stack.callback(service.over.set)
        self.replicas = Replicas(
            addresses, lambda channel: OnClock(channel, self.clock, self.timeouts), clock=self.clock,
            sleep=self.clock.sleep, random=Always(draw),
        )  # fmt: skip
        stack.callback(self.replicas.close)
        picked = [self.replicas.pick(()) for _ in scripts]
        self.by_service = {addresses.index(replica.target): (replica, method) for replica, method in picked}

    def call(self, policy: RetryPolicy = POLICY, *, within_s: float = 10.0) -> RetryingCall:
        return RetryingCall(self.replicas, LookupRequest(request_id="r"), "r", policy, self.clock.now + within_s)

    @property
    def asked(self) -> list[int]:
        return [service.asked for service in self.services]

    def refusal(self, policy: RetryPolicy = POLICY, *, within_s: float = 10.0) -> Code:
        with pytest.raises(RpcError) as caught:
            self.call(policy, within_s=within_s).result()
        return caught.value.code


@pytest.fixture
def servers() -> Iterator[Callable[..., Servers]]:
    """Call with a script for each server: they are asked in this order."""
    with ExitStack() as stack:
        yield lambda *scripts, draw=0.0: Servers(stack, draw, *scripts)


class TestBackoff:
    def test_it_grows_to_its_longest(self) -> None:
        def backoffs(code: Code, count: int) -> list[float]:
            return [POLICY.backoff_s(code, number, lambda: 0.5) for number in range(count)]

        assert backoffs(Code.LOOKUP_UNAVAILABLE, 8) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1])
        assert backoffs(Code.OVERLOADED, 10) == pytest.approx(
            [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1]
        )
        assert POLICY.backoff_s(Code.DEADLINE, 10**9, lambda: 0.5) == 1.0

    def test_jitter_is_half_of_it_either_way(self) -> None:
        assert [POLICY.backoff_s(Code.DEADLINE, 1, lambda draw=draw: draw) for draw in (0.0, 0.25, 1.0)] == (
            pytest.approx([0.05, 0.075, 0.15])
        )
        assert RetryPolicy(2, frozenset(), jitter=0.0).backoff_s(Code.DEADLINE, 0, lambda: 0.0) == 0.05

    def test_no_attempt_is_no_policy(self) -> None:
        with pytest.raises(InvalidConfig, match="attempts"):
            RetryPolicy(0, frozenset())

    def test_a_call_pauses_so_between_attempts(self, servers) -> None:
        of = servers((Code.OVERLOADED,) * 3, draw=0.75)
        assert of.call().result().version == 1
        assert of.clock.sleeps == pytest.approx([0.00625, 0.0125, 0.025])

    def test_other_refusals_pause_longer(self, servers) -> None:
        of = servers((Code.LOOKUP_UNAVAILABLE,) * 2, draw=0.5)
        assert of.call().result().version == 1 and of.clock.sleeps == pytest.approx([0.05, 0.1])

    def test_every_replica_is_asked_before_a_pause(self, servers) -> None:
        of = servers((Code.OVERLOADED, Code.OVERLOADED), (Code.OVERLOADED,), draw=0.5)
        assert of.call().result().version == 1
        assert of.asked == [2, 2] and of.clock.sleeps == pytest.approx([0.005])


class TestWhatIsSentAgain:
    def test_at_most_so_often(self, servers) -> None:
        of = servers((Code.LOOKUP_UNAVAILABLE,) * 9)
        assert of.refusal() is Code.LOOKUP_UNAVAILABLE and of.asked == [4] and len(of.clock.sleeps) == 3

    def test_other_refusals_are_final(self, servers) -> None:
        of = servers((Code.MALFORMED_IDS,), ())
        assert of.refusal() is Code.MALFORMED_IDS and of.asked == [1, 0]

    def test_who_would_say_the_same_is_asked_once(self, servers) -> None:
        of = servers((Code.VERSION_NOT_AVAILABLE,), (Code.OVERLOADED,) * 2)
        assert of.call().result().version == 1 and of.asked == [1, 3]
        of = servers((Code.VERSION_NOT_AVAILABLE,), (Code.VERSION_NOT_AVAILABLE,))
        assert of.refusal() is Code.VERSION_NOT_AVAILABLE and of.asked == [1, 1] and not of.clock.sleeps

    def test_none_is_sent_past_the_deadline(self, servers) -> None:
        of = servers((Code.LOOKUP_UNAVAILABLE,) * 99, draw=0.5)
        often = RetryPolicy(99, POLICY.retryable_codes)
        assert of.refusal(often, within_s=0.36) is Code.LOOKUP_UNAVAILABLE
        assert of.clock.sleeps == pytest.approx([0.05, 0.1, 0.2]) and of.asked == [4]

    def test_it_starts_again_after_a_reset(self, servers) -> None:
        of = servers((Code.LOOKUP_UNAVAILABLE,) * 7)
        call = of.call()
        with pytest.raises(RpcError):
            call.result()
        call.reset()
        assert call.result().version == 1 and of.asked == [8]


class TestEjection:
    def test_one_that_hangs_leaves_time_for_the_next_and_is_passed_over(self, servers) -> None:
        of = servers((HANG,), ())
        replica, method = of.by_service[0]
        method.hangs = True
        assert of.call(within_s=8.0).result().version == 1
        assert of.timeouts == [4.0, 2.0] and of.clock.sleeps == []  # half of what is left, each time
        assert replica.ejected_until == 4.0 + EJECTION_S
        for _ in range(5):
            of.call().result()
        assert of.services[1].asked == 6
        method.hangs = False
        of.services[0].over.set()
        asked = of.services[0].asked
        of.clock.now = replica.ejected_until
        for _ in range(4):
            of.call().result()
        assert of.services[0].asked == asked + 2  # it is back

    def test_the_last_attempt_has_all_the_time_that_is_left(self, servers) -> None:
        of = servers((HANG,), ())
        of.by_service[0][1].hangs = True
        of.call(RetryPolicy(2, POLICY.retryable_codes), within_s=8.0).result()
        assert of.timeouts == [4.0, 4.0]
        alone = servers((Code.OVERLOADED,))
        alone.call(within_s=8.0).result()
        assert alone.timeouts == pytest.approx([8.0, 8.0 - alone.clock.sleeps[0]])

    @pytest.mark.parametrize("ask", ["start", "result"])
    def test_one_that_is_away_is_passed_over_and_comes_back(self, ask, servers) -> None:
        of = servers((Code.LOOKUP_UNAVAILABLE,), ())

        def calls(count: int) -> list[int]:
            before = of.asked
            for _ in range(count):
                call = of.call()
                if ask == "start":
                    call.start()
                call.result()
            return [after - was for was, after in zip(before, of.asked, strict=True)]

        assert calls(1) == [1, 1]
        of.clock.now += 0.99 * EJECTION_S
        assert calls(6) == [0, 6]
        of.clock.now += 0.02 * EJECTION_S
        assert calls(6) == [3, 3]

    @pytest.mark.parametrize("code", [Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE])
    def test_one_that_answers_is_not_passed_over(self, code, servers) -> None:
        of = servers((code,), ())
        for _ in range(5):
            of.call().result()
        assert of.asked == [3, 3]


@pytest.mark.parametrize("ask", ["start", "result"])
class TestThrottle:
    """With a draw of 0: whatever may be throttled is."""

    def ask(self, of: Servers, ask: str) -> LookupResponse:
        call = of.call(RetryPolicy(1, frozenset()))
        if ask == "start":
            call.start()
        return call.result()

    def refused(self, of: Servers, ask: str) -> str:
        with pytest.raises(RpcError) as caught:
            self.ask(of, ask)
        assert caught.value.code is Code.OVERLOADED
        return str(caught.value)

    def test_what_is_answered_is_learned(self, ask, servers) -> None:
        of = servers((Code.OVERLOADED,))
        self.refused(of, ask)
        assert [self.ask(of, ask).version for _ in range(30)] == [1] * 30

    def test_a_refusal_for_another_reason_is_an_answer(self, ask, servers) -> None:
        of = servers((Code.OVERLOADED, *[Code.VERSION_NOT_AVAILABLE] * 30))
        self.refused(of, ask)
        for _ in range(30):
            with pytest.raises(RpcError) as caught:
                self.ask(of, ask)
            assert caught.value.code is Code.VERSION_NOT_AVAILABLE

    def test_most_of_what_would_be_refused_is_not_sent(self, ask, servers) -> None:
        of = servers((Code.OVERLOADED,) * 30)
        said = [self.refused(of, ask) for _ in range(30)]
        assert of.asked == [5] and ["not sent" in text for text in said] == [False] * 5 + [True] * 25
        of.clock.now += 60
        self.refused(of, ask)
        assert of.asked == [6]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 300.5, float("inf"), float("nan")])
@pytest.mark.parametrize("client", [LookupClient, RankClient])
def test_a_deadline_that_servers_refuse_is_refused_before(client, timeout_s) -> None:
    with pytest.raises(InvalidConfig, match="timeout"):
        client(["127.0.0.1:9"], timeout_s=timeout_s)
