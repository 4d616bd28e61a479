"""One damaged file of a materialized version, any file, at every door that reads it: refused by its name, or unread.

The files are those that lie there, so that a new kind of file is covered by being written. A door either refuses, or
answers with the published bytes because it does not read that file; `READERS` says which doors must refuse.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.ranking.scorer import Scorer
from pipelines.audit import audit
from pipelines.contracts.errors import FacetError
from pipelines.contracts.manifest import Manifest
from pipelines.publish import publish
from tests.releases import (
    AS_OF,
    DIMS,
    FeastRepository,
    entity_ids,
    published_rows,
    write_context_views,
    write_release,
    write_table,
)

VERSION = 2  # which is damaged; version 1 serves on


def flipped(content: bytes, position: int, bits: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


def randomly_flipped(content: bytes) -> bytes:
    chance = random.Random(content)
    return flipped(content, chance.randrange(len(content)), 1 << chance.randrange(8))


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "first byte flipped": lambda content: flipped(content, 0, 0xFF),
    "a bit flipped": randomly_flipped,
    "last byte flipped": lambda content: flipped(content, len(content) - 1, 0x01),
    "a byte missing": lambda content: content[:-1],
    "empty": lambda content: b"",
    "a byte too many": lambda content: content + b"\n",
    "gone": lambda content: None,
}

READERS = {
    "manifest": {"publish", "apply", "materialize", "reader", "cpu tier", "ranker", "audit"},
    "table": {"first materialize", "audit"},
    "upper model": {"ranker", "audit"},
    "segment": {"materialize", "reader", "cpu tier", "feast", "audit"},
    "pointer": {"publish", "current"},
}


def kind_of(name: str) -> str:
    """What a file is, by its place."""
    top, *rest = Path(name).parts
    if rest == ["CURRENT"]:
        return "pointer"
    if top == "segments":
        return "segment"
    return {"tables": "table", "upper": "upper model"}.get(rest[1], "manifest")


@contextmanager
def damaged(path: Path, damage: Callable[[bytes], bytes | None]) -> Iterator[None]:
    content = path.read_bytes()
    broken = damage(content)
    assert broken != content
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    try:
        yield
    finally:
        path.write_bytes(content)


class Doors:
    """Every way into a version. Each returns the rows it answers with, by table, or nothing where it answers none."""

    def __init__(self, repository: FeastRepository, release: Path) -> None:
        self.repository, self.workspace, self.release = repository, repository.workspace, release
        self.ids = {entity: entity_ids(entity, 200) for entity in ("user", "item")}
        self.truth = {table: published_rows(self.workspace, VERSION, table)[1] for table in DIMS}
        self.hosted = HostedVersions(lambda version: VersionReader.open(self.workspace, version), unload_wait_s=1.0)
        self.hosted.load(1)

    def publish(self, table: str) -> None:
        """What publishing a child of the version reads of it."""
        with pytest.raises(FacetError) as caught:
            publish(self.workspace, self.release, parents=(VERSION,))
        if "the files of version 1" not in str(caught.value):  # the refusal of a whole workspace: it is published
            raise caught.value

    def current(self, table: str) -> None:
        assert self.workspace.versions.current() == VERSION

    def apply(self, table: str) -> None:
        self.repository.apply()

    def materialize(self, table: str) -> None:
        self.repository.materialize([f"{table.replace('.', '_')}__v{VERSION}"])

    def first_materialize(self, table: str) -> None:
        """With the segment out of the way."""
        segment = self.workspace.segment(VERSION, table)
        aside = segment.rename(self.workspace.root / "aside")
        try:
            self.materialize(table)
            assert contents(segment) == contents(aside)
        finally:
            if segment.exists():
                shutil.rmtree(segment)
            aside.rename(segment)

    def reader(self, table: str) -> np.ndarray:
        rows, found = VersionReader.open(self.workspace, VERSION).lookup(table, self._ids(table))
        assert found.all()
        return rows

    def cpu_tier(self, table: str) -> np.ndarray:
        """Loads the version into a host that serves version 1, which must go on if this is refused."""
        try:
            self.hosted.load(VERSION)
        except FacetError:
            with self.hosted.answering_from([1, VERSION]) as answering:
                assert answering.reader.version == 1
            raise
        with self.hosted.answering_from([VERSION]) as answering:
            rows, found = answering.reader.lookup(table, self._ids(table))
        self.hosted.drain(VERSION)
        self.hosted.unload(VERSION)
        assert found.all()
        return rows

    def feast(self, table: str) -> np.ndarray:
        """`get_online_features` of a new process."""
        answer = self.repository.store().get_online_features(
            features=[f"{table.replace('.', '_')}__v{VERSION}:row"],
            entity_rows={table.partition(".")[0]: self._ids(table).tolist()},
        )
        rows = answer.to_dict()["row"]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)

    def ranker(self, table: str) -> None:
        Scorer.load(self.workspace, VERSION, device="cpu")

    def audit(self, table: str) -> None:
        report = audit(self.workspace, VERSION, sample=20)
        assert report["rows_different"] == 0 and not report["problems"]

    def _ids(self, table: str) -> np.ndarray:
        return self.ids[table.partition(".")[0]]

    def refusal(self, door: str, table: str) -> str | None:
        """What the door says when it refuses, or None if it does not; rows other than the published ones fail."""
        try:
            rows = getattr(self, door.replace(" ", "_"))(table)
        except FacetError as error:
            return str(error)
        assert rows is None or np.array_equal(rows, self.truth[table]), f"{door} answered with other rows"
        return None


def contents(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


DOORS = sorted({door for doors in READERS.values() for door in doors})


@pytest.fixture(scope="module")
def plain(workspace_with_versions: FeastRepository, tmp_path_factory: pytest.TempPathFactory) -> Doors:
    """A version with rows of its own."""
    root = tmp_path_factory.mktemp("damaged") / "own"
    shutil.copytree(workspace_with_versions.root, root)
    repository = FeastRepository(root)
    repository.apply()
    return Doors(repository, workspace_with_versions.root / "release1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Doors:
    """A version that shares most rows, and the files with them, with its parent."""
    root = tmp_path_factory.mktemp("shared")
    repository, releases = FeastRepository.create(root), [root / "first", root / "second"]
    publish(repository.workspace, write_release(releases[0], seed=1))
    write_release(releases[1], seed=1)
    for table in ("user.kge", "item.kge"):
        ids, rows = published_rows(repository.workspace, 1, table)
        write_table(releases[1] / Manifest.table_path(table), ids, np.vstack([rows[:1] ^ 0x11, rows[1:]]), AS_OF)
    publish(repository.workspace, releases[1], parents=(1,))
    write_context_views(repository.workspace, entity_ids("user", 200), entity_ids("item", 200))
    repository.apply()
    for version in (1, VERSION):
        repository.materialize([f"{table.replace('.', '_')}__v{version}" for table in DIMS])
    doors = Doors(repository, releases[0])
    assert any("base" in name for name in files_of(doors)), "nothing is shared"
    return doors


def files_of(doors: Doors) -> list[str]:
    """Every file of the version and the pointer to it, by its path in the workspace."""
    root = doors.workspace.root
    below = [*(root / "versions" / str(VERSION)).rglob("*"), *(root / "segments" / str(VERSION)).rglob("*")]
    return sorted(str(p.relative_to(root)) for p in [*below, root / "versions" / "CURRENT"] if p.is_file())


def table_of(name: str) -> str:
    """The table a file belongs to; of a file of the whole version, any."""
    return next((table for table in DIMS if table in name), "item.kge")


@pytest.mark.parametrize("door", DOORS)
def test_an_undamaged_version_passes_every_door(plain: Doors, door: str) -> None:
    for table in DIMS:
        assert plain.refusal(door, table) is None


def test_every_kind_of_file_is_there(plain: Doors) -> None:
    files = files_of(plain)
    assert {kind_of(name) for name in files} == set(READERS)
    manifest = plain.workspace.versions.manifest(VERSION)
    assert {f"versions/{VERSION}/{name}" for name in manifest.files} < set(files)
    assert len(files) == len(set(files)) > 20


@contextmanager
def replaced_by(directory: Path, other: Path) -> Iterator[None]:
    """A copy of another directory in the place of one: every file of it whole and sealed."""
    aside = directory.with_name(f"aside-{directory.name}")
    directory.rename(aside)
    shutil.copytree(other, directory)
    try:
        yield
    finally:
        shutil.rmtree(directory)
        aside.rename(directory)


@pytest.mark.parametrize("door", sorted(READERS["manifest"]))
def test_another_version_in_a_versions_place_is_refused(plain: Doors, door: str) -> None:
    versions = plain.workspace.versions
    with replaced_by(versions.path(VERSION), versions.path(1)):
        said = plain.refusal(door, "item.kge")
    assert said is not None and f"{VERSION}/manifest.json is not in its place" in said
    assert plain.refusal(door, "item.kge") is None


@pytest.mark.parametrize("door", sorted(READERS["segment"]))
@pytest.mark.parametrize("theirs", [(1, "item.kge"), (VERSION, "user.kge")], ids=["of version 1", "of another table"])
def test_another_segment_in_a_segments_place_is_refused(plain: Doors, door: str, theirs: tuple[int, str]) -> None:
    segment = plain.workspace.segment(VERSION, "item.kge")
    with replaced_by(segment, plain.workspace.segment(*theirs)):
        said = plain.refusal(door, "item.kge")
    assert said is not None and f"segments/{VERSION}/item.kge is not in its place" in said
    assert plain.refusal(door, "item.kge") is None


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_file_damaged(plain: Doors, damage: str) -> None:
    sweep(plain, damage)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit flipped", "gone"])
def test_any_file_damaged_of_a_version_that_shares_rows(shared: Doors, damage: str) -> None:
    sweep(shared, damage)


def sweep(doors: Doors, damage: str) -> None:
    """Damage every file in turn, and try the doors that read it, and those that serve."""
    wrong = []
    for name in files_of(doors):
        path, table, readers = doors.workspace.root / name, table_of(name), READERS[kind_of(name)]
        with damaged(path, DAMAGES[damage]):
            if damage == "gone" and kind_of(name) == "pointer":  # as before the first publish: no version by default
                assert doors.workspace.versions.current() is None
                continue
            if kind_of(name) == "segment" and table != next(iter(DIMS)):
                readers = readers - {"audit"}  # which compares whole tables until it comes to this one
            for door in sorted(readers | {"reader", "cpu tier", "feast"}):
                said = doors.refusal(door, table)
                if said is None and door in readers:
                    wrong.append(f"{name}: {door} did not refuse")
                if said is not None and not names(said, path, gone=damage == "gone"):
                    wrong.append(f"{name}: {door} does not name it: {said}")
    assert not wrong, "\n".join(wrong)
    for door in DOORS:
        assert doors.refusal(door, "item.kge") is None, f"{door} after everything was put back"


def names(said: str, path: Path, *, gone: bool) -> bool:
    """Whether a refusal names a file; of a version or segment that is gone, its number or directory is the name."""
    return path.name in said or (gone and (f"version {VERSION}" in said or str(path.parent) in said))
