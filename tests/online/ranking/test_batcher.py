"""Combining: every caller gets its own item's result, whoever worked on it and with whatever else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.ranking.batcher import Batcher
from tests.waiting import PATIENCE_S, until


class Unfit(Exception):
    """What work raises for one item."""


def test_an_item_that_meets_nobody_is_worked_on_at_once_and_alone() -> None:
    batches = []
    combined = Batcher(lambda items: [item + 1 for item in items], observe=batches.append)
    assert [combined.submit(item) for item in (1, 2, 3)] == [2, 3, 4] and batches == [1, 1, 1]


def test_items_that_come_meanwhile_are_worked_on_together_up_to_the_limit() -> None:
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return [10 * item for item in items]

    combined = Batcher(work, max_size=6, size=lambda item: item)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(combined.submit, 1)]
        assert begun.wait(PATIENCE_S)
        for position, item in enumerate((2, 3, 1, 9, 4)):
            answers.append(pool.submit(combined.submit, item))
            until(lambda position=position: len(combined._waiting) > position)  # so that they wait in this order
        go_on.set()
        assert [answer.result(PATIENCE_S) for answer in answers] == [10, 20, 30, 10, 90, 40]
    assert batches == [[1], [2, 3, 1], [9], [4]], "an item above the limit goes alone, and nothing overtakes it"


@settings(max_examples=25, deadline=None)
@given(
    threads=st.integers(2, 12), each=st.integers(1, 30), max_size=st.integers(1, 20),
    unfit=st.sets(st.integers(0, 359), max_size=40),
)
def test_each_thread_gets_its_own_results_and_errors(threads, each, max_size, unfit) -> None:
    working = threading.Lock()

    def work(items: list[int]) -> list[int]:
        assert working.acquire(blocking=False), "two threads work at a time"
        try:
            if bad := unfit.intersection(items):
                raise Unfit(min(bad))
            return [item * item for item in items]
        finally:
            working.release()

    combined = Batcher(work, max_size=max_size)

    def call(thread: int) -> None:
        for item in range(thread * each, (thread + 1) * each):
            if item in unfit:
                with pytest.raises(Unfit) as caught:
                    combined.submit(item)
                assert caught.value.args == (item,)
            else:
                assert combined.submit(item) == item * item

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, range(threads)))
    assert combined.submit(1000) == 1_000_000, "it goes on afterwards"


def test_a_batch_that_fails_is_done_again_item_by_item() -> None:
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def work(items: list[str]) -> list[str]:
        batches.append(items)
        if items == ["first"]:
            begun.set()
            assert go_on.wait(PATIENCE_S)
        if "unfit" in items:
            raise Unfit(len(items))
        return [item.upper() for item in items]

    combined = Batcher(work)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(combined.submit, "first")
        assert begun.wait(PATIENCE_S)
        others = []
        for item in ("a", "unfit", "b"):
            others.append(pool.submit(combined.submit, item))
            until(lambda: len(combined._waiting) == len(others))
        go_on.set()
        assert [first.result(PATIENCE_S), others[0].result(PATIENCE_S), others[2].result(PATIENCE_S)] == [
            "FIRST", "A", "B",
        ]
        error = others[1].exception(PATIENCE_S)
        assert isinstance(error, Unfit) and error.args == (1,), "its own error, not the batch's"
    assert batches == [["first"], ["a", "unfit", "b"], ["a"], ["unfit"], ["b"]]


def test_too_few_results_are_an_error_and_not_somebody_elses() -> None:
    combined = Batcher(lambda items: [])
    with pytest.raises(ValueError, match="zip"):
        combined.submit(1)


def test_whoever_waits_is_not_left_behind_when_the_leader_is_torn_down() -> None:
    class TornDown(BaseException):
        pass

    begun, go_on = threading.Event(), threading.Event()

    def work(items: list[str]) -> list[str]:
        if items == ["first"]:
            begun.set()
            assert go_on.wait(PATIENCE_S)
        if "killer" in items:
            raise TornDown
        return items

    combined = Batcher(work)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(combined.submit, "first")
        assert begun.wait(PATIENCE_S)
        others = []
        for item in ("killer", "beside it"):
            others.append(pool.submit(combined.submit, item))
            until(lambda: len(combined._waiting) == len(others))
        go_on.set()
        assert first.result(PATIENCE_S) == "first"
        assert isinstance(others[0].exception(PATIENCE_S), TornDown)
        assert "was stopped" in str(others[1].exception(PATIENCE_S))
    assert combined.submit("next") == "next"
