"""A clock that only sleeping moves."""

__all__ = ["Clock"]


class Clock:
    """Call for the time, seconds."""

    BEGINS = 100.0

    def __init__(self) -> None:
        self.now = self.BEGINS

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
