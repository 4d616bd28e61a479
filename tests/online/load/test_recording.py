"""Compact recording, and the figures drawn from it."""

import threading

import numpy as np
import pytest

from online.load.recording import BLOCK_ROWS, Failures, Growing, histogram, percentiles
from tests.waiting import joined


@pytest.mark.parametrize("rows", [0, 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 1])
def test_rows_come_back_in_order(rows) -> None:
    growing = Growing({"a": (np.int64, ()), "b": (np.float32, (2,))})
    for number in range(rows):
        growing.append(a=number, b=[number, -number])
    assert len(growing) == rows and growing.column("a").tolist() == list(range(rows))
    assert growing.column("b").shape == (rows, 2) and growing.column("b").dtype == np.float32


def test_rows_of_many_threads_stay_whole() -> None:
    growing = Growing({"a": (np.int64, ()), "b": (np.int64, ())})

    def append(thread: int) -> None:
        for number in range(5000):
            growing.append(a=thread * 5000 + number, b=-(thread * 5000 + number))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    joined(*threads)
    assert (growing.column("a") == -growing.column("b")).all()
    assert sorted(growing.column("a").tolist()) == list(range(20_000))


def test_failures_are_all_counted_and_few_are_told() -> None:
    failures = Failures()
    for number in range(100):
        failures.append("A" if number % 4 else "B", number / 10, f"message {number}")
    assert len(failures) == 100 and failures.by_code() == {"B": 25, "A": 75}
    assert [failure["message"] for failure in failures.first] == [f"message {number}" for number in range(5)]
    np.testing.assert_allclose(failures.since_s(), np.arange(100) / 10, rtol=1e-6)


def test_percentiles() -> None:
    assert percentiles([])["p99"] == 0.0 and percentiles([1.0, 3.0])["p50"] == 2.0
    figures = percentiles(np.arange(10_001) / 10)
    assert (figures["p50"], figures["p95"], figures["p99_9"], figures["max"]) == (500.0, 950.0, 999.0, 1000.0)


def test_a_histogram_counts_everything_even_beyond_its_edges() -> None:
    counted = histogram(np.array([0.001, 1.0, 5.0, 9000.0]))
    assert sum(counted["counts"]) == 4 and counted["edges_ms"][-1] == 9000.0
    assert len(counted["edges_ms"]) == len(counted["counts"]) + 1 == 201
    assert sum(histogram(np.array([]))["counts"]) == 0
