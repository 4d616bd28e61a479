"""How much a client sends to a server at its limit, by a clock that is a number; `test_retry` asks real servers."""

import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.rpc.throttle import Throttle

CAPACITY = 200.0


class Seen(NamedTuple):
    wanted: int
    sent: int
    taken: int


class Simulation:
    """Requests at even intervals to a server that takes `CAPACITY` a second, with room for a tenth of that to wait."""

    def __init__(self, seed: int = 0) -> None:
        self.now, self._room = 0.0, CAPACITY / 10
        self.throttle = Throttle(lambda: self.now, random.Random(seed).random)

    def run(self, per_s: float, seconds: float) -> Seen:
        wanted, sent, taken = round(per_s * seconds), 0, 0
        for _ in range(wanted):
            self.now += 1 / per_s
            self._room = min(self._room + CAPACITY / per_s, CAPACITY / 10)
            if self.throttle.rejects():
                continue
            sent += 1
            if self._room >= 1:
                self._room -= 1
                taken += 1
                self.throttle.accepted()
            else:
                self.throttle.overloaded()
        return Seen(wanted, sent, taken)


@pytest.mark.parametrize("times", [2, 3, 10])
def test_a_server_at_its_limit_is_sent_little_more_than_it_takes(times) -> None:
    simulation = Simulation()
    simulation.run(times * CAPACITY, 2)
    seen = simulation.run(times * CAPACITY, 20)
    assert seen.taken == pytest.approx(20 * CAPACITY, rel=0.02)
    assert seen.sent == pytest.approx(1.25 * seen.taken + 20 * 5 / 0.5, rel=0.05) and seen.sent < seen.wanted


def test_below_the_limit_everything_is_sent() -> None:
    assert Simulation().run(0.9 * CAPACITY, 20) == (3600, 3600, 3600)


def test_when_the_overload_is_over_everything_is_sent_again_within_a_second_or_two() -> None:
    simulation = Simulation()
    simulation.run(3 * CAPACITY, 20)
    first, then = simulation.run(0.5 * CAPACITY, 4 * 0.5), simulation.run(0.5 * CAPACITY, 10)
    assert first.sent > 0.5 * first.wanted and then.sent == then.wanted


def test_a_few_requests_are_always_sent() -> None:
    throttle = Throttle(lambda: 0.0, lambda: 0.0)
    throttle.overloaded()
    assert [throttle.rejects() for _ in range(8)] == [False] * 4 + [True] * 4


def test_what_is_accepted_now_outweighs_requests_of_before() -> None:
    now = 0.0
    throttle = Throttle(lambda: now, lambda: 0.0)
    throttle.overloaded()
    for _ in range(100):
        throttle.rejects()
    now = 1.0  # two windows later 101 requests count as 13.7
    for _ in range(9):
        throttle.accepted()
    assert not throttle.rejects()


@given(st.lists(st.sampled_from(["rejects", "accepted", "overloaded"]) | st.floats(0, 1e6), max_size=60))
def test_whatever_happens_it_ends(events) -> None:
    now = 0.0
    throttle = Throttle(lambda: now, lambda: 0.0)  # which rejects wherever it may
    for event in events:
        if isinstance(event, float):
            now += event
        else:
            getattr(throttle, event)()
            if "overloaded" not in events:
                assert not throttle.rejects()
    now += 60
    throttle.rejects()
    assert not throttle.rejects()
