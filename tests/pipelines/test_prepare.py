"""From a CSV log in a layout of its own to a prepared run, by the command line; and what a failure leaves behind."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.cli import run
from pipelines.contracts.errors import DiskFull, InvalidConfig, NotPrepared
from pipelines.contracts.ids import id_of
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.workspace import Workspace
from pipelines.dataset import load_dataset
from pipelines.events import read_facts
from pipelines.examples import examples_schema
from pipelines.graph import EDGES_SCHEMA, NODES_SCHEMA
from pipelines.pairs import PAIRS_SCHEMA
from pipelines.prepare import prepare_run, prepare_views
from pipelines.views import VIEW_SCHEMAS
from tests.logs import random_events, shop_yaml


def write_csv(path: Path, *, days: int = 110) -> None:
    """A log whose columns, ids and times are nobody else's: text ids, milliseconds since 1970, rows out of order."""
    events = random_events(7, events=2500, days=days, kinds=("view", "view", "buy"))
    lines = []
    for user, item, kind, time in events:
        label = f"Pot no. {item}, {'red' if item % 2 else 'blue'}"
        lines.append(f'customer-{user},SKU{item:04},{kind},{int(time.timestamp() * 1000)},{item * 0.5},"{label}"')
    np.random.default_rng(0).shuffle(lines)
    path.write_text("who,what,how,millis,price,label\n" + "\n".join(dict.fromkeys(lines)) + "\n")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write_csv(tmp_path / "log.csv")
    (tmp_path / "shop.yaml").write_text(shop_yaml(source="source: log.csv"))
    return tmp_path


@pytest.fixture
def run_facet(capsys: pytest.CaptureFixture):
    """Run a command line; returns its exit status, output and errors."""

    def run_facet(*arguments: object) -> tuple[int, str, str]:
        status = run([*map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_facet


def ingested(shop: Path) -> tuple[Workspace, object]:
    from pipelines.events import write_events
    from pipelines.log import canonical_events

    workspace, dataset = Workspace(shop / "var"), load_dataset(str(shop / "shop.yaml"))
    write_events(*canonical_events(dataset), workspace)
    return workspace, dataset


def files_of(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_log_of_ones_own_from_csv_to_a_prepared_run(shop: Path, run_facet) -> None:
    var = shop / "var"
    status, out, _ = run_facet("--workspace", var, "ingest", "--dataset", shop / "shop.yaml")
    assert status == 0
    assert "view (onsite)" in out and "buy (offsite)" in out and "40  users" in out
    status, out, _ = run_facet("--workspace", var, "prepare", "--run", "first")
    assert status == 0
    assert "user -viewed-> item (onsite, anchor)" in out and "buy_7d" in out

    workspace = Workspace(var)
    run = workspace.run("first")
    assert RunSpec.read(run.spec).tasks == ("view", "buy_7d")
    assert pq.read_schema(run.pairs).equals(PAIRS_SCHEMA)
    assert pq.read_schema(run.examples).equals(examples_schema(["view", "buy_7d"]))
    assert pq.read_schema(run.graph / "nodes.parquet").equals(NODES_SCHEMA)
    assert pq.read_schema(run.graph / "edges.parquet").equals(EDGES_SCHEMA)
    for name, schema in VIEW_SCHEMAS.items():
        assert pq.read_schema(workspace.views / f"{name}.parquet").equals(schema)
    ids = pq.read_table(workspace.events)["item"].to_pylist()
    assert id_of("SKU0001") in ids
    nodes = pq.read_table(run.graph / "nodes.parquet").to_pandas().set_index(["type", "id"]).name
    assert nodes["item", id_of("SKU0001")] == "Pot no. 1, red" and nodes["word", id_of("red")] == "red"
    folds = pq.read_table(run.examples, columns=["fold"])["fold"].unique().to_pylist()
    assert folds == ["finetune", "validation", "test"]

    before = files_of(var)
    status, out, _ = run_facet("--workspace", var, "prepare", "--run", "first")
    assert status == 0 and "(up to date)" in out and files_of(var) == before


def test_a_refused_log_is_one_message_and_status_2_and_leaves_the_last_events(shop: Path, run_facet) -> None:
    var = shop / "var"
    ingested(shop)
    before = files_of(var)
    with (shop / "log.csv").open("a") as log:
        log.write(",SKU0001,view,1612137600000,1.0,x\n")
    status, _, err = run_facet("--workspace", var, "ingest", "--dataset", shop / "shop.yaml")
    assert status == 2
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "null user" in message[0] and "Traceback" not in err
    assert files_of(var) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ingest", "--dataset", "nobody"), "unknown data set"),
        (("ingest", "--dataset", "globo"), "--source"),
        (("prepare", "--run", "v1"), "Run `facet ingest` first"),
        (("prepare", "--run", "v9", "--dataset", "online_retail"), "one of \\['v1', 'v2'\\]"),
    ],
)
def test_refusals_before_there_is_anything(tmp_path: Path, run_facet, arguments: tuple, message: str) -> None:
    status, _, err = run_facet("--workspace", tmp_path / "var", *arguments)
    assert status == 2 and re.search(message, err)
    assert files_of(tmp_path) == {}


def test_an_unwritable_directory(shop: Path, run_facet) -> None:
    (shop / "taken").write_text("a file where a folder should be")
    status, _, err = run_facet("--workspace", shop / "taken/var", "ingest", "--dataset", shop / "shop.yaml")
    assert status == 2 and "cannot write to" in err
    assert (shop / "taken").read_text().startswith("a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(shop: Path, run_facet) -> None:
    (shop / "var").mkdir(mode=0o500)
    status, _, err = run_facet("--workspace", shop / "var", "ingest", "--dataset", shop / "shop.yaml")
    assert status == 2 and "cannot write to" in err and not list((shop / "var").iterdir())


def test_an_empty_window_is_named(shop: Path) -> None:
    write_csv(shop / "log.csv", days=60)
    workspace, dataset = ingested(shop)
    with pytest.raises(InvalidConfig, match=r"window 'test' of run first is empty: .*\['view'\].*2021-03-20"):
        prepare_run(workspace, dataset, "first")
    assert not workspace.run("first").spec.exists()
    assert not any(workspace.run("first").directory.iterdir())


def test_events_of_another_data_set_are_refused(shop: Path) -> None:
    workspace, _ = ingested(shop)
    with pytest.raises(InvalidConfig, match="expected those of online_retail, got those of shop"):
        prepare_views(workspace, load_dataset("online_retail"))


def test_events_without_their_facts_are_not_whole(shop: Path) -> None:
    workspace, dataset = ingested(shop)
    workspace.events.with_suffix(".json").unlink()
    with pytest.raises(NotPrepared, match="facet ingest"):
        prepare_views(workspace, dataset)


def test_new_events_new_definitions_and_force_are_worked_on(shop: Path) -> None:
    workspace, dataset = ingested(shop)
    assert prepare_views(workspace, dataset) and prepare_run(workspace, dataset, "first")
    assert not prepare_views(workspace, dataset) and not prepare_run(workspace, dataset, "first")
    assert prepare_views(workspace, dataset, force=True) and prepare_run(workspace, dataset, "first", force=True)

    assert prepare_run(workspace, dataset, "first", seed=1) and not prepare_run(workspace, dataset, "first", seed=1)

    changed = shop_yaml(source="source: log.csv", pair_kinds="pair_kinds: [buy]")
    (shop / "shop.yaml").write_text(changed)
    dataset = load_dataset(str(shop / "shop.yaml"))
    assert not prepare_views(workspace, dataset) and prepare_run(workspace, dataset, "first")

    write_csv(shop / "log.csv", days=109)
    first = read_facts(workspace).sha256
    workspace, dataset = ingested(shop)
    assert read_facts(workspace).sha256 != first
    assert prepare_views(workspace, dataset) and prepare_run(workspace, dataset, "first")


def test_the_same_log_makes_the_same_files(shop: Path) -> None:
    workspace, dataset = ingested(shop)
    prepare_run(workspace, dataset, "first")
    run = workspace.run("first")
    paths = [workspace.events, run.pairs, run.examples, run.graph / "nodes.parquet", run.graph / "edges.parquet"]
    before = [pq.read_table(path) for path in paths]
    lines = (shop / "log.csv").read_text().splitlines()
    (shop / "log.csv").write_text("\n".join([lines[0], *sorted(lines[1:])]) + "\n")
    ingested(shop)
    prepare_run(workspace, dataset, "first", force=True)
    assert all(pq.read_table(path).equals(table) for path, table in zip(paths, before, strict=True))


def test_a_crash_while_writing_leaves_no_run_that_looks_whole(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, dataset = ingested(shop)
    prepare_run(workspace, dataset, "first")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.graph.Graph.write", full)
    with pytest.raises(DiskFull, match=r"first/graph.*No space"):
        prepare_run(workspace, dataset, "first", force=True)
    run = workspace.run("first")
    assert not run.spec.exists() and not run.graph.exists()
    assert not [path for path in run.directory.rglob("*") if path.name.startswith(".staging")]
    monkeypatch.undo()
    assert prepare_run(workspace, dataset, "first") and run.spec.exists()
