from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines import published_table
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import write_table_file
from pipelines.published_table import PublishedTable, UnknownIds
from tests.releases import AS_OF

LEAST, GREATEST = -(2**63), 2**63 - 1
IDS = st.lists(
    st.integers(LEAST, GREATEST) | st.integers(-5, 20) | st.sampled_from([LEAST, LEAST + 1, GREATEST - 1, GREATEST]),
    max_size=40, unique=True,
).map(sorted)


def table_of(path: Path, ids: list[int], *, group_rows: int = 7, statistics: bool = True) -> PublishedTable:
    rows = np.arange(len(ids) * 6, dtype=np.uint8).reshape(-1, 6)
    write_table_file(path, [(np.array(ids, np.int64), rows)], row_bytes=6, as_of=AS_OF)
    pq.write_table(pq.read_table(path), path, row_group_size=group_rows, write_statistics=statistics)
    return PublishedTable(path, TableSpec("item.kge", 4, len(ids), "int4", "vocabulary", bytes(6).hex()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=IDS, data=st.data())
@example(ids=[LEAST, GREATEST], data=None)
@example(ids=[], data=None)
def test_batches_are_the_rows_that_were_chosen_and_no_unknown_id_is_known(
    tmp_path: Path, ids: list[int], data: st.DataObject | None
) -> None:
    table = table_of(tmp_path / "table.parquet", ids)
    chosen = None
    if data is not None and ids:
        chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(ids) - 1), min_size=1))))
    unknown = UnknownIds(table, np.random.default_rng(0))
    wanted = np.arange(len(ids)) if chosen is None else chosen
    rows = np.arange(len(ids) * 6, dtype=np.uint8).reshape(-1, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_table, "BATCH_ROWS", 3)
        batches = list(table.batches(chosen, unknown))
        np.testing.assert_array_equal(table.rows_at(wanted), rows[wanted])
    assert all(len(found) >= 3 for found, _ in batches[:-1])
    assert [key for found, _ in batches for key in found.tolist()] == np.array(ids, np.int64)[wanted].tolist()
    assert b"".join(each.tobytes() for _, each in batches) == rows[wanted].tobytes()
    asked = unknown.ids()
    assert not set(asked.tolist()) & set(ids) and asked.dtype == np.int64
    if not ids or ids[0] > LEAST or ids[-1] < GREATEST:
        assert len(asked) > 0


def test_unknown_ids_lie_below_above_and_between(tmp_path: Path) -> None:
    ids = list(range(1000, 3000, 2))
    unknown = UnknownIds(table := table_of(tmp_path / "table.parquet", ids, group_rows=300), np.random.default_rng(0))
    assert len(list(table.batches(None, unknown))) == 1
    asked = unknown.ids()
    inside = asked[(asked > 1000) & (asked < 2998)]
    assert (asked < 1000).sum() > 100 and (asked > 2998).sum() > 100 and len(inside) > 400 and (inside % 2 == 1).all()


def test_a_dense_vocabulary_has_unknown_ids_outside_only(tmp_path: Path) -> None:
    unknown = UnknownIds(table := table_of(tmp_path / "table.parquet", list(range(500))), np.random.default_rng(0))
    list(table.batches(None, unknown))
    asked = unknown.ids()
    assert len(asked) > 300 and ((asked < 0) | (asked >= 500)).all()


def test_a_file_without_statistics_says_nothing_of_what_lies_outside(tmp_path: Path) -> None:
    table = table_of(tmp_path / "table.parquet", list(range(0, 100, 5)), statistics=False)
    unknown = UnknownIds(table, np.random.default_rng(0))
    list(table.batches(None, unknown))
    asked = unknown.ids()
    assert table.id_bounds() == (LEAST, GREATEST) and len(asked) and ((asked > 0) & (asked < 95)).all()


def test_only_row_groups_that_hold_a_chosen_row_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, read = table_of(tmp_path / "table.parquet", list(range(100)), group_rows=10), []
    whole = pq.ParquetFile.iter_batches

    def recording(file: pq.ParquetFile, *args: object, row_groups: list[int], **kwargs: object) -> object:
        read.extend(row_groups)
        return whole(file, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    list(table.batches(np.array([3, 9, 57]), UnknownIds(table, np.random.default_rng(0))))
    assert read == [0, 5]
