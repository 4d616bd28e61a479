"""Who works, who waits and who is refused; by coroutines that run in an order of our own, and a clock that stands."""

import asyncio
from collections.abc import Awaitable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.rpc.admission import Admission
from online.rpc_error import Code, RpcError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def settled() -> None:
    """Everything that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def refused(entering: Awaitable) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await entering
    return caught.value


def test_slots_then_the_queue_then_nobody() -> None:
    async def run() -> None:
        admission = Admission(2, 3)
        assert [await admission.enter(), await admission.enter()] == [0.0, 0.0]
        waiting = [asyncio.create_task(admission.enter()) for _ in range(3)]
        await settled()
        assert (admission.in_flight, admission.waiting) == (2, 3)
        error = await refused(admission.enter())
        assert error.code is Code.OVERLOADED and "2 requests that are worked on, and 3 that wait" in str(error)
        admission.leave(0.0)
        await settled()
        assert [task.done() for task in waiting] == [True, False, False], "in the order in which they came"
        assert (admission.in_flight, admission.waiting) == (2, 2), "the slot was never free in between"
        for _ in range(4):
            admission.leave(0.0)
            await settled()
        assert (admission.in_flight, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_without_a_queue_nobody_waits() -> None:
    async def run() -> None:
        admission = Admission(1)
        await admission.enter()
        assert (await refused(admission.enter(60.0))).code is Code.OVERLOADED

    asyncio.run(run())


def test_the_seconds_waited_are_those_of_the_clock() -> None:
    async def run() -> None:
        clock = Clock()
        admission = Admission(1, 1, clock=clock)
        await admission.enter()
        waiting = asyncio.create_task(admission.enter(60.0))
        await settled()
        clock.now += 2.5
        admission.leave(0.0)
        assert await waiting == 2.5

    asyncio.run(run())


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    """One slot, 8 s in the mean, one request ahead of it: 1.5 x 8 x (2 + 1) = 36 s are needed."""

    async def run() -> None:
        admission = Admission(1, 9)
        for _ in range(500):
            await admission.enter()
            admission.leave(8.0)
        await admission.enter(0.001)  # a free slot is worth trying
        waiting = asyncio.create_task(admission.enter())
        await settled()
        with pytest.raises(RpcError, match="35900 ms are left, and 1 requests wait") as caught:
            admission.check(35.9)
        assert caught.value.code is Code.OVERLOADED
        admission.check(36.1)
        admission.check(None)
        assert (await refused(admission.enter(35.9))).code is Code.OVERLOADED
        error = await refused(admission.enter(0.0))
        assert error.code is Code.DEADLINE and "was over when the request came" in str(error)
        waiting.cancel()

    asyncio.run(run())


def test_more_slots_are_less_to_wait_for() -> None:
    """Two slots, 8 s, none ahead: 1.5 x 8 x (1/2 + 1) = 18 s."""

    async def run() -> None:
        admission = Admission(2, 9)
        for _ in range(500):
            await admission.enter()
            admission.leave(8.0)
        await admission.enter()
        await admission.enter()
        with pytest.raises(RpcError):
            admission.check(17.9)
        admission.check(18.1)

    asyncio.run(run())


@pytest.mark.parametrize(("requests", "mean_s"), [(1, 1.0), (2, 1.9375)])
def test_the_mean_follows_the_latest_requests(requests, mean_s) -> None:
    """A sixteenth of every request: after one of 16 s, 1 s; after another, 1 + 15/16. Twice 1.5 times it is needed."""

    async def run() -> None:
        admission = Admission(1, 9)
        for _ in range(requests):
            await admission.enter()
            admission.leave(16.0)
        await admission.enter()
        with pytest.raises(RpcError):
            admission.check(3 * mean_s - 0.001)
        admission.check(3 * mean_s + 0.001)

    asyncio.run(run())


def test_a_turn_that_comes_too_late_is_passed_on() -> None:
    async def run() -> None:
        clock = Clock()
        admission = Admission(1, 9, clock=clock)
        await admission.enter()
        first = asyncio.create_task(admission.enter(60.0))
        second = asyncio.create_task(admission.enter(600.0))
        await settled()
        clock.now += 59.0
        admission.leave(32.0)  # 2 s in the mean, and the first has one second left
        error = await refused(first)
        assert error.code is Code.DEADLINE and "1000 ms were left when its turn came" in str(error)
        assert await second == 59.0
        admission.leave(0.0)
        assert admission.in_flight == 0

    asyncio.run(run())


def test_who_is_cancelled_gives_back_his_place_or_his_slot() -> None:
    async def run() -> None:
        admission = Admission(1, 3)
        await admission.enter()
        first, second, third = (asyncio.create_task(admission.enter()) for _ in range(3))
        await settled()
        first.cancel()
        await settled()
        assert (admission.in_flight, admission.waiting) == (1, 2)
        admission.leave(0.0)  # the slot is the second's now ...
        second.cancel()  # ... who is cancelled in this very moment, before he runs
        await settled()
        assert second.cancelled() and third.done() and not third.cancelled()
        assert (admission.in_flight, admission.waiting) == (1, 0)
        admission.leave(0.0)
        assert admission.in_flight == 0

    asyncio.run(run())


def test_one_that_was_just_cancelled_is_given_no_slot() -> None:
    async def run() -> None:
        admission = Admission(1, 3)
        await admission.enter()
        first, second = (asyncio.create_task(admission.enter()) for _ in range(2))
        await settled()
        first.cancel()
        admission.leave(0.0)  # before the first one runs, who is still in the queue
        await settled()
        assert first.cancelled() and second.done() and admission.in_flight == 1

    asyncio.run(run())


@pytest.mark.parametrize(("slots", "queue"), [(0, 1), (-1, 1), (1, -1)])
def test_impossible_sizes_are_refused(slots, queue) -> None:
    with pytest.raises(ValueError, match="expected slots >= 1 and queue >= 0"):
        Admission(slots, queue)


@settings(max_examples=100, deadline=None)
@given(
    slots=st.integers(1, 3), queue=st.integers(0, 3),
    steps=st.lists(st.sampled_from(["enter", "leave", "cancel first", "cancel last"]), max_size=40),
    settle=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_no_slot_is_lost_or_given_twice(slots, queue, steps, settle) -> None:
    async def run() -> None:
        admission, tasks = Admission(slots, queue), []

        def inside() -> list[asyncio.Task]:
            return [task for task in tasks if task.done() and not task.cancelled() and not task.exception()]

        for step, let_run in zip(steps, settle, strict=False):
            undone = [task for task in tasks if not task.done()]
            if step == "enter":
                tasks.append(asyncio.create_task(admission.enter()))
            elif step == "leave" and inside():
                tasks.remove(inside()[0])
                admission.leave(1.0)
            elif undone:
                undone[0 if step == "cancel first" else -1].cancel()
            if let_run:
                await settled()
        await settled()
        assert len(inside()) == admission.in_flight <= slots
        assert admission.waiting == len([task for task in tasks if not task.done()]) <= queue
        assert not admission.waiting or admission.in_flight == slots
        while inside():
            tasks.remove(inside()[0])
            admission.leave(0.0)
            await settled()
        assert (admission.in_flight, admission.waiting) == (0, 0)

    asyncio.run(run())
