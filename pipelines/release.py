"""A release: what the trainer hands over to be published, checked as if it came from a stranger.

```
<release>/
  release.json               dataset, as_of, windows, tables (specs), metrics, lineage (of the ranker)
  tables/<table>.parquet     id int64 ascending · row fixed-size binary · event_timestamp = as_of
  upper/config.json, upper/model.safetensors
```
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pipelines.contracts.errors import IntegrityError, InvalidTable, NotPrepared
from pipelines.contracts.lineage import Lineage
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_batches import checked_batches
from pipelines.contracts.table_file import open_table_file, table_schema
from pipelines.contracts.windows import Windows

__all__ = ["Release"]

BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Release:
    """What `release.json` says, and where its files lie.

    Attributes:
        as_of: end of the data it was trained on, UTC.
        lineage: what the ranker was made from, down to the log.
    """

    directory: Path
    dataset: str
    as_of: datetime
    windows: Windows
    tables: tuple[TableSpec, ...]
    metrics: dict[str, Any]
    lineage: Lineage

    @property
    def files(self) -> tuple[str, ...]:
        """Paths inside the release that a version consists of."""
        return (*map(Manifest.table_path, self.names), Manifest.UPPER_CONFIG, Manifest.UPPER_WEIGHTS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.tables)

    @classmethod
    def read(cls, directory: Path) -> "Release":
        """Read `release.json`, and see that the files are there.

        Raises:
            NotPrepared: it is not there.
            InvalidTable: it cannot be understood, names no table or names one twice, or was trained on another data set
                or windows than it says; a file is missing.
            InvalidConfig: a table spec, the windows or the lineage are wrong in themselves.
        """
        path = directory / "release.json"
        if not path.is_file():
            raise NotPrepared(
                f"no release at {directory}", expected="release.json", got="nothing there",
                remedy="Run `facet quantize` for this run, arm, seed and quantization first.",
            )
        try:
            raw = json.loads(path.read_text())
            as_of = datetime.fromisoformat(raw["as_of"])
            if as_of.utcoffset() is None:
                raise ValueError(f"as_of {raw['as_of']} has no time zone")
            windows = Windows.from_dict(raw["windows"])
            tables = tuple(TableSpec.from_dict(table, where=f"a table of {path}") for table in raw["tables"])
            if not tables or len({spec.name for spec in tables}) != len(tables):
                raise ValueError(f"tables {[spec.name for spec in tables]}")
            lineage = Lineage.from_dict(raw["lineage"], where=f"the lineage of {path}")
            release = cls(directory, raw["dataset"], as_of, windows, tables, raw["metrics"], lineage)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidTable(
                f"{path} cannot be understood", expected="dataset, as_of, windows, distinct tables, metrics, lineage",
                got=repr(error), remedy="Run `facet quantize` again.",
            ) from error
        told = {"dataset": release.dataset, "windows": windows.to_dict()}
        if changes := lineage.changes(settings=lineage.settings | told, inputs=lineage.inputs):
            _refuse(f"the release {directory}", expected="what its ranker was trained with", got="; ".join(changes))
        for name in release.files:
            if not (directory / name).is_file():
                _refuse(f"the release {directory}", expected=f"the file {name}", got="no file")
        return release

    def check(self) -> None:
        """Read every file once; raises `InvalidTable` naming the first table or weight that may not be published."""
        self._check_upper_model()
        for spec in self.tables:
            try:
                self._check_table(spec)
            except InvalidTable as error:
                _refuse(spec.name, expected=error.expected, got=error.got)

    def _check_table(self, spec: TableSpec) -> None:
        columns = {field.name: field.type for field in table_schema(spec.row_bytes)}
        row_codec, default = codec(spec.quantization), np.frombuffer(spec.default_row_bytes, np.uint8)[None, :]
        if not row_codec.finite(default, spec.dim).all():
            _refuse(spec.name, expected="finite values", got="NaN or infinity in its default row")
        try:
            with open_table_file(self.directory / Manifest.table_path(spec.name)) as file, tqdm(
                total=spec.rows, desc=f"check {spec.name}", unit="row", unit_scale=True, disable=None, leave=False
            ) as progress:
                schema = file.schema_arrow
                got = {name: schema.field(name).type if name in schema.names else None for name in columns}
                if got != columns:
                    _refuse(spec.name, expected=f"columns {columns}", got=str(got))
                batches = self._dated(spec, file.iter_batches(BATCH_ROWS, columns=list(columns)))
                for ids, rows in checked_batches(batches, spec):
                    finite = row_codec.finite(rows, spec.dim)
                    if not finite.all():
                        wrong = int(ids[np.argmin(finite)])
                        _refuse(spec.name, expected="finite values", got=f"NaN or infinity in the row of id {wrong}")
                    progress.update(len(ids))
        except (pa.ArrowException, OSError) as error:
            _refuse(spec.name, expected="a Parquet file", got=str(error))

    def _dated(self, spec: TableSpec, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches, each after a look at its nulls and its time."""
        for batch in batches:
            if nulls := [name for name in batch.schema.names if batch.column(name).null_count]:
                _refuse(spec.name, expected="no nulls", got=f"nulls in {nulls}")
            stamps = pc.min_max(batch.column("event_timestamp")).as_py().values() if batch.num_rows else ()
            for stamp in stamps:
                if stamp != self.as_of:
                    _refuse(spec.name, expected=f"every event_timestamp {self.as_of}", got=str(stamp))
            yield batch

    def _check_upper_model(self) -> None:
        from pipelines.contracts.upper_files import prove_upper_model  # imports PyTorch, which takes seconds

        try:
            prove_upper_model(
                (self.directory / Manifest.UPPER_CONFIG).parent, name="the upper model", tables=self.tables
            )
        except IntegrityError as error:
            _refuse(error.problem, expected=error.expected, got=error.got)


def _refuse(what: str, *, expected: str, got: str) -> NoReturn:
    raise InvalidTable(
        f"{what} may not be published", expected=expected, got=got,
        remedy="Run `facet quantize` again; nothing was written.",
    )
