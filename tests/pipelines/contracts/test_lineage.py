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


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", json.dumps({"what": 1, "files": {}, "settings": {}, "inputs": {}}),
        json.dumps({"what": "x", "files": {}, "settings": {}, "inputs": {"log": {"what": "y"}}}),
    ],
)
def test_what_is_no_lineage(tmp_path, text: str) -> None:
    path = lineage_of(tmp_path / "pairs.parquet")
    path.write_text(text)
    with pytest.raises(StaleInput, match=r"pairs.lineage.json cannot be understood"):
        Lineage.read(path, stage="prepare")
