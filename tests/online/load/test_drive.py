"""Driving: how many requests, when, and from which moment their latency counts."""

import threading

import numpy as np
import pytest

from online.load.drive import NAP_S, drive
from tests.waiting import FakeClock


def sender(clock: FakeClock | None = None, *, takes_s: float = 0.0):
    """A `Send` that keeps what it was called with, and that list: (number, due)."""
    seen, lock = [], threading.Lock()

    def send(number, random, begin) -> None:
        due = begin()
        with lock:
            seen.append((number, due))
        if clock:
            clock.advance(takes_s)

    return send, seen


def test_a_closed_loop_sends_what_was_asked() -> None:
    send, seen = sender()
    drive(send, requests=57, seconds=0.0, concurrency=4, seed=0)
    assert len(seen) == 57 and len({number for number, _ in seen}) == 57


def test_a_closed_loop_goes_on_until_its_time_is_over() -> None:
    clock = FakeClock()
    send, seen = sender(clock, takes_s=0.25)
    assert drive(send, requests=3, seconds=2.0, concurrency=1, seed=0, clock=clock) == 2.0
    assert [due for _, due in seen] == [1000 + 0.25 * number for number in range(8)]


def test_a_thread_of_a_closed_loop_thinks_before_each_request_which_counts_for_no_latency() -> None:
    clock = FakeClock()
    send, seen = sender(clock, takes_s=0.25)
    drive(send, requests=3, seconds=0.0, concurrency=1, seed=0, think_s=2.0, clock=clock)
    assert [due for _, due in seen] == [1002.0, 1004.25, 1006.5]


def test_a_drive_goes_on_until_the_file_is_there(tmp_path) -> None:
    enough, sent = tmp_path / "enough", []

    def send(number, random, begin) -> None:
        begin()
        sent.append(number)
        if len(sent) == 30:
            enough.touch()

    drive(send, requests=1, seconds=0.0, concurrency=1, seed=0, until=enough)
    assert len(sent) == 30


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_what_a_sender_raises_ends_the_drive(rate) -> None:
    sent = []

    def fail(number, random, begin) -> None:
        begin()
        sent.append(number)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(fail, requests=10_000, seconds=60.0, concurrency=3, seed=0, rate=rate, clock=FakeClock())
    assert len(sent) <= 3, "a thread that has seen one fail sends no more"


def test_a_closed_loop_can_be_stopped() -> None:
    stop, sent = threading.Event(), []

    def send(number, random, begin) -> None:
        begin()
        sent.append(number)
        if len(sent) == 5:
            stop.set()

    drive(send, requests=10**9, seconds=3600.0, concurrency=1, seed=0, stop=stop)
    assert len(sent) == 5


def test_an_open_loop_can_be_stopped_while_it_waits_for_an_arrival() -> None:
    stop, clock = threading.Event(), FakeClock()
    clock.meanwhile = stop.set
    send, seen = sender()
    drive(send, requests=10**9, seconds=3600.0, concurrency=2, seed=0, rate=0.01, stop=stop, clock=clock)
    assert clock.slept == [NAP_S] and not seen


def test_arrivals_of_an_open_loop_are_poisson_and_repeat_by_seed() -> None:
    def dues(seed: int) -> np.ndarray:
        send, seen = sender()
        drive(send, requests=400, seconds=0.0, concurrency=4, seed=seed, rate=2000.0, clock=FakeClock())
        due = np.sort([due for _, due in seen])
        assert len(due) == 400 and due[0] > 1000
        return np.diff(due)

    gaps = dues(1)
    assert 0.4e-3 < gaps.mean() < 0.6e-3
    assert 0.8 < gaps.std() / gaps.mean() < 1.2
    np.testing.assert_allclose(gaps, dues(1), atol=1e-9)
    assert not np.allclose(gaps, dues(2), atol=1e-9)


def test_an_open_loop_sends_all_that_was_due_in_its_time() -> None:
    send, seen = sender()
    drive(send, requests=1, seconds=0.2, concurrency=4, seed=3, rate=500.0, clock=FakeClock())
    due = np.sort([due for _, due in seen]) - 1000
    assert 50 < len(due) < 160 and due[-1] < 0.2
    again, more = sender()
    drive(again, requests=len(due) + 1, seconds=0.0, concurrency=4, seed=3, rate=500.0, clock=FakeClock())
    assert max(due for _, due in more) - 1000 >= 0.2, "the one after them was not due in it"


def test_no_arrival_is_sent_before_it_is_due_and_a_busy_sender_does_not_move_it() -> None:
    def dues_and_lateness(takes_s: float) -> tuple[list[float], list[float]]:
        clock, due_s, late_s = FakeClock(), [], []

        def send(number, random, begin) -> None:
            due_s.append(begin())
            late_s.append(clock.now() - due_s[-1])
            clock.advance(takes_s)

        drive(send, requests=40, seconds=0.0, concurrency=1, seed=0, rate=1000.0, clock=clock)
        return due_s, late_s

    (due_s, on_time), (busy_due_s, late_s) = dues_and_lateness(0.0), dues_and_lateness(0.005)
    assert busy_due_s == due_s
    assert max(on_time) < 1e-9 and min(late_s) > -1e-9
    # one that takes 5 ms sends five times as slowly as they arrive
    assert late_s[-1] == pytest.approx(39 * 0.005 - (due_s[-1] - due_s[0]), abs=1e-9)
