"""More than a hundred kills at random instants of long publishes and materializations, while a CPU tier serves on.

`make test-crash` runs this, in about twelve minutes; the default suite does not. Every kill is a SIGKILL into work that
has begun: the children import everything first. What each hit, and what it left, is printed.

```
FACET_CRASH_SEED       draws the instants; printed, random by default
FACET_CRASH_INSTANTS   that hit the work itself, of each series; 50 by default
FACET_CRASH_ROWS       of each of the four tables; 2,000,000 by default
```
"""

import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from online.lookup.client import LookupClient
from online.rpc_error import RpcError
from pipelines.audit import audit
from pipelines.contracts.durable import remove_directory
from pipelines.contracts.segment import Segment
from pipelines.garbage import collect, find
from pipelines.publish import publish
from pipelines.retire import retire
from tests.crash import (
    Outcome,
    leftovers,
    materialize_repository,
    publish_release,
    require_served,
    require_whole,
    run_child,
)
from tests.releases import DIMS, WIDE_RANGE, FeastRepository, entity_ids, published_rows, write_release
from tests.waiting import PATIENCE_S, joined, until

pytestmark = pytest.mark.crash

SEED = int(os.environ.get("FACET_CRASH_SEED") or secrets.randbelow(1_000_000))
INSTANTS = int(os.environ.get("FACET_CRASH_INSTANTS") or 50)
ROWS = int(os.environ.get("FACET_CRASH_ROWS") or 2_000_000)
OLD_ROWS = 20_000
SLOWER = 1.3  # the work takes longer with checks going on beside it
COMMANDS = 6  # kills of the stock commands, each of which takes seconds to start
AUDITED = 500
MOMENTS = ("before the first step", "inside", "at the last step or after")
CLI = [sys.executable, "-c", "from pipelines.cli import main; main()"]


class LiveTier:
    """`facet serve cpu-tier` of version 1 and a thread that asks it without a pause, comparing every byte."""

    def __init__(self, repository: FeastRepository, log: Path) -> None:
        command = [*CLI, "--workspace", str(repository.workspace.root), "serve", "cpu-tier", "--versions", "1"]
        self._log = log.open("w")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        ready = self._process.stdout.readline()
        assert ready, f"the CPU tier did not start: {log.read_text()}"
        self._client = LookupClient([f"127.0.0.1:{json.loads(ready)['ports']['lookup']}"], timeout_s=PATIENCE_S)
        self._truth = {table: published_rows(repository.workspace, 1, table) for table in DIMS}
        self.answered, self.wrong, self._stop = 0, [], threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        rng = np.random.default_rng(SEED)
        while not self._stop.wait(0.005):
            chosen = {table: rng.integers(0, len(ids), 256) for table, (ids, _) in self._truth.items()}
            try:
                answer = self._client.lookup([1], {t: self._truth[t][0][pick] for t, pick in chosen.items()})
            except (RpcError, grpc.RpcError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                continue
            self.answered += 1
            if not all(np.array_equal(answer.rows[t], self._truth[t][1][pick]) for t, pick in chosen.items()):
                self.wrong.append("other bytes than were published")

    def stop(self) -> None:
        self._stop.set()
        joined(self._thread)
        self._client.close()
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._log.close()


class Stage:
    """Version 1 small, materialized and served live; a large release beside it."""

    def __init__(self, root: Path) -> None:
        self.repository = FeastRepository.create(root)
        self.workspace = self.repository.workspace
        self.release = self.workspace.run("large").ranker("both", 0) / "int4"
        publish(self.workspace, write_release(root / "old", seed=1, rows=OLD_ROWS))
        write_release(self.release, seed=2, rows=ROWS)
        self.repository.apply()
        self.repository.materialize(self.views(1))
        self.first_row = published_rows(self.workspace, 1, "item.kge")[1][0].tobytes()
        self.tier = LiveTier(self.repository, root / "cpu-tier.log")

    @staticmethod
    def views(version: int) -> list[str]:
        return [f"{table.replace('.', '_')}__v{version}" for table in DIMS]

    def require_old_version(self) -> None:
        """Version 1 as a new reader, as a new Feast store and as the live CPU tier answer it."""
        require_served(self.workspace, 1)
        ids = entity_ids("item", OLD_ROWS)[:1].tolist()
        answer = self.repository.store().get_online_features(
            features=["item_kge__v1:row"], entity_rows={"item": ids}
        )
        assert answer.to_dict()["row"] == [self.first_row]
        assert not self.tier.wrong, self.tier.wrong[:3]

    def require_audited(self, version: int) -> None:
        report = audit(self.workspace, version, sample=AUDITED)
        assert report["rows_checked"] == AUDITED * len(DIMS), report["rows_checked"]
        assert report["rows_different"] == 0 and not report["problems"], report["problems"]

    def require_no_garbage(self) -> None:
        collect(self.workspace)
        assert not find(self.workspace) and not leftovers(self.workspace.root)

    def newest(self) -> int:
        return self.workspace.versions.numbers()[-1]

    def drop(self, version: int) -> None:
        """Back to version 1 alone."""
        self.workspace.versions.point_to(1)
        retire(self.workspace, version)
        self.require_no_garbage()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    say(f"seed {SEED} (FACET_CRASH_SEED={SEED} draws the same instants), tables of 4 x {ROWS:,} rows")
    stage = Stage(tmp_path_factory.mktemp("series"))
    yield stage
    stage.tier.stop()
    answered, wrong = stage.tier.answered, stage.tier.wrong
    say(f"RESULT live CPU tier: {answered:,} lookups of 4 x 256 rows answered, {len(wrong)} wrong or failed")
    assert answered > 100 and not wrong, wrong[:3]


def say(line: str) -> None:
    print(f"\ncrash series: {line}", end="", flush=True)


class Tally:
    """How many kills hit what; all of it is printed, so that nobody has to believe that they hit the work."""

    def __init__(self, name: str, run: Callable[[float | None], Outcome], reset: Callable[[], None]) -> None:
        runs = []
        for _ in range(3):
            runs.append(run(None))
            assert not runs[-1].killed and not runs[-1].error, runs[-1]
            reset()
        self.name, self.run = name, run
        self.steps = min(outcome.steps for outcome in runs)
        self.seconds = statistics.median(outcome.seconds for outcome in runs)
        self.hit, self.where, self.visible = Counter(), Counter(), 0
        say(f"{name}: {self.seconds:.2f} s undisturbed, {self.steps} steps on the disk")

    def kills(self) -> Iterator[tuple[int, Outcome]]:
        """Kills at random instants of about the undisturbed time, until `INSTANTS` hit between first and last step."""
        chance = random.Random(f"{SEED} {self.name}")
        while self.hit["inside"] < INSTANTS:
            assert self.hit.total() < 3 * INSTANTS, f"most kills miss the work: {self.hit}"
            instant = chance.uniform(0, self.seconds * SLOWER)
            outcome = self.run(instant)
            assert not outcome.error, outcome
            finished = not outcome.killed or outcome.steps >= self.steps
            self.hit[MOMENTS[2 if finished else 1 if outcome.steps else 0]] += 1
            last = re.sub(r"\.staging-[0-9a-f]+-", "…", outcome.last)
            self.where["the end" if finished else re.sub(r"\d+(-[0-9a-f]{8})?", "N", last)] += 1
            yield self.hit.total(), outcome
            say(
                f"{self.name} {self.hit.total()}: killed at {instant:.3f} s, at step {outcome.steps} of {self.steps}, "
                f"{last}; recovered"
            )

    def report(self) -> None:
        kills, counts = self.hit.total(), ", ".join(f"{self.hit[what]} {what}" for what in MOMENTS)
        say(f"RESULT {self.name}: {kills} kills, {self.steps} steps on the disk in {self.seconds:.2f} s: {counts}")
        say(f"RESULT {self.name}: the new version was whole after {self.visible}, absent or partly after the others")
        say(f"RESULT {self.name}: after all {kills} the old one was served, the retry succeeded, nothing was left over")
        for place, count in self.where.most_common(10):
            say(f"  {count:4d} at {place}")


def test_publishing_killed_at_random_instants(stage: Stage) -> None:
    workspace = stage.workspace

    def run(kill_after_s: float | None) -> Outcome:
        return run_child(
            publish_release, workspace.root, stage.release, root=workspace.root, kill_after_s=kill_after_s
        )

    tally = Tally("publish", run, lambda: stage.drop(stage.newest()))
    for i, outcome in tally.kills():
        stage.require_old_version()
        numbers, current = require_whole(workspace), workspace.versions.current()
        assert len(numbers) in (1, 2) and (current == 1 or current == numbers[-1]), outcome
        tally.visible += len(numbers) == 2
        if i % 2:
            stage.require_no_garbage()
        retried = run(None)
        assert not retried.killed and bool(retried.error) == (current != 1), retried
        assert not retried.error or "not published yet" in retried.error, retried
        version = stage.newest()
        assert workspace.versions.current() == version and not leftovers(workspace.versions.root)
        require_whole(workspace)
        if i % 5 == 0:  # the rows themselves; that they are the manifest's was just hashed
            stage.repository.apply()
            stage.repository.materialize(stage.views(version))
            stage.require_audited(version)
        stage.drop(version)
    tally.report()


@pytest.fixture
def large_version(stage: Stage) -> Iterator[int]:
    """Published and applied, not materialized."""
    version = publish(stage.workspace, stage.release).version
    stage.repository.apply()
    yield version
    stage.drop(version)
    stage.repository.apply()


def test_materializing_killed_at_random_instants(stage: Stage, large_version: int) -> None:
    workspace, segments = stage.workspace, stage.workspace.segments / str(large_version)

    def run(kill_after_s: float | None) -> Outcome:
        return run_child(
            materialize_repository, stage.repository.root, stage.views(large_version), root=workspace.root,
            kill_after_s=kill_after_s,
        )

    tally = Tally("materialize", run, lambda: remove_directory(segments, within=segments.parent))
    for i, outcome in tally.kills():
        stage.require_old_version()
        whole = [Segment.open(segments / table).spec.rows for table in DIMS if (segments / table).exists()]
        assert all(abs(rows - ROWS) < 100 for rows in whole), outcome
        tally.visible += len(whole) == len(DIMS)
        if i % 2:
            stage.require_no_garbage()
        retried = run(None)
        assert not retried.killed and not retried.error, retried
        assert not leftovers(segments) and len(list(segments.iterdir())) == len(DIMS)
        stage.require_audited(large_version)
        stage.require_no_garbage()
        remove_directory(segments, within=segments.parent)
    tally.report()


def killed_command(command: list[str], where: Path, staged_in: Path, chance: random.Random, within_s: float) -> float:
    """Start a command, wait until it stages something new, kill it within `within_s` from then; returns when."""
    before = set(staged_in.glob(".staging-*"))
    process = subprocess.Popen(command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stages() -> bool:
        assert process.poll() is None, f"{command} ended by itself: {process.returncode}"
        return bool(set(staged_in.glob(".staging-*")) - before)

    until(stages, seconds=300)
    instant = chance.uniform(0, within_s)
    time.sleep(instant)
    process.kill()
    process.wait()
    return instant


def test_the_commands_killed(stage: Stage) -> None:
    """`facet publish` and `feast materialize` themselves, killed once they write."""
    workspace, chance = stage.workspace, random.Random(f"{SEED} commands")
    publishing = [*CLI, "--workspace", str(workspace.root), "publish", "--run", "large"]
    feast = str(Path(sys.executable).with_name("feast"))
    always = [moment.strftime("%Y-%m-%dT%H:%M:%S") for moment in WIDE_RANGE]
    states = Counter()
    for i in range(COMMANDS):
        instant = killed_command(publishing, stage.repository.root, workspace.versions.root, chance, 1.0)
        stage.require_old_version()
        states[f"{len(require_whole(workspace)) - 1} of 1 version published"] += 1
        if workspace.versions.current() == 1:
            publish(workspace, stage.release)
        version = stage.newest()
        assert workspace.versions.current() == version and not leftovers(workspace.versions.root)
        say(f"facet publish {i + 1}/{COMMANDS}: killed {instant:.3f} s after it began to write; recovered")

        stage.repository.apply()
        views = [option for view in stage.views(version) for option in ("--views", view)]
        segments = workspace.segments / str(version)
        segments.mkdir(parents=True)
        materializing = [feast, "materialize", *views, *always]
        instant = killed_command(materializing, stage.repository.path, segments, chance, 1.0)
        stage.require_old_version()
        whole = [Segment.open(segments / table) for table in DIMS if (segments / table).exists()]
        states[f"{len(whole)} of {len(DIMS)} tables materialized"] += 1
        stage.repository.materialize(stage.views(version))
        assert not leftovers(segments)
        stage.require_audited(version)
        say(f"feast materialize {i + 1}/{COMMANDS}: killed {instant:.3f} s after it began to write; recovered, audited")
        stage.drop(version)
        stage.repository.apply()
    say(f"RESULT commands: {COMMANDS} kills of `facet publish`, {COMMANDS} of `feast materialize`, all recovered")
    for state, count in sorted(states.items()):
        say(f"  {count:4d} left {state}")
