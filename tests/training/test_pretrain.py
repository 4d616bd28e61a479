"""`facet pretrain`, by one process and by two that talk over gloo."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pipelines.contracts.durable import sha256_of
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.workspace import Run, Workspace
from tests.lineages import invented_events, record_prepared
from tests.planted import WINDOWS, planted_run
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
    assert {path.name for path in directory.parent.iterdir()} == {directory.name, f"{directory.name}.lineage.json"}


SOURCES = {"contrastive": "pairs", "kge": "graph"}


def trained_facet(world, facet: str, *arguments: object) -> Lineage:
    workspace, run, config = world
    CliRunner().invoke(
        pretrain, [*map(str, (facet, "--run", "v1", "--config", config, *arguments))], obj=workspace,
        catch_exceptions=False,
    )
    return Lineage.read(lineage_of(run.facet(facet, 0)), stage="pretrain")


def changed_source(run: Run, facet: str) -> None:
    """Other pairs, another graph: the last row is gone."""
    path = {"contrastive": run.pairs, "kge": run.graph / "edges.parquet"}[facet]
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)


@pytest.mark.parametrize("facet", ["contrastive", "kge"])
def test_a_facet_says_what_it_was_made_from(world, facet: str) -> None:
    _, run, config = world
    made = trained_facet(world, facet)
    rows = {"user", "item"} | ({"nodes", "relations"} if facet == "kge" else set())
    assert made.files == {
        f"{facet}-s0/{name}.safetensors": sha256_of(run.facet(facet, 0) / f"{name}.safetensors") for name in rows
    }
    [(name, source)] = made.inputs.items()
    assert name == SOURCES[facet] and source == Lineage.read(lineage_of(getattr(run, name)), stage="prepare")
    assert made.settings["window_end"] == "2024-02-01T00:00:00+00:00" and made.settings["seed"] == 0
    assert made.settings[facet]["epochs"] == 3 and made.settings[facet]["holdout_days"] == 7
    assert made.settings["tables"]["optimizer"] == "rowwise_adagrad"
    assert made.settings["ids"]["item"] == {"rule": "vocabulary", "buckets": 0, "seed": 0, "min_events": 1}
    config.write_text(SMALL + "item_ids: {rule: vocabulary+buckets, buckets: 5}\n")
    assert list(trained_facet(world, facet, "--force").settings["vocabularies"]) == ["item"]


@pytest.mark.parametrize("facet", ["contrastive", "kge"])
def test_a_facet_of_other_inputs_is_trained_anew(world, facet: str, caplog: pytest.LogCaptureFixture) -> None:
    """Other pairs or another graph, another log, another window: the log says which."""
    caplog.set_level(logging.INFO)
    workspace, run, _ = world
    name, other = SOURCES[facet], SOURCES["kge" if facet == "contrastive" else "contrastive"]

    def said() -> list[str]:
        caplog.clear()
        trained_facet(world, facet)
        messages = [text.partition(" is trained anew: ")[2] for text in caplog.messages if "trained anew" in text]
        return messages if messages or any("is complete" in text for text in caplog.messages) else ["first"]

    assert said() == ["first"] and said() == []
    changed_source(run, facet)
    record_prepared(workspace, run)
    assert said() == [f"{name} of run v1"] and said() == []
    changed_source(run, facet)
    record_prepared(workspace, run, log="more clicks")
    assert said() == [f"{name} of run v1 (the events (the log /logs/shop.csv))"] and said() == []
    RunSpec("planted", replace(WINDOWS, pretrain=replace(WINDOWS.pretrain, end=date(2024, 1, 31))), ("click",)).write(
        run.spec
    )
    end = 'setting window_end: "2024-02-01T00:00:00+00:00", now "2024-01-31T00:00:00+00:00"'
    assert said() == [end] and said() == []
    changed_source(run, facet)
    record_prepared(workspace, run)
    window = 'setting window: ["2024-01-01", "2024-02-01"], now ["2024-01-01", "2024-01-31"]'
    [text] = said()
    assert window in text and not said()
    changed_source(run, "kge" if other == "graph" else "contrastive")
    record_prepared(workspace, run)
    assert said() == [], f"{other} is none of its inputs"
    lineage_of(run.facet(facet, 0)).unlink()
    assert "lineage.json is not there" in said()[0] and said() == []
    (run.facet(facet, 0) / "user.safetensors").write_bytes(b"x")
    assert "user.safetensors" in said()[0] and said() == []


@pytest.mark.parametrize("facet", ["contrastive", "kge"])
def test_a_complete_facet_of_another_configuration_is_refused_unless_forced(world, facet: str) -> None:
    workspace, run, config = world
    before = trained_facet(world, facet)
    for change, message in [
        (SMALL.replace("epochs: 3", "epochs: 2"), f"setting {facet}.epochs: 3, now 2"),
        (SMALL + "tables: {optimizer: adagrad}", 'setting tables.optimizer: "rowwise_adagrad", now "adagrad"'),
        (SMALL + "user_ids: {rule: hash, buckets: 9}", "setting ids.user.buckets: 0, now 9"),
    ]:
        config.write_text(change)
        command = f"`facet pretrain {facet} --run v1 --seed 0 --force`"
        with pytest.raises(StaleInput, match=rf"{facet} facet of run v1.*got {message}.*the --config.*or.*{command}"):
            trained_facet(world, facet)
    assert Lineage.read(lineage_of(run.facet(facet, 0)), stage="pretrain") == before
    changed_source(run, facet)
    record_prepared(workspace, run)
    with pytest.raises(StaleInput, match="another configuration"):  # no hour is spent on a forgotten --config
        trained_facet(world, facet)
    assert trained_facet(world, facet, "--force").settings["ids"]["user"]["buckets"] == 9


@pytest.mark.parametrize("facet", ["contrastive", "kge"])
def test_what_was_prepared_has_to_fit_the_events(world, facet: str) -> None:
    """The log was ingested anew, and `facet prepare` not called since; or something else wrote the file."""
    workspace, run, _ = world
    trained_facet(world, facet)
    invented_events("more clicks").write(lineage_of(workspace.events))
    with pytest.raises(StaleInput, match=r"other events.*the log /logs/shop.csv.*Run `facet prepare --run v1`"):
        trained_facet(world, facet)
    lineage_of(workspace.events).unlink()  # a run without its events is taken as it is
    trained_facet(world, facet)
    changed_source(run, facet)
    with pytest.raises(StaleInput, match=r"parquet: expected the file that `facet prepare --run v1` wrote"):
        trained_facet(world, facet)


def test_a_facet_that_failed_does_not_count_as_complete(world, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, _ = world
    trained_facet(world, "contrastive")

    def full(*_: object, **__: object) -> None:
        raise OSError(5, "no space left on device")

    monkeypatch.setattr("training.contrastive.write_facet", full)
    with pytest.raises(OSError, match="no space"):
        trained_facet(world, "contrastive", "--force")
    assert (run.facet("contrastive", 0) / "metrics.json").exists()
    assert not lineage_of(run.facet("contrastive", 0)).exists()


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
