"""Calls that wait for their clients: not for ever, and not too many of them."""

import asyncio

import pytest

from online.rpc.waiting import WaitingCalls
from online.rpc_error import Code, RpcError

HOURS_S = 36_000.0


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def waits(calls: WaitingCalls, seconds: float) -> str:
    try:
        with calls.at_most(seconds):
            await asyncio.get_running_loop().create_future()
    except RpcError as error:
        return error.code.name
    return "never"


def test_a_call_waits_as_long_as_it_may() -> None:
    async def run() -> None:
        calls = WaitingCalls()
        assert await waits(calls, 0.001) == Code.DEADLINE.name
        assert len(calls) == 0

    asyncio.run(run())


def test_what_comes_in_time_is_what_it_was_waited_for() -> None:
    async def run() -> None:
        calls = WaitingCalls()
        with calls.at_most(HOURS_S):
            assert len(calls) == 1
        assert len(calls) == 0
        with pytest.raises(KeyError), calls.at_most(HOURS_S):
            raise KeyError
        assert len(calls) == 0

    asyncio.run(run())


def test_of_too_many_the_one_that_waits_longest_ends() -> None:
    async def run() -> None:
        calls = WaitingCalls(most=3)
        tasks = [asyncio.create_task(waits(calls, HOURS_S)) for _ in range(3)]
        await settled()
        assert len(calls) == 3 and not any(task.done() for task in tasks)
        tasks.append(asyncio.create_task(waits(calls, HOURS_S)))
        assert await tasks[0] == Code.DEADLINE.name
        await settled()
        assert [task.done() for task in tasks] == [True, False, False, False] and len(calls) == 3
        tasks[1].cancel()  # its place is free: the next one ends nobody
        await settled()
        tasks.append(asyncio.create_task(waits(calls, HOURS_S)))
        await settled()
        assert [task.done() for task in tasks] == [True, True, False, False, False] and len(calls) == 3

    asyncio.run(run())


def test_a_call_that_grpc_cancels_in_the_same_moment_is_cancelled() -> None:
    async def run() -> None:
        calls = WaitingCalls(most=1)
        first = asyncio.create_task(waits(calls, HOURS_S))
        await settled()
        second = asyncio.create_task(waits(calls, HOURS_S))
        await asyncio.sleep(0)  # which has ended the first, but that has not run yet
        first.cancel()
        await settled()
        assert first.cancelled() and not second.done() and len(calls) == 1

    asyncio.run(run())


def test_a_short_wait_ends_beside_long_ones_that_go_on() -> None:
    async def run() -> None:
        calls = WaitingCalls()
        long = asyncio.create_task(waits(calls, HOURS_S))
        await settled()
        for _ in range(2):  # the second begins when everybody has been looked at once
            assert await asyncio.wait_for(waits(calls, 0.001), 60) == Code.DEADLINE.name
        assert len(calls) == 1 and not long.done()
        long.cancel()

    asyncio.run(run())


def test_waits_of_different_lengths_end_each() -> None:
    async def run() -> None:
        calls = WaitingCalls()
        ended = await asyncio.wait_for(asyncio.gather(*(waits(calls, seconds) for seconds in (0.001, 0.1))), 60)
        assert ended == [Code.DEADLINE.name] * 2 and len(calls) == 0

    asyncio.run(run())


def test_a_port_has_four_thousand_calls_wait_and_no_more() -> None:
    async def run() -> None:
        calls = WaitingCalls()
        tasks = [asyncio.create_task(waits(calls, HOURS_S)) for _ in range(4097)]
        await settled()
        assert [task.done() for task in tasks] == [True] + [False] * 4096 and len(calls) == 4096

    asyncio.run(run())
