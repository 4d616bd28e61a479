"""`facet pretrain`, by one process and by two that talk over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pipelines.contracts.errors import InvalidConfig, NotPrepared
from pipelines.contracts.workspace import Run, Workspace
from tests.planted import planted_run
from tests.waiting import PROGRAM_S
from training.commands.pretrain import pretrain
from training.facets import pretrain_facet

SMALL = """
contrastive: {dim: 8, epochs: 3, groups: 2, group_rows: 32, uniform_negatives: 16, learn_temperature: true}
kge: {dim: 8, epochs: 3, groups: 2, group_edges: 32, uniform_negatives: 16}
"""
# One process and two differ only in the order in which gradients are summed.
TOLERANCE = 1e-4

TWO_PROCESSES = """
import sys
from pathlib import Path
from pipelines.contracts.workspace import Workspace
from training.facets import pretrain_facet
from training.tables import process_group

with process_group() as processes:
    assert processes.size == 2
    for facet in ("contrastive", "kge"):
        pretrain_facet(Workspace(Path(sys.argv[1])), facet, run="v1", seed=0, config=Path(sys.argv[2]))
"""


@pytest.fixture
def world(tmp_path: Path) -> tuple[Workspace, Run, Path]:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    return *planted_run(tmp_path), config


def invoke(workspace: Workspace, *arguments: object):
    return CliRunner().invoke(pretrain, [str(argument) for argument in arguments], obj=workspace)


@pytest.mark.parametrize("facet", ["contrastive", "kge"])
def test_the_command_writes_a_facet_once(world, facet: str) -> None:
    workspace, run, config = world
    arguments = facet, "--run", "v1", "--seed", 1, "--config", config
    first = invoke(workspace, *arguments)
    assert first.exit_code == 0 and first.output.strip() == str(run.facet(facet, 1))
    directory = run.facet(facet, 1)
    assert {"user.safetensors", "item.safetensors", "metrics.json"} <= {path.name for path in directory.iterdir()}
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["config"]["dim"] == 8 and [entry["epoch"] for entry in metrics["curve"]] == [1, 2, 3]
    assert metrics["wall_s"] > 0 and metrics["holdout"]
    stamp = (directory / "metrics.json").stat().st_mtime_ns
    assert invoke(workspace, *arguments).exit_code == 0
    assert (directory / "metrics.json").stat().st_mtime_ns == stamp
    assert invoke(workspace, *arguments, "--force").exit_code == 0
    assert (directory / "metrics.json").stat().st_mtime_ns > stamp
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_help_teaches() -> None:
    text = CliRunner().invoke(pretrain, ["--help"]).output
    assert "torchrun" in text and "facet pretrain kge --run v1" in text


@pytest.mark.slow
def test_two_processes_train_what_one_trains(world, tmp_path: Path) -> None:
    workspace, run, config = world
    other = planted_run(tmp_path / "two")[1]
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
         other.directory.parents[1], config],
        check=True, timeout=PROGRAM_S, capture_output=True,
    )
    for facet in ("contrastive", "kge"):
        pretrain_facet(workspace, facet, run="v1", seed=0, config=config)
        alone, together = run.facet(facet, 0), other.facet(facet, 0)
        assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in together.iterdir())
        for path in alone.glob("*.safetensors"):
            one, two = load_file(path), load_file(together / path.name)
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_an_unknown_facet_is_refused(world) -> None:
    with pytest.raises(InvalidConfig, match="contrastive, kge"):
        pretrain_facet(world[0], "graphsage", run="v1", seed=0)


def test_a_negative_seed_is_refused(world) -> None:
    with pytest.raises(InvalidConfig, match="seed"):
        pretrain_facet(world[0], "kge", run="v1", seed=-1)


def test_a_run_that_is_not_prepared_is_refused(world) -> None:
    workspace, run, _ = world
    with pytest.raises(NotPrepared, match="facet prepare --run v9"):
        pretrain_facet(workspace, "kge", run="v9", seed=0)
    run.pairs.unlink()
    with pytest.raises(NotPrepared, match=r"pairs\.parquet"):
        pretrain_facet(workspace, "contrastive", run="v1", seed=0)


def test_an_output_that_cannot_be_written_is_refused_first(world) -> None:
    workspace, run, config = world
    (run.directory / "facets").write_text("a file where a folder should be")
    with pytest.raises(InvalidConfig, match="cannot write"):
        pretrain_facet(workspace, "kge", run="v1", seed=0, config=config)
