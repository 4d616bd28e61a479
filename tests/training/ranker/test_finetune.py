"""One arm from workspace to workspace: files, resumption, refusals, and two processes."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from pipelines.contracts.errors import IntegrityError, InvalidConfig, InvalidTable, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import ARMS, FACETS, RunSpec
from pipelines.contracts.workspace import Workspace
from tests.lineages import invented_events, record_again, record_prepared
from tests.waiting import PROGRAM_S
from training.commands.finetune import finetune as command
from training.ids import IdsConfig, RunIds
from training.ranker.checkpoint import TrainedRanker, score
from training.ranker.finetune import finetune
from training.ranker.inputs import load_folds
from training.ranker.metrics import task_aucs
from training.tables import TableOptions

VIEWS = ("user_context", "item_context", "user_item_context")
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
    record_again(path.parent)
    run_arm(world, replace(config, table_learning_rate=0.02))
    assert (world.run.ranker("both", 0) / "metrics.json").stat().st_mtime_ns != changed


def ranker_lineage(world) -> Lineage:
    return Lineage.read(lineage_of(world.run.ranker("both", 0)), stage="finetune")


def test_a_ranker_says_what_it_was_made_from(world, small):
    config = replace(small, epochs=1)
    run_arm(world, config)
    run, made = world.run, ranker_lineage(world)
    tables = {f"both-s0/tables/{entity}.{facet}.safetensors" for entity in ("user", "item") for facet in FACETS}
    assert set(made.files) == {*tables, "both-s0/upper/config.json", "both-s0/upper/model.safetensors"}
    paths = {"examples": run.examples, "context": run.context, **{facet: run.facet(facet, 0) for facet in FACETS}}
    assert made.inputs == {name: Lineage.read(lineage_of(path), stage="test") for name, path in paths.items()}
    views = {name: lineage_of(world.workspace.view(name)) for name in VIEWS}
    assert made.inputs["context"].inputs == {
        "examples": made.inputs["examples"], **{name: Lineage.read(path, stage="test") for name, path in views.items()}
    }
    spec = RunSpec.read(run.spec)
    told = {
        "arm": "both", "seed": 0, "tasks": ["click", "convert"], "dataset": "planted",
        "windows": spec.windows.to_dict(), "ranker": config.to_dict(),
        "tables": asdict(TableOptions()), "ids": RunIds().describe(), "vocabularies": {},
    }
    assert {name: made.settings[name] for name in told} == told


def test_a_ranker_of_other_inputs_or_settings_is_trained_anew(world, small, caplog):
    """Other examples, another view, another facet, other windows, another configuration: the log says which."""
    caplog.set_level(logging.INFO)
    config, options, ids = replace(small, epochs=1), TableOptions(), None

    def said() -> list[str]:
        caplog.clear()
        finetune(world.workspace, world.run, arm="both", seed=0, config=config, options=options, id_configs=ids)
        return [text.partition(" is trained anew: ")[2] for text in caplog.messages if "is trained anew" in text]

    assert said() == [] and "trained already" not in caplog.text
    assert said() == [] and "trained already" in caplog.text
    table = pq.read_table(world.run.examples)
    pq.write_table(table.replace_schema_metadata({"changed": "yes"}), world.run.examples)
    record_again(world.run.examples)
    assert said() == ["examples of run v1"] and "is joined anew: examples of run v1" in caplog.text
    view = world.workspace.view("user_context")
    table = pq.read_table(view)
    days = pc.multiply(table["events_7d"], 2)
    pq.write_table(table.set_column(table.schema.get_field_index("events_7d"), "events_7d", days), view)
    record_again(view)
    world.apply_features()
    assert said() == ["context of run v1 (the view user_context)"] and said() == []
    path = world.run.facet("kge", 0) / "item.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "weight": tensors["weight"] * 2}, path)
    record_again(path.parent)
    assert said() == ["kge facet of run v1, seed 0"] and said() == []
    spec = RunSpec.read(world.run.spec)
    test = replace(spec.windows.test, end=date(2024, 4, 2))
    replace(spec, windows=replace(spec.windows, test=test)).write(world.run.spec)
    assert said() == ['setting windows.test: ["2024-03-15", "2024-04-01"], now ["2024-03-15", "2024-04-02"]']
    config = replace(config, dense_learning_rate=0.01)
    assert said() == [f"setting ranker.dense_learning_rate: {small.dense_learning_rate}, now 0.01"]
    options = replace(options, eps=1e-6)
    assert said() == ["setting tables.eps: 1e-08, now 1e-06"] and said() == []
    weights = world.run.ranker("both", 0) / "upper" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert "upper/model.safetensors: expected the file that `facet finetune --run v1 --arm both" in said()[0]
    lineage_of(world.run.ranker("both", 0)).unlink()
    assert "lineage.json is not there" in said()[0] and said() == []


def test_a_facet_that_does_not_fit_is_refused_by_name(world, small):
    """Other pairs, another graph, another window, other ids, another log: what changed, and what mends it."""
    command = r"Run `facet pretrain {} --run v1 --seed 0`, which trains it anew"
    for facet, name in (("contrastive", "pairs"), ("kge", "graph")):
        path = {"pairs": world.run.pairs, "graph": world.run.graph / "edges.parquet"}[name]
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(b"others")
        record_prepared(world.workspace, world.run, log="more clicks")
        causes = rf"{facet} facet of run v1, .*got {name} of run v1 \(the events \(the log /logs/shop.csv\)\)"
        with pytest.raises(StaleInput, match=causes + r"\. " + command.format(facet)):
            run_arm(world, small)
        path.write_bytes(before) if before else path.unlink()
        record_prepared(world.workspace, world.run)
    spec = RunSpec.read(world.run.spec)
    shorter = replace(spec.windows, pretrain=replace(spec.windows.pretrain, end=date(2024, 1, 30)))
    replace(spec, windows=shorter).write(world.run.spec)
    with pytest.raises(StaleInput, match=r"setting window_end: .*" + command.format("contrastive")):
        run_arm(world, small)
    spec.write(world.run.spec)
    with pytest.raises(StaleInput, match=r"setting ids.item.buckets: 0, now 5.*--config.*contrastive.*--force"):
        finetune(
            world.workspace, world.run, arm="both", seed=0, config=small, options=TableOptions(),
            id_configs={"item": IdsConfig("hash", buckets=5)},
        )
    invented_events("more clicks").write(lineage_of(world.workspace.events))
    with pytest.raises(StaleInput, match=r"other events.*the log.*Run `facet prepare --run v1`"):
        run_arm(world, small)
    assert not (world.run.directory / "rankers").exists()


def test_a_crash_leaves_no_half_written_ranker(world, small, monkeypatch):
    def crash(self, directory):
        (directory / "half").touch()
        raise OSError("no space left on device")

    run_arm(world, replace(small, epochs=1))
    monkeypatch.setattr(TrainedRanker, "save", crash)
    with pytest.raises(OSError, match="no space"):
        run_arm(world, replace(small, epochs=1, dense_learning_rate=0.01))
    assert not list((world.run.directory / "rankers").iterdir())


def test_nan_in_a_facet_is_refused_before_anything_is_written(world, small):
    path = world.run.facet("contrastive", 0) / "item.safetensors"
    tensors = load_file(path)
    tensors["weight"][3, 1] = np.nan
    save_file(tensors, path)
    record_again(path.parent)
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
