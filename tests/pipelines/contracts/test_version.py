import fcntl
import hashlib
import os
import queue
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.contracts import version
from pipelines.contracts.errors import IntegrityError, VersionConflict, VersionInUse, VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.version import VersionStore
from pipelines.contracts.windows import Windows
from tests.lineages import invented_ranker

MOMENT = datetime(2011, 7, 1, tzinfo=UTC)
WINDOWS = Windows.from_dict(
    {
        "pretrain": ["2011-01-01", "2011-02-01"],
        "finetune": ["2011-02-01", "2011-03-01"],
        "validation": ["2011-03-01", "2011-04-01"],
        "test": ["2011-04-01", "2011-05-01"],
    }
)
MANIFEST = Manifest(
    version=1, dataset="shop", created_at=MOMENT, as_of=MOMENT, windows=WINDOWS, parents=(), tables=(),
    lineage=invented_ranker(dataset="shop", windows=WINDOWS, tasks=["buy"]),
)


@pytest.fixture
def versions(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "versions")


def publish(versions: VersionStore, number: int) -> None:
    with versions.creating(number) as staging:
        replace(MANIFEST, version=number).write(staging)


def test_an_empty_store(versions: VersionStore) -> None:
    assert (versions.numbers(), versions.current(), versions.next_number(), versions.manifests()) == ([], None, 1, [])


def test_versions_and_the_pointer_are_separate(versions: VersionStore) -> None:
    for number in (2, 10):
        publish(versions, number)
    assert (versions.numbers(), versions.current(), versions.next_number()) == ([2, 10], None, 11)
    versions.point_to(10)
    versions.point_to(2)
    assert versions.current() == 2 and versions.manifest(10).version == 10


def test_a_version_that_is_not_there(versions: VersionStore) -> None:
    publish(versions, 2)
    with pytest.raises(VersionNotFound, match=r"version 3: expected one of \[2\]"):
        versions.manifest(3)
    with pytest.raises(VersionNotFound):
        versions.point_to(3)
    assert versions.current() is None


def test_a_version_that_was_copied_to_another_number_is_refused(versions: VersionStore) -> None:
    publish(versions, 1)
    shutil.copytree(versions.path(1), versions.path(5))
    for read in (lambda: versions.manifest(5), versions.manifests, lambda: versions.point_to(5)):
        with pytest.raises(IntegrityError, match=r"5/manifest\.json is not in its place.*got that of version 1"):
            read()
    assert versions.manifest(1).version == 1 and versions.current() is None
    retirement = versions.retire(5)
    assert retirement.manifest is None and [manifest.version for manifest in versions.manifests()] == [1]


def test_a_record_that_was_copied_to_another_number_is_refused(versions: VersionStore) -> None:
    publish(versions, 1)
    versions.retire(1)
    shutil.copytree(versions.path(1), versions.path(5))
    assert versions.retirement(1).manifest.version == 1 and versions.retired() == [1, 5]
    with pytest.raises(IntegrityError, match=r"5/retired\.json cannot be read"):
        versions.retirement(5)


@pytest.mark.parametrize("name", ["²", "٧", "07", "0", "-1", "7 ", "9" * 30, "x"])
def test_a_directory_of_another_name_is_no_version(versions: VersionStore, name: str) -> None:
    publish(versions, 2)
    (versions.root / name).mkdir()
    (versions.root / name / "manifest.json").write_text("{}")
    assert (versions.numbers(), versions.next_number(), versions.retired()) == ([2], 3, [])
    assert [manifest.version for manifest in versions.manifests()] == [2]


def test_no_path_is_made_of_text(versions: VersionStore) -> None:
    with pytest.raises(ValueError):
        versions.path("..")


def test_a_number_is_taken_once(versions: VersionStore) -> None:
    publish(versions, 2)
    with pytest.raises(VersionConflict, match="version 2"):
        publish(versions, 2)


def test_an_error_while_filling_leaves_nothing(versions: VersionStore) -> None:
    with pytest.raises(KeyError), versions.creating(2) as staging:
        (staging / "half").touch()
        raise KeyError
    assert list(versions.root.iterdir()) == []


def test_a_pointer_that_was_altered_is_refused_until_it_is_moved(versions: VersionStore) -> None:
    for number in (2, 3):
        publish(versions, number)
    versions.point_to(2)
    path = versions.root / "CURRENT"
    good, sha = path.read_text(), versions.manifest(2).sha256
    other_numbers = [good.replace(": 2", f": {number}") for number in (3, 6, '"2"', "null")]
    for text in ["{}", "", "\x80", good + "\n", good.replace(sha, "0" * 64), *other_numbers]:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(IntegrityError, match=r"CURRENT is corrupted.*facet versions point"):
            versions.current()
        with pytest.raises(IntegrityError, match="CURRENT"):
            versions.next_number()
    versions.point_to(3)
    assert versions.current() == 3


def test_a_pointer_that_is_moved_while_it_is_read(versions: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        publish(versions, number)
    versions.point_to(1)

    def overtaken(version: int, original=versions.manifest) -> Manifest:
        if version == 1 and 1 in versions.numbers():
            versions.point_to(2)
            versions.retire(1)
        return original(version)

    monkeypatch.setattr(versions, "manifest", overtaken)
    assert versions.current() == 2


def test_a_manifest_that_is_lost_is_no_retirement(versions: VersionStore) -> None:
    for number in (1, 2):
        publish(versions, number)
    (versions.path(1) / "manifest.json").unlink()
    for read in (lambda: versions.manifest(1), versions.manifests):
        with pytest.raises(IntegrityError, match=r"1/manifest\.json is missing.*Restore the file"):
            read()
    assert versions.manifest(2).version == 2 and versions.next_number() == 3


def test_the_pointer_goes_back_only_when_told(versions: VersionStore) -> None:
    for number in (1, 2):
        publish(versions, number)
    versions.point_to(2)
    versions.point_to(1, only_forward=True)
    assert versions.current() == 2
    versions.point_to(1)
    versions.point_to(2, only_forward=True)
    assert versions.current() == 2


def test_of_two_who_move_the_pointer_the_second_waits(
    versions: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first, which has looked where the pointer is, would move it back."""
    for number in (1, 2):
        publish(versions, number)
    told, flock, write = queue.SimpleQueue(), fcntl.flock, version.replacing_file

    def told_flock(descriptor: int, operation: int) -> None:
        if os.path.samestat(os.fstat(descriptor), versions.root.stat()):
            told.put("asks for the lock")
        flock(descriptor, operation)

    @contextmanager
    def write_after_the_second_came(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(version, "replacing_file", write)
        monkeypatch.setattr(fcntl, "flock", told_flock)
        second = pool.submit(versions.point_to, 2, only_forward=True)
        second.add_done_callback(lambda _: told.put("is done"))
        assert told.get(timeout=120) == "asks for the lock"
        with write(path) as staging:
            yield staging

    monkeypatch.setattr(version, "replacing_file", write_after_the_second_came)
    with ThreadPoolExecutor(1) as pool:
        versions.point_to(1, only_forward=True)
    assert versions.current() == 2


def test_retiring_unpublishes_and_keeps_the_record_and_the_number(versions: VersionStore) -> None:
    for number in (1, 2):
        publish(versions, number)
    versions.point_to(2)
    manifest = versions.manifest(1)
    retirement = versions.retire(1)
    assert (versions.numbers(), versions.retired(), versions.next_number()) == ([2], [1], 3)
    assert versions.retirement(1) == replace(retirement, at=retirement.at.replace(microsecond=0))
    assert (retirement.manifest, retirement.manifest_sha256) == (manifest, manifest.sha256)
    assert "@" in retirement.by and [m.version for m in versions.manifests()] == [2]
    with pytest.raises(VersionNotFound, match="got one that was retired"):
        versions.manifest(1)
    with pytest.raises(VersionNotFound, match="got one that was retired"):
        versions.retire(1)
    with pytest.raises(VersionConflict):
        publish(versions, 1)
    with pytest.raises(VersionNotFound):
        versions.retirement(2)


def test_the_current_version_is_not_retired(versions: VersionStore) -> None:
    publish(versions, 1)
    versions.point_to(1)
    with pytest.raises(VersionInUse, match=r"the current one.*facet versions point N"):
        versions.retire(1)
    assert versions.numbers() == [1] and not (versions.path(1) / "retired.json").exists()


def test_a_version_that_becomes_current_while_it_is_being_retired_stays(
    versions: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        publish(versions, number)
    versions.point_to(2)

    @contextmanager
    def unpinned_a_moment_later(directory: Path, original=version.unpinned) -> Iterator[bool]:
        versions.point_to(1)
        with original(directory) as free:
            yield free

    monkeypatch.setattr(version, "unpinned", unpinned_a_moment_later)
    with pytest.raises(VersionInUse, match="got the current one"):
        versions.retire(1)
    assert (versions.current(), versions.numbers(), versions.retired()) == (1, [1, 2], [])
    assert not (versions.path(1) / "retired.json").exists()


def test_a_version_is_unpublished_after_its_record_is_on_the_disk(
    versions: VersionStore, disk: list[tuple[str, str]]
) -> None:
    """A power loss finds the manifest, or the record that explains why there is none."""
    publish(versions, 1)
    disk.clear()
    versions.retire(1)
    assert disk == [
        ("flush", "versions/1/*/retired.json"),
        ("rename to", "versions/1/retired.json"),
        ("flush", "versions/1"),
        ("delete", "versions/1/*"),
        ("delete", "versions/1/manifest.json"),
        ("flush", "versions/1"),
    ]


def test_a_corrupted_version_can_be_retired(versions: VersionStore) -> None:
    publish(versions, 1)
    (versions.path(1) / "manifest.json").write_text("{}")
    retirement = versions.retire(1)
    assert retirement.manifest is None and versions.retirement(1).manifest_sha256 == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("damage", ["", "{}", "[]", '"as_of": "2012', '"parents": [7'])
def test_a_record_that_was_altered(versions: VersionStore, damage: str) -> None:
    publish(versions, 1)
    versions.retire(1)
    path = versions.path(1) / "retired.json"
    text = path.read_text()
    altered = text.replace('"as_of": "2011', damage) if "as_of" in damage else text.replace('"parents": [', damage)
    path.write_text(altered if ":" in damage else damage)
    assert path.read_text() != text
    with pytest.raises(IntegrityError, match=r"retired\.json cannot be read"):
        versions.retirement(1)
    assert versions.retired() == [1]


def test_a_version_that_is_retired_while_they_are_listed(
    versions: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(versions, 1)
    monkeypatch.setattr(versions, "_taken", lambda: [1, 2])
    assert [manifest.version for manifest in versions.manifests()] == [1]
