"""A log, a run and a version; then other windows, another log and other options: what no longer fits is never used."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli import run
from pipelines.commands.lineage import lineage
from pipelines.contracts.durable import sha256_of
from pipelines.contracts.workspace import Workspace
from tests.logs import shop_yaml
from tests.pipelines.test_prepare import write_csv
from tests.releases import feast_apply

ROOT = Path(__file__).parents[2]
SMALL = """
contrastive: {dim: 8, epochs: 1, groups: 2, group_rows: 64, uniform_negatives: 16}
kge: {dim: 8, epochs: 1, groups: 2, group_edges: 64, uniform_negatives: 16}
ranker: {epochs: 1, batch_rows: 512, hidden: [8], cross_rank: 2}
"""
WINDOWS = shop_yaml().partition("runs:")[2].partition("graph:")[0]
SHORTER = WINDOWS.replace("[2021-01-01, 2021-02-01]", "[2021-01-01, 2021-01-31]").replace("2021-04-10]", "2021-04-08]")
Facet = Callable[..., tuple[int, str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "feature_repo", tmp_path / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    write_csv(tmp_path / "log.csv")
    (tmp_path / "shop.yaml").write_text(shop_yaml(source="source: log.csv"))
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def facet(home: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> Facet:
    """Run a command line; returns its exit status, and what it said of what was changed or refused."""
    caplog.set_level(logging.INFO)

    def facet(*words: object) -> tuple[int, str]:
        caplog.clear()
        status = run(["--workspace", str(home / "var"), *map(str, words)])
        refusals = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return status, "\n".join([*refusals, *(text for text in caplog.messages if " anew: " in text)])

    return facet


@pytest.mark.slow
def test_other_windows_another_log_and_other_options_through_every_command(home: Path, facet: Facet) -> None:
    config, run_of = ("--config", home / "small.yaml"), ("--run", "first")
    workspace = Workspace(home / "var")
    release = workspace.run("first").ranker("both", 0) / "int4" / "release.json"
    facets = [("pretrain", name, *run_of) for name in ("contrastive", "kge")]
    prepare, finetune = ("prepare", *run_of), ("finetune", *run_of, "--arm", "both", *config)
    quantize, publish = ("quantize", *run_of, "--arm", "both"), ("publish", *run_of, "--arm", "both")
    ingest = ("ingest", "--dataset", home / "shop.yaml")

    def refused(*words: object, mentions: tuple[str, ...]) -> None:
        status, said = facet(*words)
        assert status == 2 and all(each in said for each in mentions), (words, said)

    def done(*words: object, mentions: tuple[str, ...] = ()) -> None:
        status, said = facet(*words)
        assert status == 0 and all(each in said for each in mentions) and bool(said) == bool(mentions), (words, said)

    done(*ingest)
    done(*prepare)
    feast_apply(workspace.feature_repo)
    for stage in (*((*pretrain, *config) for pretrain in facets), finetune, quantize, publish):
        done(*stage)
    for stage in (prepare, *((*pretrain, *config) for pretrain in facets), finetune, quantize):
        done(*stage)  # nothing changed
    tree = CliRunner().invoke(lineage, obj=workspace, catch_exceptions=False).output
    assert f"log.csv  {sha256_of(home / 'log.csv')[:12]}" in tree
    assert "arm both; dataset shop; seed 0; tasks view, buy_7d" in tree

    # a forgotten --config
    for pretrain in facets:
        refused(*pretrain, mentions=(f"setting {pretrain[1]}.epochs: 1, now", "Give the --config", "--force"))
    refused("evaluate", *run_of, "--seeds", "1", mentions=("setting contrastive.epochs: 1, now",))

    # other windows
    (home / "shop.yaml").write_text(shop_yaml(source="source: log.csv", runs=f"runs:{SHORTER}"))
    done(*prepare, mentions=("pairs of run first is made anew: setting window",))
    window = 'pairs of run first (setting window: ["2021-01-01", "2021-02-01"], now ["2021-01-01", "2021-01-31"])'
    for stage in (finetune, quantize):
        refused(*stage, mentions=(window, "Run `facet pretrain contrastive --run first --seed 0`"))
    for pretrain, source in zip(facets, ("pairs", "graph"), strict=True):
        anew = (f"{pretrain[1]}-s0 is trained anew:", f"{source} of run first (setting window")
        done(*pretrain, *config, mentions=anew)
    changes = ("examples of run first (setting windows.pretrain", "contrastive facet of run first", "kge facet of run")
    refused(*quantize, mentions=(*changes, "Run `facet finetune --run first --arm both --seed 0`"))
    done(*finetune, mentions=("both-s0 is trained anew: ", *changes))
    done(*quantize)
    assert json.loads(release.read_text())["windows"]["pretrain"] == ["2021-01-01", "2021-01-31"]
    done(*publish)
    told = [workspace.versions.manifest(version).lineage.settings["windows"]["test"] for version in (1, 2)]
    assert told == [["2021-03-20", "2021-04-10"], ["2021-03-20", "2021-04-08"]]

    # another log
    write_csv(home / "log.csv", days=109)
    done(*ingest)
    for stage in ((*facets[0], *config), (*facets[1], *config), finetune, quantize):
        refused(*stage, mentions=("made from other events", "the log ", "Run `facet prepare --run first`"))
    done(*prepare, mentions=("pairs of run first is made anew: the events (the log ",))
    for stage in (finetune, quantize):
        refused(*stage, mentions=("pairs of run first (the events (the log ", "Run `facet pretrain contrastive"))
    for pretrain in facets:
        done(*pretrain, *config, mentions=("of run first (the events (the log ",))
    refused(*quantize, mentions=("examples of run first (the events (the log ", "Run `facet finetune"))
    done(*finetune, mentions=("examples of run first", "the events (the log "))
    done(*quantize)
    done(*publish)
    logs = {ranker_log(workspace, version) for version in (1, 2, 3)}
    assert len(logs) == 2 and ranker_log(workspace, 3) == sha256_of(home / "log.csv")


def ranker_log(workspace: Workspace, version: int) -> str:
    """SHA-256 of the log that a version says to come from."""
    [log] = workspace.versions.manifest(version).lineage.inputs["examples"].inputs["events"].inputs.values()
    return log.files["log.csv"]
