"""Kill a process at a random instant and look at what it left.

The work runs in a child that a fork server starts, with the heavy imports done, so that the instant falls into the
work and not into Python's start.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["kill_during", "materialize_repository", "publish_candidate"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["feast", "pipelines.publish", "pipelines.engine", "online.store"])


def kill_during(work: Callable[..., Any], *args: Any, between_s: tuple[float, float], seed: int) -> bool:
    """Run `work(*args)` in a child and kill it (SIGKILL) at a random instant of `between_s`, from its start.

    Returns:
        Whether it was killed before it ended.
    """
    started = _SERVER.Event()
    child = _SERVER.Process(target=_run, args=(started, work, args))
    child.start()
    assert started.wait(60), "the child did not start"
    time.sleep(random.Random(seed).uniform(*between_s))
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), f"the work failed by itself: {child.exitcode}"
    return child.exitcode != 0


def _run(started: Any, work: Callable[..., Any], args: tuple) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    started.set()
    work(*args)


def publish_candidate(root: Path, candidate: Path) -> None:
    from pipelines.contracts.workspace import Workspace
    from pipelines.publish import publish

    publish(Workspace(root), candidate)


def materialize_repository(root: Path, views: list[str]) -> None:
    from tests.releases import FeastRepository

    FeastRepository(root).materialize(views)
