from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts.table_file import row_matrix, write_table_file
from tests.releases import AS_OF


def test_row_matrix_of_a_slice_shares_its_memory() -> None:
    column = pa.array([b"ab", b"cd", b"ef"], pa.binary(2))
    assert row_matrix(column[1:]).tobytes() == b"cdef" and row_matrix(column[3:]).shape == (0, 2)
    assert row_matrix(column).ctypes.data == column.buffers()[1].address


def test_a_table_file_has_plain_rows_of_one_time(tmp_path: Path) -> None:
    ids = np.arange(10, dtype=np.int64) * 3 - 5
    rows = np.random.default_rng(0).integers(0, 256, (10, 7), np.uint8)
    path = tmp_path / "table.parquet"
    write_table_file(path, [(ids[:4], rows[:4]), (ids[4:4], rows[4:4]), (ids[4:], rows[4:])], row_bytes=7, as_of=AS_OF)
    table = pq.read_table(path)
    assert table.schema.types == [pa.int64(), pa.binary(7), pa.timestamp("us", "UTC")]
    assert table["id"].to_pylist() == ids.tolist() and table["row"].to_pylist() == [row.tobytes() for row in rows]
    assert table["event_timestamp"].unique().to_pylist() == [AS_OF]
    encodings = pq.ParquetFile(path).metadata.row_group(0).column(1).encodings
    assert "RLE_DICTIONARY" not in encodings and pq.ParquetFile(path).metadata.row_group(0).column(1).compression == (
        "UNCOMPRESSED"
    )
