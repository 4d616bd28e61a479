"""Retiring: refusals, what goes and what stays, lineage, and loads at the same moment. Kills: `test_crash_steps`."""

import fcntl
import os
import queue
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from online.lookup.reader import VersionReader
from pipelines import cli
from pipelines.cli import facet
from pipelines.contracts.durable import creating_directory
from pipelines.contracts.errors import IntegrityError, InvalidConfig, VersionInUse, VersionNotFound
from pipelines.contracts.locks import locked
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from pipelines.retire import bytes_below, delete_leftovers, leftovers, retire
from tests.crash import require_served, require_whole
from tests.releases import FeastRepository, published_rows, write_release
from tests.rivals import holding, race, retiring


def run(workspace: Workspace, *args: str) -> str:
    result = CliRunner().invoke(facet, ["--workspace", str(workspace.root), *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_goes_and_what_stays(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    manifest = workspace.versions.manifest(1)
    directory, segments = workspace.versions.path(1), workspace.segments / "1"
    size = bytes_below(directory) + bytes_below(segments) - bytes_below(directory / "manifest.json")
    retired = retire(workspace, 1)
    assert [path.name for path in directory.iterdir()] == ["retired.json"] and not segments.exists()
    assert (retired.freed_bytes, retired.children) == (size, (2,))
    assert workspace.versions.retirement(1).manifest == manifest
    assert require_whole(workspace) == [2]
    require_served(workspace, 2)
    with pytest.raises(VersionNotFound, match="one that was retired"):
        retire(workspace, 1)
    own_workspace.apply()
    versions = {view.tags.get("version") for view in own_workspace.store().list_feature_views()}
    assert versions == {None, "2"}


@pytest.mark.parametrize("which", ["versions", "segments"])
def test_a_link_out_of_the_workspace_is_not_followed(
    own_workspace: FeastRepository, tmp_path: Path, which: str
) -> None:
    workspace, elsewhere = own_workspace.workspace, tmp_path / "elsewhere"
    directory = workspace.root / which / "1"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)
    before = {path for path in elsewhere.rglob("*") if path.name not in ("manifest.json", "retired.json")}
    with pytest.raises(InvalidConfig, match="is not deleted: expected something inside"):
        retire(workspace, 1)
    assert before <= set(elsewhere.rglob("*"))


def test_a_copy_under_another_number_takes_nothing_of_the_original_with_it(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    shutil.copytree(workspace.versions.path(1), workspace.versions.path(5))
    with pytest.raises(IntegrityError, match=r"5/manifest\.json is not in its place"):
        VersionReader.open(workspace, 5)
    retire(workspace, 5)
    assert require_whole(workspace) == [1, 2]
    require_served(workspace, 1)


def test_the_current_version_stays(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    with pytest.raises(VersionInUse, match="current"):
        retire(workspace, 2)
    require_served(workspace, 2)
    assert "current version: 1, before: 2" in run(workspace, "versions", "point", "1")
    retire(workspace, 2)
    assert (workspace.versions.numbers(), workspace.versions.next_number()) == ([1], 3)


def test_an_unknown_version(own_workspace: FeastRepository) -> None:
    with pytest.raises(VersionNotFound, match="version 9"):
        retire(own_workspace.workspace, 9)
    assert not own_workspace.workspace.versions.path(9).exists()


def test_a_corrupted_version_can_be_retired_beside_another(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    (workspace.versions.root / "CURRENT").unlink()
    for version in (1, 2):
        (workspace.versions.path(version) / "manifest.sha256").write_text("0" * 64)
        with pytest.raises(IntegrityError):
            workspace.versions.manifest(version)
    assert retire(workspace, 1).retirement.manifest is None
    assert [path.name for path in workspace.versions.path(1).iterdir()] == ["retired.json"]
    assert "its manifest was corrupted" in run(workspace, "versions", "show", "1")


def test_a_half_retired_version_is_finished(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    first = workspace.versions.retire(1)  # and died there
    assert retire(workspace, 1).retirement.at == first.at.replace(microsecond=0)
    assert [path.name for path in workspace.versions.path(1).iterdir()] == ["retired.json"]


def test_of_two_deleters_the_second_waits(own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, flock = own_workspace.workspace, fcntl.flock
    record = workspace.versions.path(1) / "retired.json"
    workspace.versions.retire(1)
    before, asked = leftovers(workspace, 1), queue.SimpleQueue()

    def told_flock(descriptor: int, operation: int) -> None:
        if os.path.samestat(os.fstat(descriptor), record.stat()):
            asked.put(operation)
        flock(descriptor, operation)

    with ThreadPoolExecutor(1) as pool:
        with locked(record) as first:
            monkeypatch.setattr(fcntl, "flock", told_flock)
            second = pool.submit(delete_leftovers, workspace, 1)
            second.add_done_callback(lambda _: asked.put("done"))
            assert first and asked.get(timeout=120) == fcntl.LOCK_EX  # it waits: without LOCK_NB
            assert leftovers(workspace, 1) == before and len(before) > 5
        assert second.result(timeout=120) > 10_000
    assert leftovers(workspace, 1) == []
    assert delete_leftovers(workspace, 1) == 0  # whoever comes after both


def test_what_a_process_has_mapped_stays_readable_to_it(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    ids, truth = published_rows(workspace, 1, "item.kge")
    reader = VersionReader.open(workspace, 1)  # without a pin
    retire(workspace, 1)
    rows, found = reader.lookup("item.kge", ids)
    assert found.all() and np.array_equal(rows, truth)


def test_a_segment_that_somebody_is_writing_is_left_to_them(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    shutil.rmtree(workspace.segment(1, "item.kge"))
    with creating_directory(workspace.segment(1, "item.kge")) as staging:
        (staging / "rows").write_text("half")
        retire(workspace, 1)
        assert [path.name for path in (workspace.segments / "1").iterdir()] == [staging.name]
    assert workspace.segment(1, "item.kge").is_dir()  # now an orphan, for `facet gc`


def test_what_a_dead_writer_left_among_its_segments_goes_too(own_workspace: FeastRepository) -> None:
    segments = own_workspace.workspace.segments / "1"
    (segments / ".staging-0a1b2c3d-item.kge").mkdir()
    retire(own_workspace.workspace, 1)
    assert not segments.exists()


def test_files_that_have_another_name_free_nothing(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * 100)
    (tmp_path / "d" / "g").write_bytes(b"x" * 10)
    os.link(tmp_path / "d" / "f", tmp_path / "other")
    assert (bytes_below(tmp_path / "d"), bytes_below(tmp_path / "absent")) == (10, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may delete anywhere")
def test_files_that_may_not_be_deleted(own_workspace: FeastRepository) -> None:
    own_workspace.workspace.versions.path(1).chmod(0o500)
    with pytest.raises(InvalidConfig, match="cannot write"):
        retire(own_workspace.workspace, 1)
    require_served(own_workspace.workspace, 1)


def test_the_commands(own_workspace: FeastRepository, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = own_workspace.workspace
    sha256 = workspace.versions.manifest(1).sha256
    assert cli.run(["--workspace", str(workspace.root), "retire", "2"]) == 2
    assert "facet versions point N" in capsys.readouterr().err
    said = run(workspace, "retire", "1")
    for expected in ("retired version 1", sha256[:12], "bytes freed", "still published: 2", "feast apply"):
        assert expected in said
    listed = run(workspace, "versions")
    assert "2*" in listed and "retired: 1" in listed and "2010-12-01..2011-04-01" in listed
    shown = run(workspace, "versions", "show", "1")
    for expected in ("retired 20", sha256, "children           2", "0 days when fine-tuning starts", "item_kge__v1"):
        assert expected in shown
    assert "held by" not in shown and "nobody" in run(workspace, "versions", "show", "2")


def test_lineage_as_a_tree(tmp_path: Path, own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    for version, parents in ((3, (2,)), (4, (1, 2)), (5, ())):
        publish(workspace, write_release(tmp_path / f"release{version}", seed=version, rows=20), parents=parents)
    retire(workspace, 1)
    publish(workspace, write_release(tmp_path / "release6", seed=6, rows=20), parents=(1, 5))  # a retired parent
    lines = run(workspace, "versions", "lineage").splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["6", "├─ 5", "└─ 1", "4", "├─ 2", "│", "└─ 1", "3", "└─ 2"]
    assert lines[5].startswith("│  └─ 1  [retired 20")
    assert "[current]  pretrained 2010-12-01 to 2011-04-01, 0 days, fine-tuned 2011-04-01 to 2011-07-01" in lines[0]
    assert lines[0].endswith(workspace.versions.manifest(6).sha256[:12])
    assert lines[2].startswith("└─ 1  [retired 20") and "pretrained 2010-12-01" in lines[2]
    assert lines[6].endswith("(shown above)") and lines[8] == "└─ 2  (shown above)"
    (workspace.versions.path(1) / "retired.json").write_text("{}")
    assert "1  [retired; its record cannot be read]" in run(workspace, "versions", "lineage")
    shutil.rmtree(workspace.versions.path(1))
    assert "1  [not in this workspace]" in run(workspace, "versions", "lineage")


@pytest.mark.slow
def test_a_load_and_a_retirement_at_the_same_moment(tmp_path: Path, own_workspace: FeastRepository) -> None:
    """Either the load is refused or the retirement: nobody ever serves a half-deleted version."""
    workspace, last = own_workspace.workspace, 16
    for version in range(3, last + 1):
        publish(workspace, write_release(tmp_path / f"release{version}", seed=version, rows=40))
    own_workspace.apply()
    own_workspace.materialize()
    outcomes = race(range(1, last), (holding, workspace.root), (retiring, workspace.root))
    for version, (load, retirement) in enumerate(outcomes, start=1):
        if load == "loaded":
            assert retirement.startswith("VersionInUse"), (version, load, retirement)
            require_served(workspace, version)
        else:
            assert load.startswith(("VersionNotFound", "VersionConflict")), (version, load, retirement)
            assert retirement == "retired" and not (workspace.segments / str(version)).exists()
    assert list((workspace.versions.root / "pins").iterdir()) == []
    require_served(workspace, last)
