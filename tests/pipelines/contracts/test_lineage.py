"""What an artefact was made from: what changed is said by name, and nothing else is."""

import json
from datetime import date
from pathlib import Path

import pytest

from pipelines.contracts.errors import NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of


def artefact(folder: Path, name: str, content: str = "x", **about) -> Lineage:
    path = folder / f"{name}.parquet"
    path.write_text(content)
    lineage = Lineage.of(name, [path], within=folder, **about)
    lineage.write(lineage_of(path))
    return lineage


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    log = artefact(tmp_path, "log")
    settings = {"kinds": ("a", "b"), "day": date(2021, 1, 31), "deep": {"x": None, "y": 1.5}}
    events = artefact(tmp_path, "events", settings=settings, inputs={"log": log})
    read = Lineage.read(lineage_of(tmp_path / "events.parquet"), stage="ingest")
    assert read == events and read.inputs["log"] == log
    assert read.settings == {"kinds": ["a", "b"], "day": "2021-01-31", "deep": {"x": None, "y": 1.5}}
    assert not read.changes(settings=settings, inputs={"log": log})


def test_what_changed_is_named_down_to_its_cause(tmp_path) -> None:
    log = artefact(tmp_path, "log", "one")
    events = artefact(tmp_path, "events", "one", settings={"zone": "UTC"}, inputs={"log": log})
    pairs = artefact(tmp_path, "pairs", settings={"kinds": ["a"], "window": {"start": 1}}, inputs={"events": events})
    now = {"settings": {"kinds": ["a", "b"], "window": {"start": 1, "end": 2}}, "inputs": {"events": events}}
    assert pairs.changes(**now) == ['setting kinds: ["a"], now ["a", "b"]', "setting window.end: null, now 2"]
    log = artefact(tmp_path, "log", "two")
    other = artefact(tmp_path, "events", "two", settings={"zone": "CET"}, inputs={"log": log})
    assert pairs.changes(settings=pairs.settings, inputs={"events": other}) == [
        'events (setting zone: "UTC", now "CET"; log)'
    ]
    same = artefact(tmp_path, "events", "one", inputs={"log": log})
    assert not pairs.changes(settings=pairs.settings, inputs={"events": same}), "another log led to the same events"
    assert pairs.changes(settings=pairs.settings) == ["events, which is no longer used"]
    assert events.changes(settings=events.settings, inputs=events.inputs | {"names": log}) == ["names, which is new"]


def test_content_is_that_of_all_files_by_their_names(tmp_path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        path.write_text(path.name)
    lineage = Lineage.of("x", files, within=tmp_path)
    assert lineage.content == Lineage.of("y", files[::-1], within=tmp_path, settings={"z": 1}).content
    assert lineage.content != Lineage.of("x", files[:1], within=tmp_path).content
    files[0].write_text("b")
    files[1].write_text("a")
    assert lineage.content != Lineage.of("x", files, within=tmp_path).content


def test_files_that_are_not_those_that_were_made(tmp_path) -> None:
    artefact(tmp_path, "pairs")
    path = lineage_of(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.parquet").write_text("y")
    with pytest.raises(StaleInput, match=r"pairs.parquet: .* `facet prepare` wrote.*Run `facet prepare`"):
        Lineage.read(path, stage="prepare")
    (tmp_path / "pairs.parquet").unlink()
    with pytest.raises(NotPrepared, match=r"pairs.parquet is not there.*Run `facet prepare`"):
        Lineage.read(path, stage="prepare")
    path.unlink()
    with pytest.raises(NotPrepared, match=r"pairs.lineage.json is not there"):
        Lineage.read(path, stage="prepare")


def entry(what: str, *, files: dict | None = None, **inputs: object) -> dict:
    return {"what": what, "files": files or {}, "settings": {}, "inputs": inputs}


def test_each_artefact_is_written_once(tmp_path) -> None:
    log = artefact(tmp_path, "log")
    events = artefact(tmp_path, "events", inputs={"log": log})
    pairs, graph = (artefact(tmp_path, name, inputs={"events": events}) for name in ("pairs", "graph"))
    ranker = artefact(tmp_path, "ranker", inputs={"pairs": pairs, "graph": graph})
    written = ranker.to_dict()["artefacts"]
    assert [each["what"] for each in written] == ["log", "events", "graph", "pairs", "ranker"]
    assert [each["inputs"] for each in written[1:]] == [
        {"log": 0}, {"events": 1}, {"events": 1}, {"graph": 2, "pairs": 3}
    ]
    assert Lineage.from_dict(ranker.to_dict(), where="here") == ranker
    many = artefact(tmp_path, "many")
    for depth in range(60):
        many = artefact(tmp_path, f"many{depth}", inputs={"one": many, "other": many})
    assert len(many.to_dict()["artefacts"]) == 61


def test_a_cause_of_several_changes_is_said_once(tmp_path) -> None:
    def ranker(content: str, zone: str) -> Lineage:
        events = artefact(tmp_path, "events", content, settings={"zone": zone})
        inputs = {name: artefact(tmp_path, name, content + name, inputs={"events": events}) for name in ("a", "b")}
        return artefact(tmp_path, "ranker", inputs=inputs)

    old, new = ranker("one", "UTC"), ranker("two", "CET")
    assert old.changes(inputs=new.inputs) == ['a (events (setting zone: "UTC", now "CET"))', "b (events)"]


@pytest.mark.parametrize(
    "artefacts",
    [
        None, {}, [], [{}], [entry(1)], [entry("x", files={"a": "b"})], [entry("x", log=0)], [entry("x", log=-1)],
        [entry("x", log=1)], [entry("y"), entry("x", log=True)], [entry("y"), entry("x", log="0")],
        [entry("y"), entry("x")], [entry("x"), entry("y", log=0), entry("x")],
        [entry("y"), entry("y"), entry("x", a=1)],
        [entry("x") | {"more": 1}],
        [entry("0"), *(entry(str(number), log=number - 1) for number in range(1, 3_000))],
    ],
    ids=lambda artefacts: str(artefacts)[:60],
)
def test_what_is_no_lineage(tmp_path, artefacts: object) -> None:
    path = lineage_of(tmp_path / "pairs.parquet")
    path.write_text(json.dumps({"artefacts": artefacts}))
    with pytest.raises(StaleInput, match=r"pairs.lineage.json cannot be understood"):
        Lineage.read(path, stage="prepare")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"artefacts": [], "more": 1}', "[" * 10_000])
def test_a_file_that_is_no_lineage(tmp_path, text: str) -> None:
    path = lineage_of(tmp_path / "pairs.parquet")
    path.write_text(text)
    with pytest.raises(StaleInput, match=r"pairs.lineage.json cannot be understood"):
        Lineage.read(path, stage="prepare")


def test_a_folder_is_recorded_with_all_its_files_or_with_some(tmp_path) -> None:
    folder = tmp_path / "graph"
    (folder / "deep").mkdir(parents=True)
    for name in ("nodes", "deep/edges"):
        (folder / name).write_text(name)
    made = Lineage.record("graph", folder, settings={"a": 1})
    assert set(made.files) == {"graph/nodes", "graph/deep/edges"}
    assert Lineage.read(tmp_path / "graph.lineage.json", stage="prepare") == made
    assert set(Lineage.record("graph", folder, files=[folder / "nodes"]).files) == {"graph/nodes"}
    (folder / "deep" / "edges").unlink()
    read = Lineage.read(lineage_of(folder), stage="prepare")
    assert read.files == {"graph/nodes": made.files["graph/nodes"]}
