"""Kill a process at a random instant, or before the k-th thing it does to the disk, and look at what it left.

The work runs in a child that a fork server starts, with the heavy imports done, so that the instant falls into the
work and not into Python's start. The child counts its *steps*: every file it opens for writing and everything it
makes, renames, deletes, locks or flushes below a root.

```
run_child(publish_release, workspace, release, root=workspace)                    # undisturbed: how many steps
run_child(publish_release, workspace, release, root=workspace, kill_at_step=7)    # dies before its seventh
run_child(publish_release, workspace, release, root=workspace, kill_after_s=0.3)
```
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from online.lookup.reader import VersionReader
from pipelines.contracts.durable import STAGING_PREFIX
from pipelines.contracts.workspace import Workspace
from tests.releases import FeastRepository, published_rows
from tests.waiting import PATIENCE_S

__all__ = [
    "Outcome", "every_step", "kill_during", "leftovers", "materialize_repository", "publish_release",
    "require_served", "require_whole", "retire_version", "run_child",
]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "feast.infra.offline_stores.duckdb", "online.store", "pipelines.engine", "pipelines.publish",
        "pipelines.contracts.redis_rows", "pipelines.registry", "tests.releases", "tests.warm_kernels",
    ]
)

_STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "fcntl.flock"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NAME_BYTES = 400
_MOST_STEPS = 400


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    Attributes:
        killed: whether it died by SIGKILL; otherwise it ended by itself.
        error: the exception that ended it, as `Type: message`, or "".
        steps: how many steps it had begun (with `kill_at_step`, the last of them was not taken).
        last: the last of these, such as "os.rename versions/.staging-1f-2".
        seconds: from its readiness to its end.
    """

    killed: bool
    error: str
    steps: int
    last: str
    seconds: float


def run_child(
    work: Callable[..., Any], *args: Any, root: Path, kill_at_step: int = 0, kill_after_s: float | None = None
) -> Outcome:
    """Run `work(*args)` in a child, which is killed before its step number `kill_at_step`, or after `kill_after_s`."""
    told, tell = _SERVER.Pipe(duplex=False)
    steps, last = _SERVER.RawValue("q", 0), _SERVER.RawArray("c", _NAME_BYTES)
    child = _SERVER.Process(target=_run, args=(tell, steps, last, str(root), kill_at_step, work, args))
    child.start()
    tell.close()
    if not told.poll(PATIENCE_S):
        child.kill()
        raise AssertionError("the child does not get ready")
    told.recv()  # it is ready; EOFError: it died before
    start = time.perf_counter()
    if kill_after_s is not None:
        child.join(kill_after_s)
        child.kill()
    child.join(PATIENCE_S)
    seconds = time.perf_counter() - start
    if child.is_alive():
        child.kill()
        raise AssertionError(f"the child hung at {last.value.decode()}")
    assert child.exitcode in (0, 1, -signal.SIGKILL), f"the child died by itself: {child.exitcode}"
    error = told.recv() if child.exitcode == 1 else ""
    told.close()
    return Outcome(child.exitcode < 0, error, steps.value, last.value.decode(errors="replace"), seconds)


def every_step(work: Callable[..., Any], *args: Any, root: Path) -> Iterator[Outcome]:
    """Run `work(*args)` again and again, killed before its first step, its second, … until it ends unharmed.

    The caller looks at what each left and puts everything back as it was.
    """
    for step in range(1, _MOST_STEPS):
        outcome = run_child(work, *args, root=root, kill_at_step=step)
        assert not outcome.error, f"before step {step}, {outcome.last}: {outcome.error}"
        yield outcome
        if not outcome.killed:
            return
    raise AssertionError(f"every run takes more steps than the one before: {outcome}")


def kill_during(work: Callable[..., Any], *args: Any, between_s: tuple[float, float], seed: int) -> bool:
    """Run `work(*args)` in a child and kill it (SIGKILL) at a random instant of `between_s`, from its start.

    Returns:
        Whether it was killed before it ended.
    """
    outcome = run_child(work, *args, root=Path("/"), kill_after_s=random.Random(seed).uniform(*between_s))
    assert not outcome.error, f"the work failed by itself: {outcome.error}"
    return outcome.killed


def _run(
    tell: Connection, steps: Any, last: Any, root: str, kill_at: int, work: Callable[..., Any], args: tuple
) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    here = os.getpid()

    def step(what: str, path: str) -> None:
        if os.getpid() != here:
            return
        steps.value += 1
        last.value = f"{what} {path.removeprefix(root)}".encode()[: _NAME_BYTES - 1]
        if steps.value == kill_at:
            os.kill(here, signal.SIGKILL)

    def hook(event: str, details: tuple) -> None:
        if event in _STEPS or (event == "open" and details[2] & _WRITING):
            path = _path(details[0])
            if path.startswith(root) or not path.startswith("/"):  # relative: to a directory that is being deleted
                step(event, path)

    flush = os.fsync

    def counted_flush(descriptor: int) -> None:
        step("os.fsync", _path(descriptor))
        flush(descriptor)

    os.fsync = counted_flush  # which has no audit event
    sys.addaudithook(hook)
    tell.send("ready")
    try:
        work(*args)
    except Exception as error:
        tell.send(f"{type(error).__name__}: {error}")
        sys.exit(1)
    os._exit(0)


def _path(named: Any) -> str:
    if isinstance(named, int):
        try:
            return os.readlink(f"/proc/self/fd/{named}")
        except OSError:
            return str(named)
    return os.fsdecode(named)


def publish_release(root: Path, release: Path) -> None:
    from pipelines.publish import publish

    publish(Workspace(root), release)


def materialize_repository(root: Path, views: list[str]) -> None:
    FeastRepository(root).materialize(views)


def retire_version(root: Path, version: int) -> None:
    from pipelines.retire import retire

    retire(Workspace(root), version)


def require_served(workspace: Workspace, version: int) -> None:
    """Assert that a reader opened now answers every published row of a version byte for byte."""
    reader = VersionReader.open(workspace, version)
    for spec in reader.manifest.tables:
        ids, truth = published_rows(workspace, version, spec.name)
        rows, found = reader.lookup(spec.name, ids)
        assert len(ids) == spec.rows and found.all() and np.array_equal(rows, truth), (spec.name, version)


def require_whole(workspace: Workspace) -> list[int]:
    """The published versions, after every file of each was hashed, and the pointer was found to name one of them."""
    versions = workspace.versions
    for number in versions.numbers():
        versions.manifest(number).verify(versions.path(number))
    assert versions.current() in versions.numbers()
    return versions.numbers()


def leftovers(root: Path) -> list[str]:
    """Names of what unfinished writers left below `root`."""
    return [str(path.relative_to(root)) for path in root.rglob(f"{STAGING_PREFIX}*")]
