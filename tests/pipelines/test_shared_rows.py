"""A version that has many rows of its parent: materialized, audited, outliving it; its parent lost or damaged."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from online.lookup.reader import VersionReader
from pipelines.audit import audit
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import row_store
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import DeltaSegment, open_segment
from pipelines.contracts.segment_header import DELTA_NAME
from pipelines.publish import publish
from pipelines.retire import retire
from tests.crash import every_step, leftovers, materialize_repository, require_served
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

CHANGED, SAME, OTHER, MOVED = "item.kge", "user.kge", "item.contrastive", "user.contrastive"
VIEWS = {number: [f"{table.replace('.', '_')}__v{number}" for table in DIMS] for number in (1, 2)}


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> FeastRepository:
    """Version 1 materialized; its child, version 2, only applied.

    Of version 2, `CHANGED` differs in 15 of 200 rows, `SAME` in none, `OTHER` in all; of `MOVED` a few rows changed,
    a few are gone and a few new.
    """
    root = tmp_path_factory.mktemp("shared")
    repository = FeastRepository.create(root)
    publish(repository.workspace, write_release(root / "first", seed=1))
    release = write_release(root / "second", seed=1)
    others = write_release(root / "other", seed=2)
    content = json.loads((release / "release.json").read_text())
    for spec in content["tables"]:
        path, name = release / Manifest.table_path(spec["name"]), spec["name"]
        ids, rows = published_rows(repository.workspace, 1, name)
        rows = rows.copy()
        if name == OTHER:
            shutil.copy(others / Manifest.table_path(name), path)
        elif name == CHANGED:
            rows[::14] ^= 0x11
            write_table(path, ids, rows, AS_OF)
        elif name == MOVED:
            rows[::40] ^= 0x11
            ids = np.concatenate([ids[5:], 2**62 + np.arange(1, 4)])
            write_table(path, ids, np.concatenate([rows[5:], rows[:3]]), AS_OF)
            spec["rows"] = len(ids)
    (release / "release.json").write_text(json.dumps(content))
    publish(repository.workspace, release, parents=(1,))
    write_context_views(repository.workspace, entity_ids("user", 200), entity_ids("item", 200))
    repository.apply()
    repository.materialize(VIEWS[1])
    return repository


@pytest.fixture
def repository(applied: FeastRepository, tmp_path: Path) -> FeastRepository:
    """A copy that a test may change."""
    copy = FeastRepository(Path(shutil.copytree(applied.root, tmp_path / "own")))
    copy.apply()
    return copy


def kinds(repository: FeastRepository) -> dict[str, str]:
    """How each table of version 2 is stored."""
    found = {}
    for table in DIMS:
        directory = repository.workspace.segment(2, table)
        linked = [path for path in directory.glob("*.npy") if path.stat().st_nlink > 1]
        found[table] = "delta" if (directory / DELTA_NAME).exists() else "copy" if linked else "full"
    return found


def test_each_table_shares_what_it_can(repository: FeastRepository, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        repository.materialize()
    assert kinds(repository) == {CHANGED: "delta", SAME: "copy", OTHER: "full", MOVED: "delta"}
    theirs, ours = (repository.workspace.segment(version, CHANGED) for version in (1, 2))
    assert f"{ours} shares 185 of 200 rows with {theirs}" in caplog.text
    assert "more than 20 of 200 rows are not those of the base" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    for version in (1, 2):
        require_served(repository.workspace, version)
        report = audit(repository.workspace, version)
        assert report["rows_checked"] > 700 and report["rows_different"] == 0 and not report["problems"]
    repository.materialize()  # again: all is there
    gone = published_rows(repository.workspace, 1, MOVED)[0][:5]
    assert not VersionReader.open(repository.workspace, 2).lookup(MOVED, gone)[1].any()


def test_of_several_parents_it_shares_with_the_one_of_the_same_rows(
    repository: FeastRepository, tmp_path: Path
) -> None:
    """`CHANGED` of version 3 is that of version 1 again; version 2, the newer parent, has other rows."""
    workspace, release = repository.workspace, write_release(tmp_path / "third", seed=1)
    shutil.copy(write_release(tmp_path / "fourth", seed=3) / Manifest.table_path(OTHER), release / "tables")
    repository.materialize(VIEWS[2])
    publish(workspace, release, parents=(1, 2))
    repository.apply()
    repository.materialize(["item_kge__v3"])
    first, third = (workspace.segment(version, CHANGED) / "rows.npy" for version in (1, 3))
    assert third.samefile(first)


def test_it_outlives_its_parent(repository: FeastRepository) -> None:
    repository.materialize()
    retire(repository.workspace, 1)
    assert not (repository.workspace.segments / "1").exists()
    require_served(repository.workspace, 2)
    assert not leftovers(repository.workspace.root)
    repository.apply()
    assert not audit(repository.workspace, 2)["problems"]


def test_a_parent_that_is_not_there_is_not_missed(repository: FeastRepository) -> None:
    retire(repository.workspace, 1)
    repository.apply()
    repository.materialize(VIEWS[2])
    assert set(kinds(repository).values()) == {"full"}
    require_served(repository.workspace, 2)


def test_a_byte_of_a_shared_file_is_missed_in_both_versions(repository: FeastRepository) -> None:
    repository.materialize()
    for table in (CHANGED, SAME):
        path = repository.workspace.segment(1, table) / "rows.npy"
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
        for version in (1, 2):
            with pytest.raises(IntegrityError, match=r"rows\.npy is corrupted"):
                row_store(None, repository.workspace).open(version, table)


def test_a_damaged_parent_is_told_of_and_not_shared(
    repository: FeastRepository, caplog: pytest.LogCaptureFixture
) -> None:
    for table in (CHANGED, SAME):
        path = repository.workspace.segment(1, table) / "rows.npy"
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    repository.materialize(VIEWS[2])
    assert kinds(repository) == {CHANGED: "full", SAME: "full", OTHER: "full", MOVED: "delta"}
    warnings = [record.getMessage() for record in caplog.records if "shares no rows" in record.getMessage()]
    assert len([text for text in warnings if "rows.npy is corrupted" in text]) == 2
    require_served(repository.workspace, 2)


def test_the_segment_of_another_version_of_that_number_is_not_shared(repository: FeastRepository) -> None:
    """Its rows may be those of its own manifest, whatever the hash of the published file says."""
    other, segment = (repository.workspace.segment(1, table) for table in (CHANGED, SAME))
    shutil.rmtree(segment)
    shutil.copytree(other, segment)
    repository.materialize([view for view in VIEWS[2] if "user_kge" in view])
    assert type(open_segment(repository.workspace.segment(2, SAME))) is Segment
    ids, rows = published_rows(repository.workspace, 2, SAME)
    assert np.array_equal(open_segment(repository.workspace.segment(2, SAME)).lookup(ids)[0], rows)


@pytest.mark.slow
def test_killed_before_every_step(repository: FeastRepository) -> None:
    workspace, views, moments = repository.workspace, ["item_kge__v2", "user_kge__v2"], []
    specs = {spec.name: spec for spec in workspace.versions.manifest(2).tables}
    for outcome in every_step(materialize_repository, repository.root, views, root=repository.root):
        require_served(workspace, 1)
        there = {path.name: open_segment(path).spec for path in (workspace.segments / "2").glob("[!.]*")}
        assert there == {name: specs[name] for name in there}, outcome
        moments.append(len({CHANGED, SAME} & there.keys()))
        repository.materialize(VIEWS[2])
        assert isinstance(open_segment(workspace.segment(2, CHANGED)), DeltaSegment), outcome
        assert kinds(repository)[SAME] == "copy"
        require_served(workspace, 2)
        assert not leftovers(workspace.segments / "2"), outcome
        if outcome.killed:
            for table in (CHANGED, SAME):
                shutil.rmtree(workspace.segment(2, table))
    assert min(moments.count(done) for done in range(3)) > 0 and len(moments) > 60
