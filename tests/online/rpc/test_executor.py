"""Work in threads, for coroutines: results, errors, and slots that follow the work and not its caller."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from online.rpc.admission import Admission
from online.rpc.executor import Executor
from online.rpc_error import Code, RpcError
from tests.waiting import PATIENCE_S, joined


def run(test, **admission) -> None:
    """Run a test of an executor with one slot, and with room for one to wait; it fails if it hangs."""

    async def with_executor() -> None:
        executor = Executor(Admission(1, 1, **admission), "work")
        try:
            async with asyncio.timeout(PATIENCE_S):
                await test(executor)
        finally:
            executor.close()
            joined(*[thread for thread in threading.enumerate() if thread.name.startswith("work")])

    asyncio.run(with_executor())


@asynccontextmanager
async def held(executor: Executor) -> AsyncIterator[tuple[asyncio.Task, threading.Event]]:
    """The call that has the slot, and what ends its work; at the end of the block it is over in any case."""
    inside, go = threading.Event(), threading.Event()
    try:
        call = asyncio.create_task(executor.run(lambda _: (inside.set(), go.wait(2 * PATIENCE_S))[1]))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        yield call, go
    finally:
        go.set()


def test_a_function_runs_in_a_thread_of_the_executor() -> None:
    async def test(executor: Executor) -> None:
        assert (await executor.run(lambda waited_s: threading.current_thread().name)).startswith("work")
        assert await executor.run(lambda waited_s: waited_s) == 0.0
        with pytest.raises(KeyError):
            await executor.run(lambda waited_s: {}[waited_s])
        assert executor.admission.in_flight == 0

    run(test)


def test_one_more_than_may_wait_is_refused() -> None:
    async def test(executor: Executor) -> None:
        async with held(executor) as (first, go):
            second = asyncio.create_task(executor.run(lambda _: "second"))
            while executor.admission.waiting < 1:
                await asyncio.sleep(0)
            with pytest.raises(RpcError) as caught:
                await executor.run(lambda _: None)
            assert caught.value.code is Code.OVERLOADED
            go.set()
            assert await first and await second == "second"

    run(test)


def test_a_function_whose_caller_is_cancelled_keeps_its_slot_until_it_ends() -> None:
    async def test(executor: Executor) -> None:
        wrong = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        async with held(executor) as (first, go):
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            second = asyncio.create_task(executor.run(lambda _: "second"))
            while not executor.admission.waiting:
                await asyncio.sleep(0)
            assert executor.admission.in_flight == 1
            go.set()
            assert await second == "second"
        assert executor.admission.in_flight == 0
        assert not wrong, "its result is nobody's"

    run(test)


def test_a_function_is_told_how_long_it_waited() -> None:
    async def test(executor: Executor) -> None:
        async with held(executor) as (first, go):
            second = asyncio.create_task(executor.run(lambda waited_s: waited_s))
            while not executor.admission.waiting:
                await asyncio.sleep(0)
            go.set()
            assert await first and await second == 7.0

    run(test, clock=iter([100.0, 107.0]).__next__)


def test_whether_its_turn_comes_in_time_is_judged_by_how_long_functions_took() -> None:
    async def test(executor: Executor) -> None:
        await executor.run(lambda _: sum(range(1000)))
        async with held(executor):
            with pytest.raises(RpcError) as caught:
                await executor.run(lambda _: None, 1e-9)
            assert caught.value.code is Code.OVERLOADED and "too much to do" in str(caught.value)
            with pytest.raises(RpcError) as caught:
                await executor.run(lambda _: None, 0.0)
            assert caught.value.code is Code.DEADLINE

    run(test)


def test_a_closed_executor_takes_nothing_more() -> None:
    async def test(executor: Executor) -> None:
        executor.close()
        with pytest.raises(RuntimeError):
            await executor.run(lambda _: None)

    run(test)
