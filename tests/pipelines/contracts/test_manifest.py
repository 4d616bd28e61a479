import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.contracts.durable import sha256_of
from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.sealed import write_sealed
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.windows import Windows
from tests.lineages import invented_ranker

AS_OF = datetime(2011, 7, 1, tzinfo=UTC)
WINDOWS = Windows.from_dict(
    {
        "pretrain": ["2010-12-01", "2011-04-01"],
        "finetune": ["2011-04-01", "2011-07-01"],
        "validation": ["2011-07-01", "2011-09-05"],
        "test": ["2011-09-05", "2011-10-10"],
    }
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A manifest written into `tmp_path`, with one file."""
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "item.kge.parquet"
    path.write_bytes(b"rows")
    spec = TableSpec("item.kge", 8, 2, "int4", "vocabulary", "00" * 8)
    made = Manifest(
        version=4, dataset="shop", created_at=AS_OF, as_of=AS_OF, windows=WINDOWS, parents=(2, 3), tables=(spec,),
        lineage=invented_ranker(dataset="shop", windows=WINDOWS, tasks=["purchase"]),
        metrics={"auc": {"purchase": 0.71}}, files={"tables/item.kge.parquet": sha256_of(path)},
    )
    made.write(tmp_path)
    return made


def test_what_is_read_is_what_was_written(tmp_path: Path, manifest: Manifest) -> None:
    read = Manifest.read(tmp_path, version=4)
    assert read == manifest and read.sha256 == manifest.sha256 == (tmp_path / "manifest.sha256").read_text().strip()
    read.verify(tmp_path)


def test_its_name_depends_on_everything_in_it(manifest: Manifest) -> None:
    others = [replace(manifest, version=5), replace(manifest, metrics={}), replace(manifest, files={})]
    others.append(replace(manifest, lineage=invented_ranker(dataset="shop", windows=WINDOWS, tasks=["buy"])))
    assert len({manifest.sha256, *(other.sha256 for other in others)}) == 5


def test_a_table_by_name(manifest: Manifest) -> None:
    assert manifest.table("item.kge").view_name(4) == "item_kge__v4"
    with pytest.raises(VersionNotFound, match=r"user\.kge"):
        manifest.table("user.kge")


@pytest.mark.parametrize("change", ["flip", "cut", "no seal"])
def test_an_altered_manifest_is_refused_by_name(tmp_path: Path, manifest: Manifest, change: str) -> None:
    path, seal = tmp_path / "manifest.json", tmp_path / "manifest.sha256"
    text = path.read_text()
    if change == "no seal":
        seal.unlink()
    else:
        altered = {"flip": text.replace("shop", "shoq"), "cut": text[:-1]}.get(change, text.replace(": 1,", ": 99,", 1))
        path.write_text(altered)
    if change == "other format":
        seal.write_text(sha256_of(path))
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        Manifest.read(tmp_path, version=4)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 1), ("format", 3), ("format", None), ("parents", 3), ("tables", [{}]), ("as_of", "soon")],
)
def test_a_sealed_manifest_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, manifest: Manifest, key: str, value: object
) -> None:
    write_sealed(tmp_path / "manifest.json", json.dumps({**json.loads(manifest.to_json()), key: value}))
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be understood: expected a manifest of format 2"):
        Manifest.read(tmp_path, version=4)


def test_an_altered_or_missing_file_is_named(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / "tables" / "item.kge.parquet"
    path.write_bytes(b"ro")
    with pytest.raises(IntegrityError, match=r"item\.kge\.parquet is corrupted.*Restore the file"):
        manifest.verify(tmp_path)
    path.unlink()
    with pytest.raises(IntegrityError, match="no file"):
        manifest.verify(tmp_path, only=("tables/item.kge.parquet",))
    manifest.verify(tmp_path, only=())


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"version": "4"}, {"version": 4.0}, {"version": True}, {"version": 2**70}, {"parents": [4]},
        {"parents": [0]}, {"parents": [2, 2]}, {"parents": ["2"]}, {"parents": 2}, {"tables": {}}, {"tables": [[]]},
        {"as_of": "2011-07-01"}, {"as_of": 5}, {"created_at": None}, {"files": []}, {"files": {"a": 1}},
        {"files": {"a": "ab"}}, {"files": {"../a": "ab" * 32}}, {"files": {"/a": "ab" * 32}},
        {"files": {"a/../b": "ab" * 32}}, {"files": {"": "ab" * 32}}, {"metrics": []}, {"more": 1}, {"dataset": None},
        {"windows": {}}, {"lineage": {}}, {"lineage": {"artefacts": []}}, {"lineage": None},
        {"lineage": {"artefacts": [{"what": "x", "files": {"a": "b"}, "settings": {}, "inputs": {}}]}},
    ],
    ids=str,
)
def test_a_sealed_manifest_whose_values_do_not_fit_is_refused(
    tmp_path: Path, manifest: Manifest, change: dict
) -> None:
    write_sealed(tmp_path / "manifest.json", json.dumps({**json.loads(manifest.to_json()), **change}))
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be understood"):
        Manifest.read(tmp_path, version=4)


@pytest.mark.parametrize("key", ["version", "tables", "files", "as_of", "format", "lineage"])
def test_a_sealed_manifest_that_lacks_something_is_refused(tmp_path: Path, manifest: Manifest, key: str) -> None:
    raw = json.loads(manifest.to_json())
    del raw[key]
    write_sealed(tmp_path / "manifest.json", json.dumps(raw))
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be understood"):
        Manifest.read(tmp_path, version=4)


def test_two_tables_of_one_name_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    write_sealed(tmp_path / "manifest.json", json.dumps({**raw, "tables": 2 * raw["tables"]}))
    with pytest.raises(IntegrityError, match="distinct tables"):
        Manifest.read(tmp_path, version=4)


def test_a_file_is_read_if_it_is_the_published_one(tmp_path: Path, manifest: Manifest) -> None:
    name = "tables/item.kge.parquet"
    assert manifest.read_file(tmp_path, name) == b"rows"
    with manifest.open_file(tmp_path, name) as file:
        assert file.read() == b"rows"
    (tmp_path / "other").write_bytes(b"rows")
    with pytest.raises(IntegrityError, match="of a file of this version"):
        manifest.read_file(tmp_path, "other")
    (tmp_path / name).write_bytes(b"wors")
    with pytest.raises(IntegrityError, match="is corrupted"):
        manifest.read_file(tmp_path, name)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(VersionNotFound, match="facet versions"):
        Manifest.read(tmp_path, version=4)


def test_the_tags_of_a_view_lead_back_to_its_table(manifest: Manifest) -> None:
    view = EmbeddingView.of(manifest, manifest.table("item.kge"))
    tags = view.tags(manifest)
    assert EmbeddingView.from_tags(tags) == view == EmbeddingView(4, "item.kge", manifest.sha256, AS_OF)
    assert (tags["quantization"], tags["dim"], tags["data_window"]) == ("int4", "8", "2010-12-01..2011-07-01")
    with pytest.raises(IntegrityError, match="feast apply"):
        EmbeddingView.from_tags({"manifest_sha256": manifest.sha256})
