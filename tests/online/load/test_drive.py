"""Driving: how many requests, when, and from which moment their latency counts; by a clock that only sleeping moves."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from online.load.drive import NAP_S, drive
from tests.online.load.clock import Clock


def sender(clock: Clock, takes_s: float = 0.0, then: Callable[[int], None] = lambda number: None):
    """A `Send` of so many seconds, and what it saw of each request: number, when it was due and when it was begun."""
    seen, lock = [], threading.Lock()

    def send(number, random, begin) -> None:
        due = begin()
        with lock:
            seen.append((number, due, clock()))
            clock.sleep(takes_s)
        then(number)

    return send, seen


def dues(seed: int, *, requests: int = 400, seconds: float = 0.0, rate: float = 2000.0) -> np.ndarray:
    clock = Clock()
    send, seen = sender(clock)
    drive(
        send, requests=requests, seconds=seconds, concurrency=1, seed=seed, rate=rate, clock=clock, sleep=clock.sleep
    )
    return np.array([due for _, due, _ in seen]) - Clock.BEGINS


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_closed_loop_sends_as_many_as_were_asked(concurrency) -> None:
    clock = Clock()
    send, seen = sender(clock)
    assert drive(send, requests=57, seconds=0.0, concurrency=concurrency, seed=0, clock=clock) == 0.0
    assert sorted(number for number, _, _ in seen) == [*range(57)]


def test_a_closed_loop_goes_on_for_as_long_as_was_asked_and_sends_when_the_last_was_answered() -> None:
    clock = Clock()
    send, seen = sender(clock, takes_s=0.5)
    assert drive(send, requests=1, seconds=2.0, concurrency=1, seed=0, clock=clock) == 2.0
    assert [due - Clock.BEGINS for _, due, _ in seen] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_a_drive_goes_on_until_the_file_is_there(rate, tmp_path) -> None:
    clock, enough = Clock(), tmp_path / "enough"
    send, seen = sender(clock, then=lambda number: enough.touch() if number == 20 else None)
    drive(
        send, requests=1, seconds=0.0, concurrency=1, seed=0, until=enough, rate=rate, clock=clock, sleep=clock.sleep
    )
    assert len(seen) == 21


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_what_a_sender_raises_ends_the_drive(rate) -> None:
    def fail(number, random, begin) -> None:
        begin()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(fail, requests=10_000, seconds=60.0, concurrency=3, seed=0, rate=rate)


def test_a_closed_loop_can_be_stopped() -> None:
    stop = threading.Event()
    send, seen = sender(Clock(), then=lambda number: stop.set() if number == 3 else None)
    drive(send, requests=10**9, seconds=3600.0, concurrency=1, seed=0, stop=stop)
    assert len(seen) == 4


def test_an_open_loop_can_be_stopped_while_it_waits_for_an_arrival() -> None:
    stop, clock, naps = threading.Event(), Clock(), []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        clock.sleep(seconds)
        if len(naps) == 3:
            stop.set()

    send, seen = sender(clock)
    drive(send, requests=10**9, seconds=3600.0, concurrency=1, seed=0, rate=1e-6, stop=stop, clock=clock, sleep=nap)
    assert not seen and naps == [NAP_S] * 3


def test_arrivals_of_an_open_loop_are_poisson_and_repeat_by_seed() -> None:
    due = dues(1, requests=4000)
    gaps = np.diff(due, prepend=0.0)
    assert len(due) == 4000 and due[0] > 0
    assert gaps.mean() == pytest.approx(1 / 2000, rel=0.1) and gaps.std() / gaps.mean() == pytest.approx(1, rel=0.1)
    np.testing.assert_array_equal(due, dues(1, requests=4000))
    assert not np.allclose(due, dues(2, requests=4000), atol=1e-9)


def test_an_open_loop_sends_all_that_was_due_in_its_time() -> None:
    due = dues(3, requests=1, seconds=2.0, rate=500.0)
    assert len(due) == pytest.approx(1000, rel=0.1) and due[-1] < 2.0
    np.testing.assert_array_equal(due, dues(3, requests=len(due), rate=500.0))


def test_no_arrival_is_sent_before_it_is_due_and_a_busy_sender_does_not_move_it() -> None:
    clock = Clock()
    send, seen = sender(clock, takes_s=0.005)  # five times what one thread can send
    drive(send, requests=40, seconds=0.0, concurrency=1, seed=0, rate=1000.0, clock=clock, sleep=clock.sleep)
    due, begun = (np.array(moments) - Clock.BEGINS for moments in list(zip(*seen, strict=True))[1:])
    np.testing.assert_array_equal(due, dues(0, requests=40, rate=1000.0))
    np.testing.assert_allclose(begun[0], due[0])
    assert (begun >= due).all() and begun[-1] == pytest.approx(due[0] + 39 * 0.005)
