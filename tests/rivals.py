"""Several processes that do the same kind of thing at the same moment, round after round.

```
race(range(20), (publishing, root, mine), (publishing, root, theirs))     → [("done", "VersionConflict: …"), …]
```
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from online.lookup.reader import VersionReader
from pipelines.contracts.workspace import Workspace
from tests.crash import require_served
from tests.releases import FeastRepository
from tests.waiting import PATIENCE_S

__all__ = ["applying", "declaring", "holding", "materializing", "publishing", "race", "retiring"]

JITTER_S = 0.02
OUTCOME_CHARS = 300  # all outcomes together fit into a pipe that nobody reads yet

Work = Callable[..., AbstractContextManager[Any]]


def race(rounds: Iterable[int], *rivals: tuple[Work, ...]) -> list[tuple[str, ...]]:
    """In each round every rival, a process of its own, enters `work(*args, round)`; none leaves before all have tried.

    Returns:
        Per round, per rival: what the work yielded, as text, or `Type: message` of what it raised.
    """
    context = multiprocessing.get_context("forkserver")
    rounds = list(rounds)
    barrier, told = context.Barrier(len(rivals)), context.SimpleQueue()
    children = [
        context.Process(target=_rival, args=(index, work, args, rounds, barrier, told))
        for index, (work, *args) in enumerate(rivals)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE_S)
        child.kill()
    assert [child.exitcode for child in children] == [0] * len(children), "a rival hung or died"
    outcomes = dict(told.get() for _ in range(len(rounds) * len(rivals)))
    return [tuple(outcomes[number, index] for index in range(len(rivals))) for number in rounds]


def _rival(index: int, work: Work, args: list, rounds: list[int], barrier: Any, told: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    random_s = random.Random(index)
    for number in rounds:
        barrier.wait(PATIENCE_S)
        time.sleep(random_s.uniform(0, JITTER_S))
        with ExitStack() as held:
            try:
                outcome = str(held.enter_context(work(*args, number)))
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            barrier.wait(PATIENCE_S)
            try:
                held.close()
            except Exception as error:
                outcome = f"left with {type(error).__name__}: {error}"
        told.put(((number, index), outcome[:OUTCOME_CHARS]))
    os._exit(0)


@contextmanager
def publishing(root: Path, releases: Path, number: int) -> Iterator[int]:
    """Publish `<releases>/<number>`."""
    from pipelines.publish import publish

    yield publish(Workspace(root), releases / str(number)).version


@contextmanager
def materializing(root: Path, views: list[str], number: int) -> Iterator[str]:
    """`feast materialize` of one view."""
    FeastRepository(root).materialize([views[number]])
    yield "done"


@contextmanager
def declaring(root: Path, prefix: str, number: int) -> Iterator[str]:
    """Change Feast's registry, and commit once everybody has changed what he read before."""
    from datetime import timedelta

    store = FeastRepository(root).store()
    view = store.get_feature_view("user_context").with_name(f"{prefix}_{number}")
    view.projection.name_alias, view.projection.name, view.name = None, view.name, f"{prefix}_{number}"
    view.ttl = timedelta(days=1)
    store.registry.apply_feature_view(view, store.project, commit=False)
    yield "changed"
    store.registry.commit()


@contextmanager
def applying(root: Path, definition: str, number: int) -> Iterator[str]:
    """`feast apply` of one more view, whose file is made from `definition`."""
    repository = FeastRepository(root)
    (repository.path / f"more_{number}.py").write_text(definition.format(number=number))
    repository.apply()
    yield "done"


@contextmanager
def holding(root: Path, version: int) -> Iterator[str]:
    """Load a version as a CPU host does, and read all of it."""
    workspace = Workspace(root)
    with workspace.versions.pinned(version, role="cpu-tier"):
        reader = VersionReader.open(workspace, version)
        require_served(workspace, version)
        yield "loaded"
        # everybody has tried: it is still whole
        require_served(workspace, version)
        assert reader.lookup("item.kge", np.array([1]))[0].shape[0] == 1


@contextmanager
def retiring(root: Path, version: int) -> Iterator[str]:
    from pipelines.retire import retire

    retire(Workspace(root), version)
    yield "retired"
