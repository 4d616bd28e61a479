import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from feast import FeatureStore

from pipelines.audit import WAYS, _most_by_chance, audit
from pipelines.cli import facet
from pipelines.contracts.durable import sha256_of
from pipelines.contracts.errors import IntegrityError, NotPrepared, VersionNotFound
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.row_store import RowReader, SegmentRows
from pipelines.contracts.sealed import write_sealed
from pipelines.contracts.segment import Segment
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import write_table_file
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from tests.redis_server import RedisServer
from tests.releases import AS_OF, FeastRepository, entity_ids, published_rows, write_release

TABLE = "item.kge"
IDS = entity_ids("item", 200)


def forge(segment: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the stored rows (uint8 (N, row_bytes + 2)) and make the segment's own header agree.

    Only a comparison with the version can tell.
    """
    rows = np.load(segment / "rows.npy")
    change(rows)
    for path in segment.iterdir():
        path.chmod(0o644)
    np.save(segment / "rows.npy", rows)
    header = json.loads((segment / "segment.json").read_text())
    header["files"]["rows.npy"] = sha256_of(segment / "rows.npy")
    write_sealed(segment / "segment.json", json.dumps(header))


def place(workspace: Workspace, wanted: int) -> int:
    """Row of an id of `TABLE` in its segment of version 1."""
    return int(Segment.open(workspace.segment(1, TABLE)).positions(np.array([wanted]))[0])


def command(workspace: Workspace, *options: str) -> Result:
    return CliRunner().invoke(facet, ["--workspace", str(workspace.root), "audit", "--version", "1", *options])


def materialize(repository: FeastRepository, version: int) -> None:
    repository.materialize([spec.view_name(version) for spec in repository.workspace.versions.manifest(version).tables])


@pytest.mark.parametrize("version", [1, 2])
def test_every_way_gives_the_published_bytes(own_workspace: FeastRepository, version: int) -> None:
    report = audit(own_workspace.workspace, version)
    assert (report["rows_checked"], report["rows_different"], report["problems"]) == (800, 0, [])
    for table in report["tables"].values():
        assert set(table["sha256"]) == {"published", *WAYS} and len(set(table["sha256"].values())) == 1
        assert table["unknown_ids"]["asked"] >= 500 and table["unknown_ids"]["passed_for_known"] <= 2
    assert json.loads((own_workspace.workspace.root / "audit" / f"{version}.json").read_text()) == report


def test_one_wrong_row_is_found_and_named(own_workspace: FeastRepository) -> None:
    workspace, wrong = own_workspace.workspace, int(IDS[123])
    at = place(workspace, wrong)

    def flip(rows: np.ndarray) -> None:
        rows[at, 0] ^= 1

    forge(workspace.segment(1, TABLE), flip)
    report = audit(workspace, 1)
    table = report["tables"][TABLE]
    assert (report["rows_checked"], report["rows_different"]) == (800, 1)
    assert table["first_different"] == {way: [wrong] for way in ("segment", "lookup", "online")}
    assert table["sha256"]["offline"] == table["sha256"]["published"] != table["sha256"]["online"]
    result = command(workspace)
    assert result.exit_code == 1
    assert "800 rows checked, 1 different" in result.output and "not served as it was published" in result.output
    assert f"{TABLE}: online gives other bytes than were published, or none, for 1 rows, ids [{wrong}]" in result.output


def test_two_rows_that_changed_places_are_found(own_workspace: FeastRepository) -> None:
    workspace, wrong = own_workspace.workspace, [int(IDS[3]), int(IDS[170])]
    places = [place(workspace, each) for each in wrong]

    def swap(rows: np.ndarray) -> None:
        rows[places, :-2] = rows[places[::-1], :-2]

    forge(workspace.segment(1, TABLE), swap)
    table = audit(workspace, 1)["tables"][TABLE]
    assert table["rows_different"] == 2 and table["first_different"]["segment"] == wrong


def test_an_id_that_a_segment_lacks_counts_as_different_and_its_row_as_unreached(
    own_workspace: FeastRepository,
) -> None:
    workspace, missing = own_workspace.workspace, int(IDS[-1])
    at = place(workspace, missing)

    def forget(rows: np.ndarray) -> None:
        rows[at, -1] ^= 1  # of the fingerprint

    forge(workspace.segment(1, TABLE), forget)
    table = audit(workspace, 1)["tables"][TABLE]
    assert table["rows_different"] == 1
    assert table["first_different"] == {way: [missing] for way in ("segment", "lookup", "online")}
    assert "1 rows of the segment are reached by no id" in table["problems"]


@pytest.mark.parametrize("row", [0, 10, 199])
def test_ids_that_share_a_row_leave_one_unreached(
    own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    positions = Segment.positions

    def one_for_another(segment: Segment, ids: np.ndarray) -> np.ndarray:
        found = positions(segment, ids)
        return np.where(found == row, 11, found)

    monkeypatch.setattr(Segment, "positions", one_for_another)
    table = audit(own_workspace.workspace, 1)["tables"][TABLE]
    assert "1 rows of the segment are reached by no id" in table["problems"]


def offline_reads(repository: FeastRepository, change: Callable[[pa.Table], pa.Table]) -> None:
    """Let Feast's offline store read an altered copy of the table's file."""
    store = repository.store()
    view = store.get_feature_view("item_kge__v1")
    table = pq.read_table(view.batch_source.path)
    other = repository.root / "other.parquet"
    pq.write_table(change(table), other)
    proto = view.to_proto()
    proto.spec.batch_source.file_options.uri = str(other)
    store.registry.apply_feature_view(type(view).from_proto(proto), store.project)
    store.registry.commit()


def other_row(table: pa.Table) -> pa.Table:
    rows = table["row"].to_pylist()
    rows[50] = bytes(10)
    return table.set_column(1, "row", pa.array(rows, pa.binary(10)))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (other_row, IDS[50]),
        (lambda table: pa.concat_tables([table.slice(0, 60), table.slice(61)]), IDS[60]),
    ],
    ids=["other bytes", "no row"],
)
def test_what_only_the_offline_store_has_wrong(
    own_workspace: FeastRepository, change: Callable[[pa.Table], pa.Table], wrong: int
) -> None:
    offline_reads(own_workspace, change)
    table = audit(own_workspace.workspace, 1)["tables"][TABLE]
    assert table["first_different"] == {"offline": [int(wrong)]} and table["rows_different"] == 1


def test_an_id_that_the_offline_store_answers_twice(
    own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = FeatureStore.get_historical_features

    def answer_one_twice(store: FeatureStore, *, features: list[str], **asked: Any) -> Any:
        answer = ask(store, features=features, **asked).to_arrow()
        if features == ["item_kge__v1:row"]:
            answer = pa.concat_tables([answer, answer.filter(pc.equal(answer["item"], IDS[60]))])
        return SimpleNamespace(to_arrow=lambda: answer)

    monkeypatch.setattr(FeatureStore, "get_historical_features", answer_one_twice)
    report = audit(own_workspace.workspace, 1)
    assert report["tables"][TABLE]["first_different"] == {"offline": [int(IDS[60])]} and report["rows_different"] == 1


def test_no_view_is_left(own_workspace: FeastRepository) -> None:
    def left() -> list[tuple[str]]:
        views = "SELECT view_name FROM duckdb_views() WHERE temporary AND NOT internal ORDER BY view_name"
        return ibis.get_backend().con.execute(views).fetchall()

    before = left()
    audit(own_workspace.workspace, 1, sample=20)
    assert left() == before


def test_a_view_of_another_manifest(own_workspace: FeastRepository) -> None:
    store = own_workspace.store()
    view = store.get_feature_view("item_kge__v1")
    view.tags["manifest_sha256"] = "0" * 64
    store.registry.apply_feature_view(view, store.project)
    store.registry.commit()
    with pytest.raises(IntegrityError, match=r"feature view item_kge__v1: expected tags of manifest .*feast apply"):
        audit(own_workspace.workspace, 1)


def test_rows_that_only_the_offline_store_has(own_workspace: FeastRepository) -> None:
    gaps = np.setdiff1d(IDS + 1, IDS)  # what the audit asks for, among others

    def with_more(table: pa.Table) -> pa.Table:
        more = table.slice(0, len(gaps))
        return pa.concat_tables([table, more.set_column(0, "id", pa.array(gaps))])

    offline_reads(own_workspace, with_more)
    problems = audit(own_workspace.workspace, 1)["problems"]
    assert any(re.search(r"offline, .* have rows", problem) for problem in problems)


def test_what_only_feast_has_wrong_online(own_workspace: FeastRepository, tmp_path: Path) -> None:
    workspace, wrong = own_workspace.workspace, int(IDS[7])
    shutil.copytree(workspace.segments, tmp_path / "segments")
    at = place(workspace, wrong)

    def flip(rows: np.ndarray) -> None:
        rows[at, 3] ^= 128

    forge(workspace.segment(1, TABLE), flip)
    table = audit(workspace, 1, rows=SegmentRows(Workspace(tmp_path)))["tables"][TABLE]
    assert table["first_different"] == {"online": [wrong]}


@dataclass
class Tampered:
    """Segments, and for `TABLE` a reader that answers otherwise: a `RowStore` that a test hands to the audit."""

    workspace: Workspace
    change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # ids, rows, found
    says: dict[str, Any] = field(default_factory=dict)  # what the reader tells of itself, where it is not the truth

    def describe(self, version: int, table: str) -> str:
        return f"tampered {table} of version {version}"

    def open(self, version: int, table: str) -> RowReader:
        segment, change = SegmentRows(self.workspace).open(version, table), self.change
        if table != TABLE:
            return segment

        class Reader:
            spec, version, manifest_sha256 = segment.spec, segment.version, segment.manifest_sha256

            def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                rows, found = segment.lookup(ids)
                change(ids, rows, found)
                return rows, found

        reader = Reader()
        vars(reader).update(self.says)
        return reader

    check = open


def test_a_row_that_a_reader_gives_and_calls_unknown(own_workspace: FeastRepository) -> None:
    def disown(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        found[ids == IDS[5]] = False

    table = audit(own_workspace.workspace, 1, rows=Tampered(own_workspace.workspace, disown))["tables"][TABLE]
    assert table["first_different"] == {"lookup": [int(IDS[5])]} and table["rows_different"] == 1


def test_a_reader_that_forgets_whose_row_is_whose(own_workspace: FeastRepository) -> None:
    def sort(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        order = np.argsort(ids)
        rows[:], found[:] = rows[order], found[order]

    table = audit(own_workspace.workspace, 1, rows=Tampered(own_workspace.workspace, sort))["tables"][TABLE]
    assert "segment" not in table["sha256"] and set(table["first_different"]) == {"lookup"}
    assert table["rows_different"] > 150


def pass_for_known(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
    found[:] |= ids % 3 == 0


def zero_default(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
    rows[~found] = 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (pass_for_known, "pass for known; by chance it would be 13 at most"),
        (pass_for_known, "online, .* answered otherwise than by lookup"),
        (zero_default, "get neither the default row nor their bucket's"),
    ],
)
def test_unknown_ids_that_are_answered_wrongly(
    own_workspace: FeastRepository, change: Callable[..., None], problem: str
) -> None:
    report = audit(own_workspace.workspace, 1, rows=Tampered(own_workspace.workspace, change))
    assert report["rows_different"] == 0
    assert any(re.search(problem, each) for each in report["problems"]), report["problems"]


@pytest.mark.parametrize("expected", [0.02, 1.0, 16.0, 900.0])
def test_the_bound_on_bad_luck_is_one(expected: float) -> None:
    """The tail of Poisson's law beyond it, which is that of many rare independent events."""
    most = _most_by_chance(expected)
    tail = sum(math.exp(k * math.log(expected) - expected - math.lgamma(k + 1)) for k in range(most + 1, most + 500))
    assert tail < 1e-9 and most < 5 * expected + 30


def test_a_sample(own_workspace: FeastRepository) -> None:
    report = audit(own_workspace.workspace, 1, sample=30)
    assert (report["rows_checked"], report["rows_different"], report["sample"]) == (120, 0, 30)
    result = command(own_workspace.workspace, "--sample", "30")
    assert result.exit_code == 0 and "120 rows checked, 0 different" in result.output


def test_a_sample_finds_what_it_contains(own_workspace: FeastRepository) -> None:
    def flip(rows: np.ndarray) -> None:
        rows[:, 0] ^= 1

    forge(own_workspace.workspace.segment(1, TABLE), flip)
    report = audit(own_workspace.workspace, 1, sample=20)
    assert report["rows_different"] == 20 and len(report["tables"][TABLE]["first_different"]["lookup"]) == 10


RULES = [IdRule("vocabulary+buckets", 40, seed=3), IdRule("hash", 40, seed=3)]


@pytest.fixture(params=RULES, ids=[rule.name for rule in RULES])
def bucketed(request: pytest.FixtureRequest, own_workspace: FeastRepository, tmp_path: Path) -> FeastRepository:
    """Version 3, whose table has hash buckets."""
    rule, release = request.param, write_release(tmp_path / "third", seed=3)
    content = json.loads((release / "release.json").read_text())
    spec = TableSpec(**next(table for table in content["tables"] if table["name"] == TABLE))
    kept = IDS if rule.name != "hash" else IDS[:0]
    ids = np.concatenate([rule.all_bucket_ids(), kept])
    path = release / "tables" / f"{TABLE}.parquet"
    packed = np.random.default_rng(5).integers(0, 64, (len(ids), spec.row_bytes), np.uint8)  # finite as fp16
    path.unlink()
    write_table_file(path, [(ids, packed)], row_bytes=spec.row_bytes, as_of=AS_OF)
    for table in content["tables"]:
        if table["name"] == TABLE:
            table |= {"rows": len(ids), "id_rule": rule.name, "buckets": rule.buckets, "hash_seed": rule.seed}
    (release / "release.json").write_text(json.dumps(content))
    publish(own_workspace.workspace, release)
    own_workspace.apply()
    materialize(own_workspace, 3)
    return own_workspace


def table_spec(bucketed: FeastRepository) -> TableSpec:
    return bucketed.workspace.versions.manifest(3).table(TABLE)


def test_hash_buckets_are_audited_with_the_rest(bucketed: FeastRepository) -> None:
    report = audit(bucketed.workspace, 3)
    table = report["tables"][TABLE]
    assert report["problems"] == []
    assert table["rows_checked"] == {"vocabulary+buckets": 240, "hash": 40}[table_spec(bucketed).id_rule]
    assert table["unknown_ids"]["asked"] > 300 and len(set(table["sha256"].values())) == 1


def test_an_unknown_id_that_reads_another_bucket(bucketed: FeastRepository) -> None:
    def neighbour(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        strange = ~np.isin(ids, published_rows(bucketed.workspace, 3, TABLE)[0])
        rows[strange] ^= 1

    report = audit(bucketed.workspace, 3, rows=Tampered(bucketed.workspace, neighbour))
    assert report["rows_different"] == 0
    noticed = {"vocabulary+buckets": "pass for known", "hash": "nor their bucket's"}[table_spec(bucketed).id_rule]
    assert [problem for problem in report["problems"] if noticed in problem], report["problems"]


def test_an_unknown_id_that_only_feast_knows(bucketed: FeastRepository) -> None:
    def disown(ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        found[~np.isin(ids, published_rows(bucketed.workspace, 3, TABLE)[0])] = False

    report = audit(bucketed.workspace, 3, rows=Tampered(bucketed.workspace, disown))
    assert any(re.search("online, .* answered otherwise than by lookup", each) for each in report["problems"])


def test_a_table_without_rows(own_workspace: FeastRepository, tmp_path: Path) -> None:
    release = write_release(tmp_path / "third", seed=3)
    path = release / "tables" / f"{TABLE}.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    content = json.loads((release / "release.json").read_text())
    next(table for table in content["tables"] if table["name"] == TABLE)["rows"] = 0
    (release / "release.json").write_text(json.dumps(content))
    publish(own_workspace.workspace, release)
    own_workspace.apply()
    materialize(own_workspace, 3)
    report = audit(own_workspace.workspace, 3)
    assert (report["rows_checked"], report["problems"]) == (600, [])
    assert report["tables"][TABLE]["unknown_ids"]["asked"] > 300


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def test_rows_in_redis(own_workspace: FeastRepository, server: RedisServer) -> None:
    path = own_workspace.path / "feature_store.yaml"
    path.write_text(path.read_text().replace("rows: segments", f"rows: {server.url}"))
    workspace = own_workspace.workspace
    shutil.rmtree(workspace.segments)
    materialize(own_workspace, 1)
    report = audit(workspace, 1)
    assert (report["rows_checked"], report["problems"]) == (800, [])
    for table in report["tables"].values():
        assert set(table["sha256"]) == {"published", "lookup", "online", "offline"}
        assert len(set(table["sha256"].values())) == 1 and table["unknown_ids"]["passed_for_known"] == 0
    client = server.client()
    key = next(key for key in client.scan_iter("{item.kge@1:*") if len(client.get(key)) > 40)
    value = bytearray(client.get(key))
    value[10] ^= 1
    client.set(key, bytes(value))
    for sample in (None, 200):
        with pytest.raises(IntegrityError, match=r"item\.kge"):
            audit(workspace, 1, sample=sample)


def test_an_unknown_version(own_workspace: FeastRepository) -> None:
    with pytest.raises(VersionNotFound, match="version 9"):
        audit(own_workspace.workspace, 9)


def test_a_corrupted_version_file(own_workspace: FeastRepository) -> None:
    with (own_workspace.workspace.versions.path(1) / "upper" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"versions/1/upper/config\.json"):
        audit(own_workspace.workspace, 1)


@pytest.mark.parametrize("difference", ["manifest_sha256", "spec"])
def test_a_table_of_another_manifest(own_workspace: FeastRepository, difference: str) -> None:
    """Each difference alone: the same table under another manifest, and another table under the same."""
    workspace = own_workspace.workspace
    spec = workspace.versions.manifest(1).table(TABLE)
    other = {"manifest_sha256": "0" * 64, "spec": replace(spec, default_row="00" * spec.row_bytes)}[difference]
    rows = Tampered(workspace, lambda ids, rows, found: None, {difference: other})
    with pytest.raises(IntegrityError, match=workspace.versions.manifest(1).sha256):
        audit(workspace, 1, rows=rows)


def test_a_segment_of_another_version(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    shutil.rmtree(workspace.segment(1, TABLE))
    shutil.copytree(workspace.segment(2, TABLE), workspace.segment(1, TABLE))
    with pytest.raises(IntegrityError, match=r"expected table item\.kge of version 1, got item\.kge of version 2"):
        audit(workspace, 1)


def test_a_version_that_is_not_materialized(own_workspace: FeastRepository, tmp_path: Path) -> None:
    publish(own_workspace.workspace, write_release(tmp_path / "third", seed=3))
    with pytest.raises(VersionNotFound, match="feast materialize"):
        audit(own_workspace.workspace, 3)


def test_a_version_that_is_not_applied(own_workspace: FeastRepository, tmp_path: Path) -> None:
    publish(own_workspace.workspace, write_release(tmp_path / "third", seed=3))
    own_workspace.apply()
    materialize(own_workspace, 3)
    store = own_workspace.store()
    store.registry.delete_feature_view("user_kge__v3", store.project)
    with pytest.raises(NotPrepared, match="feast apply"):
        audit(own_workspace.workspace, 3)
