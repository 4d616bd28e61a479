"""How long the machine, or its disk, stood still.

A shared machine is sometimes not run at all for seconds or minutes, while its clocks go on. A process of its own
watches for that: one thread on each core and one that writes to disk, each of which should come back within a moment.
Nothing that another process does holds them up for long, so a defect of what is tested does not look like it.

Only the standard library: the process runs this file, and should be small.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["BEAT_S", "Late", "MachineWatch"]

BEAT_S = 0.25
NOTED_S = 0.25
KEPT = 1000


class Late:
    """How late something was that should come back every `BEAT_S`; moments are of `time.monotonic()`.

    Example:
        >>> late = Late(10.0)
        >>> late.came_back(10.25); late.came_back(13.5); late.came_back(13.75)
        >>> round(late.longest(since=11.0, now=13.9), 3), round(late.longest(since=13.6, now=13.9), 3)
        (3.0, 0.0)
        >>> round(late.longest(since=13.6, now=16.0), 3)
        2.0
    """

    def __init__(self, now: float) -> None:
        self._back = now
        self._stops: deque[tuple[float, float]] = deque(maxlen=KEPT)  # moment at which it was over, seconds

    def came_back(self, now: float) -> None:
        if (late := now - self._back - BEAT_S) > NOTED_S:
            self._stops.append((now, late))
        self._back = now

    def longest(self, *, since: float, now: float) -> float:
        """Seconds of the longest stop that was not yet over at `since`, or is not over `now`; 0 if there was none."""
        return max(0.0, now - self._back - BEAT_S, *(late for end, late in [*self._stops] if end >= since))


class MachineWatch:
    """The process that watches, until it is closed or this process ends."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.longest_since(time.monotonic())  # it has begun

    def longest_since(self, moment: float) -> float:
        """Seconds of the longest standstill of a core or of the disk since `time.monotonic()` was `moment`."""
        self.process.stdin.write(f"{moment!r}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def _follow(beat: Callable[[], None], cores: set[int]) -> Late:
    late = Late(time.monotonic())

    def follow() -> None:
        os.sched_setaffinity(threading.get_native_id(), cores)
        while True:
            beat()
            late.came_back(time.monotonic())

    threading.Thread(target=follow, daemon=True).start()
    return late


def _watch() -> None:
    def rest() -> None:
        time.sleep(BEAT_S)

    def write() -> None:
        time.sleep(BEAT_S)
        os.pwrite(probe.fileno(), b"x", 0)
        os.fsync(probe.fileno())

    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryFile() as probe:
        followed = [_follow(write, cores), *(_follow(rest, {core}) for core in sorted(cores))]
        for line in sys.stdin:
            since, now = float(line), time.monotonic()
            print(max(late.longest(since=since, now=now) for late in followed), flush=True)
        os._exit(0)  # before the file is closed under the thread that writes to it


if __name__ == "__main__":
    _watch()
