"""The Parquet file of one table: `id` int64 ascending, `row` packed bytes, `event_timestamp` the end of its data.

Rows are incompressible and hardly repeat: they are stored plain, which writes and reads several times as fast as
Parquet's defaults.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["open_table_file", "row_matrix", "table_schema", "write_table_file"]

GROUP_ROWS = 1 << 20


def table_schema(row_bytes: int) -> pa.Schema:
    """The columns of a table whose rows take `row_bytes` bytes."""
    return pa.schema(
        [("id", pa.int64()), ("row", pa.binary(row_bytes)), ("event_timestamp", pa.timestamp("us", tz="UTC"))]
    )


def write_table_file(
    path: Path, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, row_bytes: int, as_of: datetime
) -> None:
    """Write ids int64 (B,), ascending, and rows uint8 (B, row_bytes), batch after batch; memory is bounded by a batch.

    >>> from datetime import UTC, datetime
    >>> batch = np.array([3, 5]), np.zeros((2, 8), np.uint8)
    >>> write_table_file(path, [batch], row_bytes=8, as_of=datetime(2024, 1, 1, tzinfo=UTC))    # doctest: +SKIP
    """
    schema, moment = table_schema(row_bytes), np.datetime64(as_of.astimezone(UTC).replace(tzinfo=None), "us")
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=["event_timestamp"],
        column_encoding={"id": "DELTA_BINARY_PACKED"},
    ) as writer:
        for ids, rows in batches:
            packed = pa.FixedSizeBinaryArray.from_buffers(
                schema.field("row").type, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
            )
            for start in range(0, len(ids), GROUP_ROWS):
                some = pa.array(ids[start : start + GROUP_ROWS], pa.int64())
                stamps = pa.array(np.full(len(some), moment), pa.timestamp("us")).cast(schema.field(2).type)
                writer.write_batch(
                    pa.record_batch([some, packed[start : start + GROUP_ROWS], stamps], schema),
                    row_group_size=GROUP_ROWS,
                )


def open_table_file(source: Path | BinaryIO) -> pq.ParquetFile:
    """The file of a table, for reading in batches; close it, or use it as a context. An open file stays open.

    Nothing that was read is kept: Arrow's buffering ahead would hold every row group until the file is closed, which
    for a large table is the table, and takes ten times as long.
    """
    return pq.ParquetFile(source, pre_buffer=False)


def row_matrix(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """A column of rows without nulls as uint8 (N, row_bytes), sharing its memory."""
    width, count = column.type.byte_width, len(column)
    if not count:
        return np.empty((0, width), np.uint8)
    start = column.offset * width
    return np.frombuffer(column.buffers()[1], np.uint8)[start : start + count * width].reshape(count, width)
