from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.contracts.errors import IntegrityError, VersionConflict, VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.version import VersionStore
from pipelines.contracts.windows import Windows

MOMENT = datetime(2011, 7, 1, tzinfo=UTC)
WINDOWS = Windows.from_dict(
    {
        "pretrain": ["2011-01-01", "2011-02-01"],
        "finetune": ["2011-02-01", "2011-03-01"],
        "validation": ["2011-03-01", "2011-04-01"],
        "test": ["2011-04-01", "2011-05-01"],
    }
)
MANIFEST = Manifest(version=1, dataset="shop", created_at=MOMENT, as_of=MOMENT, windows=WINDOWS, parents=(), tables=())


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


def test_a_number_is_taken_once(versions: VersionStore) -> None:
    publish(versions, 2)
    with pytest.raises(VersionConflict, match="version 2"):
        publish(versions, 2)


def test_an_error_while_filling_leaves_nothing(versions: VersionStore) -> None:
    with pytest.raises(KeyError), versions.creating(2) as staging:
        (staging / "half").touch()
        raise KeyError
    assert list(versions.root.iterdir()) == []


def test_a_pointer_that_is_not_one(versions: VersionStore) -> None:
    publish(versions, 2)
    (versions.root / "CURRENT").write_text("{}")
    with pytest.raises(IntegrityError, match="CURRENT"):
        versions.current()
