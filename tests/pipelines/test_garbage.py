"""`facet gc`: what crashes left goes, what somebody writes, retires or serves stays."""

import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines import garbage
from pipelines.cli import facet
from pipelines.contracts.durable import creating_directory, replacing_file
from pipelines.contracts.locks import locked
from pipelines.contracts.workspace import Workspace
from pipelines.garbage import collect, find, unexplained
from tests.crash import require_served, require_whole
from tests.releases import FeastRepository

DIE_HOLDING = """
import os, sys
from pathlib import Path
from pipelines.contracts.version import VersionStore
with VersionStore(Path(sys.argv[1])).pinned(2, role="ranker"):
    os._exit(1)
"""


@pytest.fixture
def workspace(own_workspace: FeastRepository) -> Workspace:
    return own_workspace.workspace


def found(workspace: Workspace) -> set[str]:
    return {str(each.path.relative_to(workspace.root)) for each in find(workspace)}


def leave_staging(directory: Path, size_bytes: int) -> Path:
    """What a writer that was killed leaves: a directory that nobody locks."""
    staging = directory / ".staging-0a1b2c3d-int4"
    (staging / "tables").mkdir(parents=True)
    (staging / "tables" / "half").write_bytes(b"x" * size_bytes)
    return staging


def test_nothing_to_collect(workspace: Workspace) -> None:
    before = sorted(workspace.root.rglob("*"))
    assert (find(workspace), collect(workspace), unexplained(workspace)) == ([], ([], []), [])
    assert sorted(workspace.root.rglob("*")) == before


def test_what_no_living_writer_fills_goes_wherever_it_lies(workspace: Workspace) -> None:
    ranker = workspace.run("v1").ranker("both", 0)
    dead = [leave_staging(parent, 1000) for parent in (ranker, workspace.versions.root, workspace.segments / "2")]
    with creating_directory(ranker / "int8") as directory, replacing_file(workspace.root / "audit" / "2.json") as file:
        (directory / "tables").mkdir()
        leave_staging(directory, 5)  # inside what a living process writes
        file.write_text("half")
        assert found(workspace) == {str(path.relative_to(workspace.root)) for path in dead}
        assert all(path.is_dir() for path in dead)  # looking deletes nothing
        gone, kept = collect(workspace)
        assert sorted(garbage.path for garbage in gone) == sorted(dead) and not kept
        assert sum(each.bytes for each in gone) == 3000
        assert (directory / "tables").is_dir() and file.read_text() == "half" and not any(p.exists() for p in dead)
    assert (ranker / "int8" / "tables").is_dir() and (workspace.root / "audit" / "2.json").read_text() == "half"
    require_served(workspace, 2)


def test_a_half_retired_version_and_its_segments_go(workspace: Workspace) -> None:
    workspace.versions.retire(1)  # and died there
    assert {"versions/1/tables", "versions/1/upper", "segments/1/item.kge"} <= found(workspace)
    with locked(workspace.versions.path(1) / "retired.json") as deleting:
        assert deleting and find(workspace) == []  # somebody is at it
    gone, kept = collect(workspace)
    assert not kept and sum(each.bytes for each in gone) > 10_000
    assert [path.name for path in workspace.versions.path(1).iterdir()] == ["retired.json"]
    assert not (workspace.segments / "1").exists() and find(workspace) == []
    assert workspace.versions.retirement(1).manifest.version == 1 and require_whole(workspace) == [2]
    require_served(workspace, 2)


def test_a_segment_that_was_finished_after_its_version_was_retired_goes(workspace: Workspace) -> None:
    kept = shutil.copytree(workspace.segment(1, "item.kge"), workspace.root / "kept")
    workspace.versions.retire(1)
    collect(workspace)
    with creating_directory(workspace.segment(1, "item.kge")) as staging:
        shutil.copytree(kept, staging, dirs_exist_ok=True)
        assert find(workspace) == []
    assert found(workspace) == {"segments/1/item.kge"}
    collect(workspace)
    assert not (workspace.segments / "1").exists()


def test_a_retirement_that_did_not_happen_is_withdrawn(workspace: Workspace) -> None:
    note = workspace.versions.path(1) / "retired.json"
    note.write_text("{")  # died before the manifest was deleted
    with locked(note.with_name("manifest.json")) as retiring:
        assert retiring and find(workspace) == []
    with workspace.versions.pinned(1, role="cpu-tier"):
        collect(workspace)
    assert not note.exists() and require_whole(workspace) == [1, 2]
    require_served(workspace, 1)


def test_a_retirement_that_begins_meanwhile_is_not_withdrawn(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody retires the version between the look at its record and the moment at which that would be deleted."""
    note = workspace.versions.path(1) / "retired.json"
    note.write_text("{")
    look, looks = garbage._withdrawn, []

    with ExitStack() as retiring:

        def withdrawn(workspace: Workspace) -> list[Path]:
            looks.append(look(workspace))
            if len(looks) == 2:  # the first is that of `find`
                assert retiring.enter_context(locked(note.with_name("manifest.json")))
            return looks[-1]

        monkeypatch.setattr(garbage, "_withdrawn", withdrawn)
        gone, kept = collect(workspace)
        assert looks == [[note], [note]] and note.read_text() == "{"
    assert not gone and [left.path for left in kept] == [note]


def test_pins_of_the_dead_go_and_those_of_the_living_stay(workspace: Workspace) -> None:
    subprocess.run([sys.executable, "-c", DIE_HOLDING, str(workspace.versions.root)], check=False)
    dead = [path.name for path in (workspace.versions.root / "pins").iterdir()]
    with workspace.versions.pinned(1, role="cpu-tier"):  # which sweeps the dead one itself
        living = [path.name for path in (workspace.versions.root / "pins").iterdir()]
        (workspace.versions.root / "pins" / dead[0]).write_text("{}")
        assert len(dead) == 1 and found(workspace) == {f"versions/pins/{dead[0]}"}
        collect(workspace)
        assert [path.name for path in (workspace.versions.root / "pins").iterdir()] == living
        assert [holder.role for holder in workspace.versions.holders(1)] == ["cpu-tier"]


def test_what_no_crash_of_ours_leaves_is_only_told(workspace: Workspace) -> None:
    (workspace.versions.path(1) / "manifest.json").unlink()
    (workspace.segments / "7" / "item.kge").mkdir(parents=True)
    (workspace.versions.root / "²").mkdir()
    assert unexplained(workspace) == [
        workspace.versions.path(1), workspace.versions.root / "²", workspace.segments / "1", workspace.segments / "7",
    ]
    collect(workspace)
    assert (workspace.versions.path(1) / "tables").is_dir() and workspace.segment(7, "item.kge").is_dir()


def test_the_command(workspace: Workspace) -> None:
    def run(*args: str) -> str:
        result = CliRunner().invoke(facet, ["--workspace", str(workspace.root), "gc", *args], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    dead = leave_staging(workspace.versions.root, 1234)
    (workspace.segments / "7").mkdir()
    said = run("--dry-run")
    assert f"1,234 bytes  versions/{dead.name}  (left by a writer" in said and "would be deleted: 1, 1,234" in said
    assert "left alone: segments/7" in said and dead.is_dir()
    assert "deleted: 1, 1,234 bytes" in run() and not dead.exists()
    assert "deleted: 0, 0 bytes" in run()
