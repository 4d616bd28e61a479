"""Pins, held by real processes."""

import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.contracts.errors import VersionConflict, VersionInUse, VersionNotFound
from pipelines.contracts.locks import locked
from pipelines.contracts.pins import dead_pins
from pipelines.contracts.version import VersionStore
from tests.pipelines.contracts.test_version import publish

HOLD = """
import sys
from pathlib import Path
from pipelines.contracts.version import VersionStore
with VersionStore(Path(sys.argv[1])).pinned(int(sys.argv[2]), role="cpu-tier", address="127.0.0.1:50051"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def versions(tmp_path: Path) -> VersionStore:
    store = VersionStore(tmp_path / "versions")
    for number in (1, 2):
        publish(store, number)
    store.point_to(2)
    return store


@pytest.fixture
def holder(versions: VersionStore) -> Iterator[subprocess.Popen]:
    """A process that holds version 1 until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(versions.root), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_refusal_names_who_holds_it(versions: VersionStore, holder: subprocess.Popen) -> None:
    who = rf"cpu-tier at 127.0.0.1:50051 \(pid {holder.pid} on {socket.gethostname()}"
    with pytest.raises(VersionInUse, match=who):
        versions.retire(1)
    assert [(found.pid, found.version) for found in versions.holders(1)] == [(holder.pid, 1)]
    assert versions.holders(2) == [] and dead_pins(versions.root) == [] and versions.numbers() == [1, 2]


def test_it_ends_with_its_process_in_order_and_not(versions: VersionStore, holder: subprocess.Popen) -> None:
    with versions.pinned(1, role="ranker"):
        holder.kill()
        holder.wait()
        assert [found.role for found in versions.holders(1)] == ["ranker"]
        assert len(dead_pins(versions.root)) == 1
        with pytest.raises(VersionInUse, match="ranker"):
            versions.retire(1)
    with versions.pinned(2, role="ranker"):  # who comes next sweeps what the dead left
        assert dead_pins(versions.root) == []
    assert list((versions.root / "pins").iterdir()) == []
    assert versions.retire(1).manifest.version == 1


def test_several_hold_one_version(versions: VersionStore) -> None:
    with versions.pinned(1, role="a"), versions.pinned(1, role="b"), versions.pinned(2, role="c"):
        assert sorted(found.role for found in versions.holders(1)) == ["a", "b"]
        with pytest.raises(VersionInUse, match=r"pid .*; .*pid"):
            versions.retire(1)


def test_who_holds_version_10_does_not_hold_version_1(versions: VersionStore) -> None:
    publish(versions, 10)
    with versions.pinned(10, role="ranker"):
        assert (versions.holders(1), [found.role for found in versions.holders(10)]) == ([], ["ranker"])
        assert versions.retire(1).manifest.version == 1


def test_where_nothing_can_be_written_it_holds_all_the_same(
    versions: VersionStore, caplog: pytest.LogCaptureFixture
) -> None:
    (versions.root / "pins").write_text("in the way of the folder")
    with caplog.at_level(logging.WARNING), versions.pinned(1, role="cpu-tier"):
        assert "nothing says by whom" in caplog.text
        with pytest.raises(VersionInUse, match="has not said who it is"):
            versions.retire(1)
    versions.retire(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_workspace(versions: VersionStore) -> None:
    versions.root.chmod(0o500)
    with versions.pinned(1, role="cpu-tier"):
        versions.root.chmod(0o700)
        with pytest.raises(VersionInUse, match="has not said who it is"):
            versions.retire(1)


def test_what_is_not_published_cannot_be_held(versions: VersionStore) -> None:
    with pytest.raises(VersionNotFound, match=r"version 3: expected one of \[1, 2\]"), versions.pinned(3, role="a"):
        pass
    versions.retire(1)
    with pytest.raises(VersionNotFound, match="one that was retired"), versions.pinned(1, role="a"):
        pass


def test_while_somebody_retires_it_it_can_neither_be_held_nor_pointed_to(versions: VersionStore) -> None:
    with locked(versions.path(1) / "manifest.json") as retiring:
        assert retiring
        with pytest.raises(VersionConflict, match="retiring"), versions.pinned(1, role="a"):
            pass
        with pytest.raises(VersionConflict, match="retiring"):
            versions.point_to(1)
        with pytest.raises(VersionInUse):
            versions.retire(1)
    assert versions.current() == 2


def test_a_lock_on_a_file_that_was_deleted_while_waiting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, flock = threading.Event(), fcntl.flock

    def told_flock(descriptor: int, operation: int) -> None:
        opened.set()
        flock(descriptor, operation)

    def wait() -> bool:
        with locked(path, wait=True) as held:
            return held

    path = tmp_path / "f"
    path.touch()
    with ThreadPoolExecutor(1) as pool:
        with locked(path) as first:
            monkeypatch.setattr(fcntl, "flock", told_flock)
            waiting = pool.submit(wait)
            assert opened.wait(120) and not waiting.done()
            path.unlink()
            path.touch()  # another file of that name
        assert first and waiting.result(timeout=120) is False
    assert wait()
