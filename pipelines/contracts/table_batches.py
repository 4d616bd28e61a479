"""What a table's record batches must be before they are written anywhere."""

from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pipelines.contracts.errors import InvalidTable
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import row_matrix

__all__ = ["checked_batches"]


def checked_batches(
    batches: Iterable[pa.RecordBatch], spec: TableSpec
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 (B,) and rows uint8 (B, row_bytes) of each batch (`id` int64, `row` fixed-size binary).

    Raises:
        InvalidTable: at the first that is wrong: the ids are not strictly increasing or not those of the id rule, a
            row has another width, or the count is not the spec's.
    """
    written, last = 0, None
    for batch in batches:
        if not batch.num_rows:
            continue
        ids, rows = batch.column("id").to_numpy(), _packed_rows(batch.column("row"), spec)
        end = written + len(ids)
        if end > spec.rows:
            _refuse(spec, f"{spec.rows} rows", f"at least {end}")
        if (last is not None and ids[0] <= last) or np.any(ids[1:] <= ids[:-1]):
            _refuse(spec, "strictly increasing ids", "a repeated or unsorted id")
        if spec.buckets:
            head = min(max(spec.buckets - written, 0), len(ids))
            expected = np.arange(written, written + head) - spec.buckets
            if (ids[:head] != expected).any():  # what follows is greater than -1
                _refuse(spec, f"bucket ids -{spec.buckets} to -1, each once", "other negative ids")
        yield ids, rows
        written, last = end, ids[-1]
    if written != spec.rows:
        _refuse(spec, f"{spec.rows} rows", str(written))


def _packed_rows(column: pa.Array, spec: TableSpec) -> np.ndarray:
    expected = pa.binary(spec.row_bytes)
    if column.type != expected:
        _refuse(spec, f"rows of {expected}", str(column.type))
    if column.null_count:
        _refuse(spec, "a row for every id", f"{column.null_count} nulls")
    return row_matrix(column)


def _refuse(spec: TableSpec, expected: str, got: str) -> NoReturn:
    raise InvalidTable(
        f"table {spec.name}", expected=expected, got=got, remedy="Publish the version again; nothing was materialized."
    )
