"""Driving: how many requests, when, and from which moment their latency counts."""

import threading
import time

import numpy as np
import pytest

from online.load.drive import drive


def sender():
    """A `Send` that keeps what it was called with, and that list: (number, due)."""
    seen, lock = [], threading.Lock()

    def send(number, random, begin) -> None:
        due = begin()
        with lock:
            seen.append((number, due))

    return send, seen


def test_a_closed_loop_sends_at_least_what_was_asked() -> None:
    send, seen = sender()
    drive(send, requests=57, seconds=0.0, concurrency=4, seed=0)
    assert len(seen) == 57 and len({number for number, _ in seen}) == 57
    seconds = drive(send, requests=1, seconds=0.05, concurrency=2, seed=0)
    assert seconds >= 0.05 and len(seen) > 58


def test_a_drive_goes_on_until_the_file_is_there(tmp_path) -> None:
    send, seen = sender()
    enough = tmp_path / "enough"
    threading.Timer(0.1, enough.touch).start()
    drive(send, requests=1, seconds=0.0, concurrency=1, seed=0, until=enough)
    assert enough.exists() and seen


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_what_a_sender_raises_ends_the_drive(rate) -> None:
    def fail(number, random, begin) -> None:
        begin()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(fail, requests=10_000, seconds=60.0, concurrency=3, seed=0, rate=rate)


@pytest.mark.parametrize("rate", [None, 0.01])
def test_a_drive_can_be_stopped_even_while_it_waits_for_an_arrival(rate) -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    send, _ = sender()
    drive(send, requests=10**9, seconds=3600.0, concurrency=2, seed=0, rate=rate, stop=stop)


def test_arrivals_of_an_open_loop_are_poisson_and_repeat_by_seed() -> None:
    def dues(seed: int) -> np.ndarray:
        send, seen = sender()
        before = time.perf_counter()
        drive(send, requests=400, seconds=0.0, concurrency=4, seed=seed, rate=2000.0)
        due = np.sort([due for _, due in seen])
        assert len(due) == 400 and due[0] > before
        return np.diff(due)

    gaps = dues(1)
    assert 0.4e-3 < gaps.mean() < 0.6e-3
    assert 0.8 < gaps.std() / gaps.mean() < 1.2
    np.testing.assert_allclose(gaps, dues(1), atol=1e-9)
    assert not np.allclose(gaps, dues(2), atol=1e-9)


def test_an_open_loop_sends_all_that_was_due_in_its_time() -> None:
    send, seen = sender()
    drive(send, requests=1, seconds=0.2, concurrency=4, seed=3, rate=500.0)
    due = np.sort([due for _, due in seen])
    assert 50 < len(due) < 160 and due[-1] - due[0] < 0.2


def test_no_arrival_is_sent_before_it_is_due_and_a_busy_sender_does_not_move_it() -> None:
    late = []

    def slow(number, random, begin) -> None:
        due = begin()
        late.append(time.perf_counter() - due)
        time.sleep(0.005)

    drive(slow, requests=40, seconds=0.0, concurrency=1, seed=0, rate=1000.0)  # five times what one thread can send
    assert min(late) >= 0 and len(late) == 40
    assert late[-1] > late[0] and late[-1] > 0.05
