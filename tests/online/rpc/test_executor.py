"""Work in threads, for coroutines: results, errors, and slots that follow the work and not its caller."""

import asyncio
import threading

import pytest

from online.rpc.admission import Admission
from online.rpc.executor import Executor
from online.rpc_error import Code, RpcError


def run(test) -> None:
    """Run a test of an executor with one slot, and with room for one to wait."""

    async def with_executor() -> None:
        executor = Executor(Admission(1, 1), "work")
        await test(executor)
        executor.close()

    asyncio.run(with_executor())


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
        go = threading.Event()
        first, second = (asyncio.create_task(executor.run(lambda _: go.wait(600))) for _ in range(2))
        while executor.admission.waiting < 1:
            await asyncio.sleep(0)
        with pytest.raises(RpcError) as caught:
            await executor.run(lambda _: None)
        assert caught.value.code is Code.OVERLOADED
        go.set()
        assert await first and await second

    run(test)


def test_a_function_whose_caller_is_cancelled_keeps_its_slot_until_it_ends() -> None:
    async def test(executor: Executor) -> None:
        wrong = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        inside, go = threading.Event(), threading.Event()
        first = asyncio.create_task(executor.run(lambda _: (inside.set(), go.wait(600))))
        await asyncio.to_thread(inside.wait, 600)
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
    async def test() -> None:
        executor = Executor(Admission(1, 1, clock=iter([100.0, 107.0]).__next__), "work")
        go = threading.Event()
        first = asyncio.create_task(executor.run(lambda _: go.wait(600)))
        second = asyncio.create_task(executor.run(lambda waited_s: waited_s))
        while not executor.admission.waiting:
            await asyncio.sleep(0)
        go.set()
        assert await first and await second == 7.0
        executor.close()

    asyncio.run(test())


def test_whether_its_turn_comes_in_time_is_judged_by_how_long_functions_took() -> None:
    async def test(executor: Executor) -> None:
        inside, go = threading.Event(), threading.Event()
        await executor.run(lambda _: sum(range(1000)))
        first = asyncio.create_task(executor.run(lambda _: (inside.set(), go.wait(600))))
        await asyncio.to_thread(inside.wait, 600)
        with pytest.raises(RpcError) as caught:
            await executor.run(lambda _: None, 1e-9)
        assert caught.value.code is Code.OVERLOADED and "too much to do" in str(caught.value)
        with pytest.raises(RpcError) as caught:
            await executor.run(lambda _: None, 0.0)
        assert caught.value.code is Code.DEADLINE
        go.set()
        await first

    run(test)


def test_a_closed_executor_takes_nothing_more() -> None:
    async def test(executor: Executor) -> None:
        executor.close()
        with pytest.raises(RuntimeError):
            await executor.run(lambda _: None)

    run(test)
