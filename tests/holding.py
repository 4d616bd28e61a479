"""A server that is busy, for as long as a test wants it to be."""

from collections.abc import Iterator
from contextlib import contextmanager

from online.rpc.loop import in_loop
from online.rpc.server import Endpoint

__all__ = ["holding", "lasted"]


@contextmanager
def holding(endpoint: Endpoint) -> Iterator[None]:
    """All slots of the endpoint are taken for the time of a block."""
    for _ in range(endpoint.admission.slots):
        in_loop(endpoint.admission.enter())
    try:
        yield
    finally:
        for _ in range(endpoint.admission.slots):
            in_loop(_leave(endpoint, 0.0))


def lasted(endpoint: Endpoint, seconds: float) -> None:
    """A hundred requests to the endpoint, one after the other, as if each had taken so long."""
    in_loop(_work(endpoint, seconds))


async def _leave(endpoint: Endpoint, inside_s: float) -> None:
    endpoint.admission.leave(inside_s)


async def _work(endpoint: Endpoint, seconds: float) -> None:
    for _ in range(100):
        await endpoint.admission.enter()
        endpoint.admission.leave(seconds)
