"""The threads in which a server does its work, and who may use them."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from online.rpc.admission import Admission

__all__ = ["Executor"]

Result = TypeVar("Result")


class Executor:
    """Runs functions in as many threads as `admission` has slots. For the coroutines of one event loop.

    A function whose caller is cancelled runs to its end, and keeps its slot until then: a server in overload does not
    take on more than it can do because its clients give up.

    Args:
        name: of the threads.
    """

    def __init__(self, admission: Admission, name: str) -> None:
        self.admission = admission
        self._threads = ThreadPoolExecutor(admission.slots, thread_name_prefix=name)

    async def run(self, function: Callable[[float], Result], remaining_s: float | None = None) -> Result:
        """The result of `function`, which is called with the seconds that it had to wait for its turn.

        Raises:
            RpcError: as `Admission.enter`; and whatever the function raises.
        """
        waited_s = await self.admission.enter(remaining_s)
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def work() -> None:
            began = time.perf_counter()
            result, error = None, None
            try:
                result = function(waited_s)
            except Exception as raised:
                error = raised
            loop.call_soon_threadsafe(finish, result, error, time.perf_counter() - began)

        def finish(result: Result, error: Exception | None, inside_s: float) -> None:
            self.admission.leave(inside_s)
            if done.cancelled():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        self._threads.submit(work)
        return await done

    def close(self) -> None:
        """Take nothing more; what runs ends by itself."""
        self._threads.shutdown(wait=False)
