"""What the demo refuses before it does anything; tests/e2e runs all of it."""

from pathlib import Path

import pytest

from pipelines.cli import run
from tests.releases import FeastRepository


def demo(workspace: Path, *options: str) -> int:
    return run(["--workspace", str(workspace), "demo", "--reports", str(workspace / "reports"), *options])


def test_fresh_deletes_nothing_but_an_earlier_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert demo(tmp_path, "--fresh") == 2
    assert "would delete" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_versions_of_others_are_not_taken_for_its_own(
    workspace_with_versions: FeastRepository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(workspace_with_versions.workspace.root) == 2
    assert "published versions [1" in capsys.readouterr().err


def test_a_stage_that_fails_is_named_and_leaves_no_record(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert demo(tmp_path / "var", "--source", str(tmp_path / "nothing.parquet")) == 2
    printed = capfd.readouterr().err
    assert "no log at" in printed
    assert "`facet ingest" in printed and "exit status 0" in printed
    assert not list((tmp_path / "var").rglob("ingest.json"))
