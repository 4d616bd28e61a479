"""A release candidate: what the trainer hands over to be published, checked as if it came from a stranger.

```
<candidate>/
  release.json               dataset, as_of, windows, tables (specs), metrics
  tables/<table>.parquet     id int64 ascending · row fixed-size binary · event_timestamp = as_of
  upper/config.json, upper/model.safetensors
```
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipelines.contracts.errors import InvalidTable, NotPrepared
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.windows import Windows

__all__ = ["Candidate"]

BATCH_ROWS = 65_536
TIMESTAMP = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Candidate:
    """What `release.json` says, and where its files lie.

    Attributes:
        as_of: end of the data it was trained on, UTC.
    """

    directory: Path
    dataset: str
    as_of: datetime
    windows: Windows
    tables: tuple[TableSpec, ...]
    metrics: dict[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """Paths inside the candidate that a version consists of."""
        return (*map(Manifest.table_path, self.names), Manifest.UPPER_CONFIG, Manifest.UPPER_WEIGHTS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.tables)

    @classmethod
    def read(cls, directory: Path) -> "Candidate":
        """Read `release.json`.

        Raises:
            NotPrepared: it is not there.
            InvalidTable: it cannot be understood, names no table or names one twice.
            InvalidConfig: a table spec or the windows are wrong in themselves.
        """
        path = directory / "release.json"
        if not path.is_file():
            raise NotPrepared(
                f"no release candidate at {directory}", expected="release.json", got="nothing there",
                remedy="Run `facet quantize` for this run, arm, seed and quantization first.",
            )
        try:
            raw = json.loads(path.read_text())
            as_of = datetime.fromisoformat(raw["as_of"])
            if as_of.utcoffset() is None:
                raise ValueError(f"as_of {raw['as_of']} has no time zone")
            windows = Windows.from_dict(raw["windows"])
            tables = tuple(TableSpec(**table) for table in raw["tables"])
            if not tables or len({spec.name for spec in tables}) != len(tables):
                raise ValueError(f"tables {[spec.name for spec in tables]}")
            return cls(directory, raw["dataset"], as_of, windows, tables, raw["metrics"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidTable(
                f"{path} cannot be understood", expected="dataset, as_of, windows, distinct tables and metrics",
                got=repr(error), remedy="Run `facet quantize` again.",
            ) from error

    def check(self) -> None:
        """Read every file once; raises `InvalidTable` naming the first table or weight that may not be published."""
        self._check_upper_model()
        for spec in self.tables:
            self._check_table(spec)

    def _check_table(self, spec: TableSpec) -> None:
        path = self.directory / Manifest.table_path(spec.name)
        if not path.is_file():
            _refuse(path.name, expected="the table's Parquet file", got="no file")
        columns = {"id": pa.int64(), "row": pa.binary(spec.row_bytes), "event_timestamp": TIMESTAMP}
        default = np.frombuffer(spec.default_row_bytes, np.uint8)[None, :]
        _check_finite(spec, default, "its default row")
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                got = {name: schema.field(name).type if name in schema.names else None for name in columns}
                if got != columns:
                    _refuse(spec.name, expected=f"columns {columns}", got=str(got))
                if file.metadata.num_rows != spec.rows:
                    _refuse(spec.name, expected=f"{spec.rows} rows", got=str(file.metadata.num_rows))
                last = None
                for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                    last = self._check_batch(spec, batch, last)
        except pa.ArrowException as error:
            _refuse(spec.name, expected="a Parquet file", got=str(error))

    def _check_batch(self, spec: TableSpec, batch: pa.RecordBatch, last: int | None) -> int | None:
        """Check one batch, given the last id of the one before; returns this batch's last id."""
        if batch.num_rows == 0:
            return last
        if nulls := [name for name in batch.schema.names if batch.column(name).null_count]:
            _refuse(spec.name, expected="no nulls", got=f"nulls in {nulls}")
        ids = batch.column("id").to_numpy()
        if (last is not None and ids[0] <= last) or np.any(ids[1:] <= ids[:-1]):
            _refuse(spec.name, expected="strictly ascending ids", got="a repeated or unsorted id")
        stamps = batch.column("event_timestamp").unique()
        if len(stamps) != 1 or stamps[0].as_py() != self.as_of:
            _refuse(spec.name, expected=f"every event_timestamp {self.as_of}", got=f"{stamps[0].as_py()} and others")
        packed = np.frombuffer(batch.column("row").buffers()[1], np.uint8)
        start = batch.column("row").offset * spec.row_bytes
        rows = packed[start : start + len(ids) * spec.row_bytes].reshape(len(ids), spec.row_bytes)
        _check_finite(spec, rows, "rows")
        return int(ids[-1])

    def _check_upper_model(self) -> None:
        config, weights = (self.directory / name for name in (Manifest.UPPER_CONFIG, Manifest.UPPER_WEIGHTS))
        try:
            dims = json.loads(config.read_text())["tables"]
            tensors = load_file(weights)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _refuse("the upper model", expected="config.json with its tables, and model.safetensors", got=repr(error))
        published = {spec.name: spec.dim for spec in self.tables}
        if dims != published:
            _refuse("the upper model", expected=f"the candidate's tables {published}", got=str(dims))
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                _refuse("the upper model", expected="finite weights", got=f"NaN or infinity in {name}")


def _check_finite(spec: TableSpec, rows: np.ndarray, what: str) -> None:
    if not np.isfinite(codec(spec.quantization).decode(rows, spec.dim)).all():
        _refuse(spec.name, expected="finite values", got=f"NaN or infinity in {what}")


def _refuse(what: str, *, expected: str, got: str) -> NoReturn:
    raise InvalidTable(
        f"{what} may not be published", expected=expected, got=got,
        remedy="Run `facet quantize` again; nothing was written.",
    )
