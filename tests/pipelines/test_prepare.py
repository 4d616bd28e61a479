"""From a CSV log in a layout of its own to a prepared run, by the command line; and what a failure leaves behind."""

import logging
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.cli import run
from pipelines.contracts.errors import DiskFull, InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.ids import id_of
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.workspace import Workspace
from pipelines.dataset import load_dataset
from pipelines.events import events_lineage
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
    from pipelines.log import canonical_events, log_lineage

    workspace, dataset = Workspace(shop / "var"), load_dataset(str(shop / "shop.yaml"))
    settings = asdict(dataset.log)
    write_events(*canonical_events(dataset), workspace, log=log_lineage(dataset), settings=settings)
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


def test_what_did_not_change_is_not_made_again(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each part is made anew where its own settings changed or its events, and says which; nothing else is touched."""
    caplog.set_level(logging.INFO)
    workspace, dataset = ingested(shop)
    run = workspace.run("first")
    parts = {"views": workspace.views, "pairs": run.pairs, "graph": run.graph, "examples": run.examples}

    def made(definition=None, **options) -> dict[str, str]:
        """What was written anew, and why."""
        before = {name: files_of(path) or path.stat().st_mtime_ns for name, path in parts.items() if path.exists()}
        caplog.clear()
        prepare_views(workspace, definition or dataset, force=options.get("force", False))
        prepare_run(workspace, definition or dataset, "first", **options)
        after = {name: files_of(path) or path.stat().st_mtime_ns for name, path in parts.items()}
        said = "\n".join(message for message in caplog.messages if "made anew" in message)
        return {name: said for name in parts if before.get(name) != after[name]}

    assert made().keys() == parts.keys() and not made()
    assert made(force=True).keys() == parts.keys()
    seeded = made(seed=1)
    assert seeded == {"examples": "examples of run first is made anew: setting seed: 0, now 1"}
    assert not made(seed=1) and made().keys() == {"examples"}

    def changed(**sections: str):
        (shop / "shop.yaml").write_text(shop_yaml(source="source: log.csv", **sections))
        return load_dataset(str(shop / "shop.yaml"))

    kinds = made(changed(pair_kinds="pair_kinds: [buy]"))
    assert kinds == {"pairs": 'pairs of run first is made anew: setting kinds: ["view", "buy"], now ["buy"]'}
    assert made().keys() == {"pairs"} and made(changed(context_kinds="context_kinds: [buy]")).keys() == {"views"}
    assert made().keys() == {"views"}
    tasks = shop_yaml().partition("tasks:")[2].partition("runs:")[0]
    assert made(changed(tasks="tasks:" + tasks.replace("days: 7", "days: 8"))).keys() == {"examples"}
    assert made().keys() == {"examples"}
    graph = shop_yaml().partition("graph:")[2]
    graph = graph.replace("{type: events, kinds: [buy]}", "{type: events, kinds: [view]}")
    assert made(changed(graph=f"graph:{graph}")).keys() == {"graph"}
    assert made().keys() == {"graph"}
    runs = shop_yaml().partition("runs:")[2].partition("graph:")[0]
    assert made(changed(runs="runs:" + runs.replace("[2021-01-01, ", "[2021-01-02, "))).keys() == {
        "pairs", "graph", "examples"
    }
    assert made().keys() == {"pairs", "graph", "examples"} and not made()

    write_csv(shop / "log.csv", days=109)
    first = events_lineage(workspace)
    workspace, dataset = ingested(shop)
    assert events_lineage(workspace).content != first.content
    anew = made()
    assert anew.keys() == parts.keys() and "the events (the log " in anew["pairs"]


def test_events_that_were_read_in_another_way_are_refused(shop: Path, run_facet) -> None:
    workspace, _ = ingested(shop)
    (shop / "shop.yaml").write_text(
        shop_yaml(source="source: log.csv").replace("{view: onsite, buy: offsite}", "{view: onsite, buy: onsite}")
    )
    dataset = load_dataset(str(shop / "shop.yaml"))
    for stage in (lambda: prepare_views(workspace, dataset), lambda: prepare_run(workspace, dataset, "first")):
        with pytest.raises(StaleInput, match=r'setting kinds.buy: "offsite", now "onsite". Run `facet ingest'):
            stage()
    status, _, err = run_facet("--workspace", shop / "var", "prepare", "--run", "first")
    assert status == 2 and "setting kinds.buy" in err
    assert run_facet("--workspace", shop / "var", "ingest", "--dataset", shop / "shop.yaml")[0] == 0
    assert run_facet("--workspace", shop / "var", "prepare", "--run", "first")[0] == 0


def test_files_that_something_else_wrote_are_refused_or_made_anew(shop: Path) -> None:
    workspace, dataset = ingested(shop)
    prepare_run(workspace, dataset, "first")
    run, whole = workspace.run("first"), {}
    for path in (run.pairs, run.graph / "edges.parquet", run.examples):
        whole[path] = path.read_bytes()
        path.write_bytes(whole[path] + b"x")
    assert prepare_run(workspace, dataset, "first")
    assert {path: path.read_bytes() for path in whole} == whole
    workspace.events.write_bytes(workspace.events.read_bytes() + b"x")
    with pytest.raises(StaleInput, match=r"events.parquet: expected the file that `facet ingest` wrote"):
        prepare_run(workspace, dataset, "first")


def test_every_part_says_what_it_was_made_of(shop: Path) -> None:
    workspace, dataset = ingested(shop)
    prepare_views(workspace, dataset)
    prepare_run(workspace, dataset, "first")
    run = workspace.run("first")
    for path in (run.pairs, run.graph, run.examples, workspace.view("user_context")):
        lineage = Lineage.read(lineage_of(path), stage="prepare")
        assert lineage.inputs == {"events": events_lineage(workspace)}
        [log] = lineage.inputs["events"].inputs.values()
        assert list(log.files) == ["log.csv"] and str(shop / "log.csv") in log.what
    assert set(Lineage.read(lineage_of(run.graph), stage="prepare").files) == {
        "graph/nodes.parquet", "graph/edges.parquet", "graph/relations.json"
    }


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
