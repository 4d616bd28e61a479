from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.errors import IntegrityError, InvalidTable, VersionNotFound
from pipelines.contracts.segment import ARRAYS, Segment
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec

WIDTH = 8


def spec(rows: int) -> TableSpec:
    return TableSpec("item.kge", 8, rows, "int4", "vocabulary", "0102030405060708")


def batch(ids: list[int], width: int = WIDTH) -> pa.RecordBatch:
    rows = [bytes((i + column) % 256 for column in range(width)) for i in ids]
    return pa.record_batch({"id": pa.array(ids, pa.int64()), "row": pa.array(rows, pa.binary(width))})


def write(directory: Path, *batches: pa.RecordBatch, rows: int) -> Segment:
    write_segment(directory, spec=spec(rows), version=3, manifest_sha256="ab", batches=batches)
    return Segment.open(directory)


def test_rows_of_several_batches(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([-5, 2]), batch([]), batch([7, 9, 2**62]), rows=5)
    rows, found = segment.lookup(np.array([9, 3, -5, 9]))
    assert found.tolist() == [True, False, True, True]
    nine, default, minus_five = [*range(9, 17)], [*range(1, 9)], [(column - 5) % 256 for column in range(8)]
    assert rows.tolist() == [nine, default, minus_five, nine]
    assert (segment.version, segment.manifest_sha256, segment.spec) == (3, "ab", spec(5))


def test_a_slice_of_a_batch_brings_its_own_rows(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([1, 2, 3, 4]).slice(1, 2), rows=2)
    rows, found = segment.lookup(np.array([2, 3]))
    assert found.all() and rows[:, 0].tolist() == [2, 3]


def test_a_table_without_rows(tmp_path: Path) -> None:
    rows, found = write(tmp_path / "s", rows=0).lookup(np.array([1]))
    assert not found.any() and rows.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@given(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60), st.data())
def test_lookup_is_a_dictionary(tmp_path_factory: pytest.TempPathFactory, ids: set[int], data: st.DataObject) -> None:
    segment = write(tmp_path_factory.mktemp("s") / "s", batch(sorted(ids)), rows=len(ids))
    asked = data.draw(st.lists(st.one_of(st.sampled_from(sorted(ids)), st.integers(-(2**63), 2**63 - 1)), max_size=30))
    rows, found = segment.lookup(np.array(asked, np.int64))
    assert found.tolist() == [key in ids for key in asked]
    expected = [[(key + column) % 256 for column in range(WIDTH)] if key in ids else [*range(1, 9)] for key in asked]
    assert rows.tolist() == expected


@pytest.mark.parametrize(
    ("batches", "rows", "message"),
    [
        ([batch([2, 1])], 2, "strictly increasing"),
        ([batch([1, 1])], 2, "strictly increasing"),
        ([batch([1, 2]), batch([2, 3])], 4, "strictly increasing"),
        ([batch([1, 2])], 3, "3 rows, got 2"),
        ([batch([1, 2]), batch([3])], 2, "2 rows, got at least 3"),
        ([batch([1], width=9)], 1, r"binary\[8\]"),
        ([pa.record_batch({"id": pa.array([1]), "row": pa.array([None], pa.binary(WIDTH))})], 1, "1 nulls"),
    ],
)
def test_a_bad_table_leaves_nothing(tmp_path: Path, batches: list, rows: int, message: str) -> None:
    with pytest.raises(InvalidTable, match=message):
        write(tmp_path / "s", *batches, rows=rows)
    assert not list(tmp_path.iterdir())


def test_a_segment_is_never_written_over(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([1]), rows=1)
    with pytest.raises(OSError):
        write(tmp_path / "s", batch([2]), rows=1)
    assert segment.lookup(np.array([1]))[1].all() and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_no_segment(tmp_path: Path) -> None:
    with pytest.raises(VersionNotFound, match="feast materialize"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_other_bytes_than_were_written(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "s", batch([1, 2]), rows=2)
    path = tmp_path / "s" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    if damage == "gone":
        path.unlink()
    with pytest.raises(IntegrityError, match=f"{name} is corrupted"):
        Segment.open(tmp_path / "s")


def test_a_header_that_is_not_one(tmp_path: Path) -> None:
    write(tmp_path / "s", batch([1]), rows=1)
    (tmp_path / "s" / "segment.json").write_text('{"table": {}}')
    with pytest.raises(IntegrityError, match="is corrupted"):
        Segment.open(tmp_path / "s")
