"""One arm from workspace to workspace: files, resumption, refusals, and two processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from pipelines.contracts.errors import IntegrityError, InvalidConfig, InvalidTable, NotPrepared
from pipelines.contracts.runspec import ARMS
from pipelines.contracts.workspace import Workspace
from tests.waiting import PROGRAM_S
from training.commands.finetune import finetune as command
from training.ranker.checkpoint import TrainedRanker, score
from training.ranker.finetune import finetune
from training.ranker.inputs import load_folds
from training.ranker.metrics import task_aucs
from training.tables import TableOptions

SMALL = """
ranker: {epochs: 1, batch_rows: 512, hidden: [16], cross_rank: 4, row_scale: 0.5, row_dropout: 0.0}
"""


def run_arm(world, config, *, arm="both", seed=0):
    return finetune(world.workspace, world.run, arm=arm, seed=seed, config=config, options=TableOptions())


def test_every_arm_leaves_the_same_files_and_only_warm_tables_start_warm(world, small):
    config = replace(small, epochs=1, freeze=True)
    for arm, facets in ARMS.items():
        run_arm(world, config, arm=arm)
        directory = world.run.ranker(arm, 0)
        trained = TrainedRanker.load(directory)
        assert set(trained.tables) == {"user.contrastive", "user.kge", "item.contrastive", "item.kge"}
        for name, table in trained.tables.items():
            size = np.sqrt((table.weight**2).mean())
            warm = name.partition(".")[2] in facets
            expected = config.row_scale if warm else config.init_std
            assert size == pytest.approx(expected, rel=0.2), (arm, name)
        metrics = json.loads((directory / "metrics.json").read_text())
        assert {"config", "curve", "auc", "wall_s"} <= set(metrics) and set(metrics["auc"]) == {"click", "convert"}


def test_what_is_on_disk_scores_as_what_was_measured(world, small):
    trained = run_arm(world, small)
    loaded = TrainedRanker.load(world.run.ranker("both", 0))
    test = load_folds(world.workspace, world.run)["test"]
    scores = score(loaded.tables, loaded.upper, test)
    np.testing.assert_array_equal(scores, score(trained.tables, trained.upper, test))
    assert task_aucs(("click", "convert"), test.labels, scores) == trained.metrics["auc"]
    assert trained.metrics["auc"]["click"] > 0.65


def test_an_id_without_a_row_scores_with_the_default_row(world, small):
    trained = run_arm(world, replace(small, epochs=1))
    test = load_folds(world.workspace, world.run)["test"].take(np.arange(4))
    unknown = replace(test, user=np.array([1, 2, -3, 2**62]))
    tables = {
        name: replace(table, ids=table.ids, weight=np.repeat(table.default[None], len(table.ids), 0))
        if name.startswith("user") else table
        for name, table in trained.tables.items()
    }
    np.testing.assert_array_equal(score(trained.tables, trained.upper, unknown), score(tables, trained.upper, test))


def test_what_is_trained_is_not_trained_again_unless_an_input_changed(world, small):
    config = replace(small, epochs=1)
    first = run_arm(world, config)
    stamp = (world.run.ranker("both", 0) / "metrics.json").stat().st_mtime_ns
    again = run_arm(world, config)
    assert (world.run.ranker("both", 0) / "metrics.json").stat().st_mtime_ns == stamp
    assert again.metrics == first.metrics
    run_arm(world, replace(config, table_learning_rate=0.02))
    changed = (world.run.ranker("both", 0) / "metrics.json").stat().st_mtime_ns
    assert changed != stamp
    path = world.run.facet("kge", 0) / "user.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "weight": tensors["weight"] * 2 + 1}, path)
    run_arm(world, replace(config, table_learning_rate=0.02))
    assert (world.run.ranker("both", 0) / "metrics.json").stat().st_mtime_ns != changed


def test_a_crash_leaves_no_half_written_ranker(world, small, monkeypatch):
    def crash(self, directory):
        (directory / "half").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(TrainedRanker, "save", crash)
    with pytest.raises(OSError, match="no space"):
        run_arm(world, replace(small, epochs=1))
    assert not list((world.run.directory / "rankers").iterdir())


def test_nan_in_a_facet_is_refused_before_anything_is_written(world, small):
    path = world.run.facet("contrastive", 0) / "item.safetensors"
    tensors = load_file(path)
    tensors["weight"][3, 1] = np.nan
    save_file(tensors, path)
    with pytest.raises(InvalidTable, match=r"item\.contrastive"):
        run_arm(world, small)
    assert not (world.run.directory / "rankers").exists()


def test_an_unknown_arm_missing_facets_and_an_unprepared_run_are_refused(world, small):
    with pytest.raises(InvalidConfig, match="'everything'"):
        run_arm(world, small, arm="everything")
    with pytest.raises(NotPrepared, match="pretrain contrastive --run v1 --seed 7"):
        run_arm(world, small, seed=7)
    empty = Workspace(world.workspace.root.parent / "other")
    with pytest.raises(NotPrepared, match="facet prepare"):
        finetune(empty, empty.run("v1"), arm="both", seed=0, config=small, options=TableOptions())


def test_a_broken_ranker_is_refused_when_read(world, small):
    run_arm(world, replace(small, epochs=1))
    directory = world.run.ranker("both", 0)
    (directory / "tables" / "item.kge.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(IntegrityError, match="ranker at"):
        TrainedRanker.load(directory)


def test_the_command_prints_the_auc(world):
    config = world.workspace.root / "small.yaml"
    config.write_text(SMALL)
    words = ["--run", "v1", "--arm", "kge", "--config", str(config)]
    result = CliRunner().invoke(command, words, obj=world.workspace, catch_exceptions=False)
    assert result.exit_code == 0 and "click" in result.output and "test ROC-AUC 0." in result.output


@pytest.mark.slow
def test_two_processes_train_what_one_trains(world):
    config = world.workspace.root / "small.yaml"
    config.write_text(SMALL)
    words = ["facet", "--workspace", str(world.workspace.root), "finetune", "--run", "v1", "--arm", "both", "--config",
             str(config)]
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    load_folds(world.workspace, world.run)
    directory = world.run.ranker("both", 0)

    def trained_by(command: list[str]) -> TrainedRanker:
        shutil.rmtree(directory, ignore_errors=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PROGRAM_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return TrainedRanker.load(directory)

    launcher = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    one, two = trained_by([str(scripts / "facet"), *words[1:]]), trained_by([*launcher, *words])
    for name in one.tables:
        np.testing.assert_allclose(one.tables[name].weight, two.tables[name].weight, atol=2e-4)
    for task, auc in one.metrics["auc"].items():
        assert two.metrics["auc"][task] == pytest.approx(auc, abs=1e-3)
