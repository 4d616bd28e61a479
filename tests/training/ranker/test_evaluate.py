"""All arms and seeds: paired differences, resumption, and the written summary."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import ttest_rel

from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import lineage_of
from pipelines.contracts.runspec import ARMS
from training.commands.evaluate import evaluate as command
from training.ranker.evaluate import evaluate, summarize
from training.tables import TableOptions


def test_differences_are_paired_by_seed():
    generator = np.random.default_rng(0)
    scratch = 0.7 + generator.normal(0, 0.05, 5)  # seeds differ much, arms little
    both = scratch + 0.01 + generator.normal(0, 0.001, 5)
    result = summarize(
        {"scratch": [{"t": value} for value in scratch], "both": [{"t": value} for value in both]}, tasks=["t"]
    )
    delta = result["delta_vs_scratch"]["t"]["both"]
    low, high = ttest_rel(both, scratch).confidence_interval(0.95)
    assert delta["mean"] == pytest.approx((low + high) / 2) and delta["ci95"] == pytest.approx((high - low) / 2)
    assert delta["ci95"] < 0.005 < result["auc"]["t"]["both"]["ci95"]
    assert "scratch" not in result["delta_vs_scratch"]["t"]


def test_evaluation_is_written_goes_on_where_it_was_and_prints(world):
    config = world.workspace.root / "small.yaml"
    config.write_text("ranker: {epochs: 1, batch_rows: 512, hidden: [16], cross_rank: 4, row_scale: 0.5}")
    words = ["--run", "v1", "--seeds", "2", "--config", str(config)]

    def run() -> str:
        result = CliRunner().invoke(command, words, obj=world.workspace, catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    output = run()
    assert "against scratch" in output and "±" in output
    path = world.run.directory / "evaluation.json"
    written = json.loads(path.read_text())
    for task in ("click", "convert"):
        assert list(written["auc"][task]) == list(ARMS)
        for arm in ARMS:
            seeds = [
                json.loads((world.run.ranker(arm, seed) / "metrics.json").read_text())["auc"][task] for seed in range(2)
            ]
            assert written["auc"][task][arm]["seeds"] == seeds
            assert written["auc"][task][arm]["mean"] == pytest.approx(np.mean(seeds))
    assert written["conditions"]["seeds"] == 2
    stamps = {path: path.stat().st_mtime_ns for path in world.run.directory.glob("rankers/*/metrics.json")}
    assert len(stamps) == 8
    assert run() == output
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_facet_of_another_configuration_is_refused_and_a_missing_one_pretrained(world, monkeypatch):
    config = world.workspace.root / "small.yaml"
    words = ["--run", "v1", "--seeds", "2", "--config", str(config)]

    def run() -> None:
        CliRunner().invoke(command, words, obj=world.workspace, catch_exceptions=False)

    config.write_text("ranker: {epochs: 1}\nkge: {epochs: 7}")
    refusal = r"setting kge.epochs: \d+, now 7.*`facet pretrain kge --run v1 --seed 0 --force`"
    with pytest.raises(StaleInput, match=refusal):
        run()
    lineage_of(world.run.facet("kge", 0)).unlink()
    trained = []
    monkeypatch.setattr("training.kge.train.train_kge", lambda *_, **__: trained.append("kge") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert trained == ["kge"]


def test_no_seed_and_no_prepared_run_are_refused(world, small):
    def run(seeds):
        evaluate(
            world.workspace, world.run, seeds=seeds, config=small, options=TableOptions(), pretrain=lambda seed: None
        )

    with pytest.raises(InvalidConfig, match="--seeds"):
        run(0)
    world.run.spec.unlink()
    with pytest.raises(NotPrepared, match="facet prepare"):
        run(1)
