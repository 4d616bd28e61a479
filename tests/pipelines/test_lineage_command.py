"""`facet lineage`: from a version down to the log's files, each artefact once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.commands.lineage import MOST_FILES, lineage
from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.lineage import Lineage
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace
from tests.lineages import invented, invented_ranker
from tests.pipelines.contracts.test_version import MANIFEST, WINDOWS


def publish(workspace: Workspace, number: int, ranker: Lineage | None = None) -> Manifest:
    made = replace(MANIFEST, version=number, lineage=ranker or MANIFEST.lineage)
    with workspace.versions.creating(number) as staging:
        made.write(staging)
    workspace.versions.point_to(number)
    return made


def shown(workspace: Workspace, *words: str) -> str:
    return CliRunner().invoke(lineage, words, obj=workspace, catch_exceptions=False).output


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "var")


def test_the_chain_of_the_current_version_down_to_the_log(workspace: Workspace) -> None:
    publish(workspace, 1)
    ranker = invented_ranker(dataset="shop", windows=WINDOWS, tasks=["click", "buy"], seed=3)
    manifest = publish(workspace, 2, ranker)
    lines = shown(workspace).splitlines()
    assert lines[0] == f"version 2 of shop (current), manifest {manifest.sha256[:12]}"
    assert lines[1] == f"└─ ranker both of run v1, seed 3  {ranker.content[:12]}"
    windows = "windows pretrain 2011-01-01 to 2011-02-01, finetune 2011-02-01 to"
    assert f"arm both; dataset shop; seed 3; tasks click, buy; {windows}" in lines[2]
    [log] = [line for line in lines if "the log" in line]
    file = lines[lines.index(log) + 1]
    assert file.strip().endswith(f"shop.csv  {ranker_log(ranker).files['shop.csv'][:12]}")
    for what in ("the events", "pairs of run v1", "graph of run v1", "examples of run v1", "context of run v1",
                 "the view user_context", "contrastive facet of run v1, seed 3", "kge facet of run v1, seed 3"):
        whole = [line for line in lines if what in line and "shown above" not in line]
        assert len(whole) == 1, (what, whole)
    depth = {line.strip(" │└├─").partition("  ")[0]: len(line) - len(line.lstrip(" │└├─")) for line in lines[::-1]}
    chain = ["ranker both of run v1, seed 3", "context of run v1", "examples of run v1", "the events"]
    assert [depth[what] for what in chain] == [3, 6, 9, 12]
    assert "version 1 of shop, " in shown(workspace, "1")


def ranker_log(ranker: Lineage) -> Lineage:
    return ranker.inputs["examples"].inputs["events"].inputs["log"]


def test_all_of_it_as_json(workspace: Workspace) -> None:
    manifest = publish(workspace, 1)
    told = json.loads(shown(workspace, "1", "--json"))
    assert told["version"] == 1 and told["manifest"] == manifest.sha256
    assert Lineage.from_dict(told["lineage"], where="here") == manifest.lineage


def test_a_log_of_many_files_is_cut_short_and_sections_are_left_out(workspace: Workspace) -> None:
    log = replace(invented("the log", "x"), files={f"day-{n:03}.csv": f"{n:064x}" for n in range(MOST_FILES + 7)})
    publish(workspace, 1, invented("ranker", "y", inputs={"log": log}, section={"deep": 1}, none=None, some=[1, 2]))
    text = shown(workspace)
    assert text.count(".csv") == MOST_FILES and "and 7 more files" in text
    assert "none None; some 1, 2" in text and "deep" not in text and "section" not in text


def test_a_retired_version_keeps_its_lineage_and_an_unknown_one_has_none(workspace: Workspace) -> None:
    with pytest.raises(VersionNotFound, match=r"no current version.*facet publish"):
        shown(workspace)
    publish(workspace, 1)
    publish(workspace, 2)
    workspace.versions.retire(1)
    assert "version 1 of shop (retired " in shown(workspace, "1") and "shop.csv" in shown(workspace, "1")
    with pytest.raises(VersionNotFound, match="3"):
        shown(workspace, "3")


def test_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(lineage, ["--help"]).output.split())
    assert "facet lineage 2 --json" in text and "down to the files of the log" in text
