"""A pin that notes when it is taken and when it is released."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["recorded_pin"]


def recorded_pin(happened: list[str]) -> Callable[[int], AbstractContextManager[None]]:
    """As `pin` of hosted versions and runnable models: appends `pin N` and `release N` to what has happened."""

    @contextmanager
    def pin(version: int) -> Iterator[None]:
        happened.append(f"pin {version}")
        try:
            yield
        finally:
            happened.append(f"release {version}")

    return pin
