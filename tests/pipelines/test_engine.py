import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from online.lookup.reader import VersionReader
from pipelines import engine
from pipelines.contracts.durable import remove_directory
from pipelines.contracts.errors import (
    IntegrityError,
    InvalidConfig,
    NotPrepared,
    VersionConflict,
    VersionInUse,
    VersionNotFound,
)
from pipelines.contracts.segment import Segment
from pipelines.publish import publish
from pipelines.retire import retire
from tests.crash import kill_during, materialize_repository, require_served
from tests.releases import AS_OF, DIMS, WIDE_RANGE, FeastRepository, entity_ids, published_rows, write_release

VIEWS_2 = [f"{table.replace('.', '_')}__v2" for table in DIMS]


def first_row(repository: FeastRepository, version: int) -> bytes | None:
    """What `get_online_features` answers for the first item of `item.kge`."""
    ids = entity_ids("item", 200)[:1].tolist()
    answer = repository.store().get_online_features(features=[f"item_kge__v{version}:row"], entity_rows={"item": ids})
    return answer.to_dict()["row"][0]


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_materializing_again_verifies_and_writes_nothing(own_workspace: FeastRepository) -> None:
    rows = own_workspace.workspace.segment(1, "item.kge") / "rows.npy"
    before = rows.stat()
    own_workspace.materialize(["item_kge__v1"])
    assert (rows.stat().st_ino, rows.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("days", [("2010-01-01", "2011-06-30"), ("2011-07-02", "2030-01-01")])
def test_a_range_that_leaves_a_version_out_is_an_error_and_the_views_that_fit_are_written(
    own_workspace: FeastRepository, days: tuple[str, str]
) -> None:
    for table in ("item.kge", "item.contrastive"):
        remove_directory(own_workspace.workspace.segment(1, table), within=own_workspace.workspace.segments)
    start, end = (datetime.fromisoformat(day).replace(tzinfo=UTC) for day in days)
    with pytest.raises(InvalidConfig) as refused:
        own_workspace.store().materialize(
            start, end, feature_views=["item_kge__v1", "item_contrastive__v1", "item_context"]
        )
    assert str(refused.value) == (
        "item_kge__v1: version 1 is not materialized: expected a range around its rows' time 2011-07-01T00:00:00, "
        f"got {days[0]}T00:00:00 to {days[1]}T00:00:00. "
        "Run `feast materialize --views item_kge__v1 2011-07-01T00:00:00 2011-07-01T00:00:00`, or give a wider range."
    )
    assert not own_workspace.workspace.segment(1, "item.kge").exists()
    store = own_workspace.store()
    assert (start, end) in store.get_feature_view("item_context").materialization_intervals
    assert (start, end) not in store.get_feature_view("item_kge__v1").materialization_intervals


def test_a_range_that_leaves_one_version_out_writes_the_other(own_workspace: FeastRepository) -> None:
    for version in (1, 2):
        remove_directory(
                own_workspace.workspace.segment(version, "item.kge"), within=own_workspace.workspace.segments
            )
    with pytest.raises(InvalidConfig, match="item_kge__v1: version 1 is not materialized"):
        own_workspace.store().materialize(
            AS_OF + timedelta(days=1), WIDE_RANGE[1], feature_views=["item_kge__v1", "item_kge__v2"]
        )
    assert not own_workspace.workspace.segment(1, "item.kge").exists()
    assert first_row(own_workspace, 2) == published_rows(own_workspace.workspace, 2, "item.kge")[1][0].tobytes()


def test_a_range_may_leave_out_versions_that_are_materialized(own_workspace: FeastRepository) -> None:
    """As every day's range leaves out the versions of before; not even their bytes are read."""
    corrupt(own_workspace.workspace.segment(1, "item.kge") / "rows.npy")
    own_workspace.store().materialize(AS_OF - timedelta(days=9), AS_OF - timedelta(days=8))


def test_the_versions_time_itself_is_inside_the_range(own_workspace: FeastRepository) -> None:
    remove_directory(own_workspace.workspace.segment(1, "item.kge"), within=own_workspace.workspace.segments)
    own_workspace.store().materialize(AS_OF, AS_OF, feature_views=["item_kge__v1"])
    assert Segment.open(own_workspace.workspace.segment(1, "item.kge")).spec.rows == 200


def test_a_corrupted_version_file_is_refused_by_name_and_the_last_good_version_serves(
    own_workspace: FeastRepository,
) -> None:
    workspace = own_workspace.workspace
    for table in DIMS:
        remove_directory(workspace.segment(2, table), within=workspace.segments)
    corrupt(workspace.versions.path(2) / "tables" / "item.kge.parquet")
    with pytest.raises(IntegrityError, match=r"versions/2/tables/item\.kge\.parquet is corrupted"):
        own_workspace.materialize(["item_kge__v2"])
    assert not workspace.segment(2, "item.kge").exists() and not list((workspace.segments / "2").glob("*"))
    assert first_row(own_workspace, 1) == published_rows(workspace, 1, "item.kge")[1][0].tobytes()


def test_a_corrupted_manifest_stops_apply_and_nothing_changes(own_workspace: FeastRepository) -> None:
    corrupt(own_workspace.workspace.versions.path(2) / "manifest.json")
    with pytest.raises(IntegrityError, match=r"versions/2/manifest\.json is corrupted"):
        own_workspace.apply()
    with pytest.raises(IntegrityError, match=r"versions/2/manifest\.json is corrupted"):
        own_workspace.materialize(["item_kge__v2"])
    assert first_row(own_workspace, 1) is not None and first_row(own_workspace, 2) is not None


def test_a_version_is_held_while_it_is_materialized(
    own_workspace: FeastRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, refused = own_workspace.workspace, 0
    remove_directory(workspace.segment(1, "item.kge"), within=workspace.segments)

    def open_while_somebody_retires(file: BinaryIO, original=engine.open_table_file) -> pq.ParquetFile:
        nonlocal refused
        with pytest.raises(VersionInUse, match=rf"materialize \(pid {os.getpid()}"):
            retire(workspace, 1)
        refused += 1
        return original(file)

    monkeypatch.setattr(engine, "open_table_file", open_while_somebody_retires)
    own_workspace.materialize(["item_kge__v1"])
    assert refused == 1
    require_served(workspace, 1)
    assert workspace.versions.holders(1) == []
    retire(workspace, 1)


def test_a_version_that_is_gone(own_workspace: FeastRepository) -> None:
    own_workspace.workspace.versions.point_to(1)
    own_workspace.workspace.versions.retire(2)
    with pytest.raises(VersionNotFound, match=r"version 2: expected one of \[1\]"):
        own_workspace.materialize(["item_kge__v2"])


def test_a_manifest_that_is_lost_is_no_retirement(own_workspace: FeastRepository) -> None:
    (own_workspace.workspace.versions.path(2) / "manifest.json").unlink()
    for refused in (own_workspace.apply, own_workspace.materialize):
        with pytest.raises(IntegrityError, match=r"versions/2/manifest\.json is missing"):
            refused()
    assert first_row(own_workspace, 2) is not None


def test_a_version_that_is_not_the_one_that_was_applied(own_workspace: FeastRepository, tmp_path: Path) -> None:
    versions, manifest = own_workspace.workspace.versions, own_workspace.workspace.versions.manifest(2)
    changed = manifest.__class__(**{**manifest.__dict__, "metrics": {"auc": 1.0}})
    changed.write(versions.path(2))
    with pytest.raises(IntegrityError, match="feast apply"):
        own_workspace.materialize(["item_kge__v2"])
    own_workspace.apply()
    with pytest.raises(VersionConflict, match=r"delete it and materialize again"):
        own_workspace.materialize(["item_kge__v2"])


def test_a_damaged_segment_is_not_taken_for_materialized(own_workspace: FeastRepository) -> None:
    corrupt(own_workspace.workspace.segment(2, "item.kge") / "rows.npy")
    with pytest.raises(IntegrityError, match=r"item\.kge/rows\.npy"):
        own_workspace.materialize(["item_kge__v2"])


def test_segments_that_cannot_be_written(own_workspace: FeastRepository) -> None:
    workspace = own_workspace.workspace
    for version in (1, 2):
        remove_directory(workspace.segments / str(version), within=workspace.segments)
    workspace.segments.rmdir()
    workspace.segments.write_text("not a directory")
    with pytest.raises(InvalidConfig, match="cannot write to"):
        own_workspace.materialize(["item_kge__v1"])


def test_ordinary_views_keep_every_row(own_workspace: FeastRepository) -> None:
    """More rows than one record batch and one write batch hold, in a Parquet file of many row groups."""
    count, workspace = 12_345, own_workspace.workspace
    numbers = pa.array(np.arange(count, dtype=np.float64))
    features = dict.fromkeys(("events_7d", "events_30d", "active_days_30d", "first_event"), numbers)
    stamps = pa.array([AS_OF] * count, pa.timestamp("us", tz="UTC"))
    table = pa.table({"item": pa.array(np.arange(count)), "event_timestamp": stamps, **features})
    pq.write_table(table, workspace.views / "item_context.parquet", row_group_size=1_000)
    context = workspace.root / "feast" / "context.db"
    with sqlite3.connect(context) as database:
        database.execute("DELETE FROM facet_item_context")
    own_workspace.materialize(["item_context"])
    with sqlite3.connect(context) as database:
        rows = database.execute("SELECT count(DISTINCT entity_key), count(*) FROM facet_item_context").fetchone()
    assert rows == (count, 4 * count)
    ids = [0, 9_999, 10_000, 10_001, count - 1, count]
    answer = own_workspace.store().get_online_features(features=["item_context:events_7d"], entity_rows={"item": ids})
    assert answer.to_dict()["events_7d"] == [*map(float, ids[:-1]), None]


def test_a_missing_context_file_is_an_error(own_workspace: FeastRepository) -> None:
    (own_workspace.workspace.views / "user_context.parquet").unlink()
    with pytest.raises(NotPrepared, match=r"user_context\.parquet, got no file\. Run `facet prepare`"):
        own_workspace.materialize(["user_context"])


@pytest.fixture(scope="module")
def large_repository(workspace_with_versions: FeastRepository, tmp_path_factory: pytest.TempPathFactory):
    """Version 1 small and materialized, version 2 large and only applied."""
    root = tmp_path_factory.mktemp("large")
    repository = FeastRepository.create(root)
    publish(repository.workspace, write_release(root / "first", seed=1))
    publish(repository.workspace, write_release(root / "second", seed=2, rows=150_000))
    repository.apply()
    repository.materialize([view.replace("__v2", "__v1") for view in VIEWS_2])
    return repository


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_materializing_killed_at_any_instant(large_repository: FeastRepository, seed: int) -> None:
    workspace = large_repository.workspace
    remove_directory(workspace.segments / "2", within=workspace.segments)
    kill_during(materialize_repository, large_repository.root, VIEWS_2, between_s=(0.0, 0.45), seed=seed)
    assert first_row(large_repository, 1) == published_rows(workspace, 1, "item.kge")[1][0].tobytes()
    for table in DIMS:
        if workspace.segment(2, table).exists():
            assert Segment.open(workspace.segment(2, table)).spec.rows == 150_000
    large_repository.materialize(VIEWS_2)
    reader = VersionReader.open(workspace, 2)
    ids, rows = published_rows(workspace, 2, "item.kge")
    answer, found = reader.lookup("item.kge", ids)
    assert found.all() and np.array_equal(answer, rows)
    assert not list((workspace.segments / "2").glob(".staging*"))
