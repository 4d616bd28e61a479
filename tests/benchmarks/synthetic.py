"""Versions of any size: one INT4 table of 64 columns, ids that are any 64-bit integers, written by streaming."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import open_table_file
from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_files import save_upper_model
from pipelines.contracts.upper_model import UpperModel
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from tests.lineages import invented_ranker
from tests.releases import AS_OF, TASKS, WINDOWS

__all__ = ["DIM", "ROW_BYTES", "TABLE", "publish_synthetic", "record_batches", "table_file", "view_of"]

TABLE, DIM = "item.kge", 64
ROW_BYTES = DIM // 2 + 4
BLOCK_ROWS = 1_048_576  # a row group; what is in memory at once

_ROW = np.dtype([("codes", np.uint8, DIM // 2), ("scale", "<f2"), ("bias", "<f2")])
_SCHEMA = pa.schema(
    [("id", pa.int64()), ("row", pa.binary(ROW_BYTES)), ("event_timestamp", pa.timestamp("us", tz="UTC"))]
)


def publish_synthetic(workspace: Workspace, rows: int, *, seed: int = 0) -> Manifest:
    """Write a release with one table of `rows` rows and publish it as `facet publish` does."""
    release = workspace.root / "release"
    (release / "tables").mkdir(parents=True)
    _write_table(release / Manifest.table_path(TABLE), rows, seed=seed)
    default = packed_rows(1, np.random.default_rng(seed))
    spec = TableSpec(TABLE, DIM, rows, "int4", "vocabulary", default.tobytes().hex())
    model = UpperModel(UpperConfig({TABLE: DIM}, CONTEXT_FEATURES, TASKS, cross_rank=4, hidden=(16,)))
    save_upper_model(model, release / "upper")
    content = {
        "dataset": "synthetic", "as_of": AS_OF.isoformat(), "windows": WINDOWS.to_dict(),
        "tables": [spec.to_dict()], "metrics": {},
        "lineage": invented_ranker(dataset="synthetic", windows=WINDOWS, tasks=TASKS).to_dict(),
    }
    (release / "release.json").write_text(json.dumps(content))
    manifest = publish(workspace, release)
    shutil.rmtree(release)
    return manifest


def table_file(workspace: Workspace, version: int = 1) -> Path:
    """The table's Parquet file in a published version."""
    return workspace.versions.path(version) / Manifest.table_path(TABLE)


def view_of(version: int = 1) -> str:
    """Name of the table's feature view."""
    return f"{TABLE.replace('.', '_')}__v{version}"


def record_batches(path: Path, *, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """Batches of `id` and `row` of a table's Parquet file."""
    with open_table_file(path) as file:
        yield from file.iter_batches(rows, columns=["id", "row"])


def ascending_ids(rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Random distinct ids in blocks, ascending over all: int64 (B,), B at most `BLOCK_ROWS`.

    The 64-bit range is cut into as many equal parts as there are blocks; each block draws from its own.
    """
    blocks = max(1, -(-rows // BLOCK_ROWS))
    edges = [-(2**63) + 2**64 * number // blocks for number in range(blocks + 1)]
    for number in range(blocks):
        count = rows * (number + 1) // blocks - rows * number // blocks
        ids = np.empty(0, np.int64)
        while len(ids) < count:
            drawn = rng.integers(edges[number], edges[number + 1], count - len(ids), np.int64)
            ids = np.union1d(ids, drawn)
        yield ids


def packed_rows(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Valid INT4 rows with random codes: uint8 (rows, ROW_BYTES)."""
    packed = np.empty(rows, _ROW)
    packed["codes"] = np.frombuffer(rng.bytes(rows * DIM // 2), np.uint8).reshape(rows, DIM // 2)
    packed["scale"] = rng.uniform(0.01, 0.1, rows)
    packed["bias"] = rng.uniform(-1, 0, rows)
    return packed.view(np.uint8).reshape(rows, ROW_BYTES)


def _write_table(path: Path, rows: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with pq.ParquetWriter(path, _SCHEMA) as file, tqdm(
        total=rows, desc=f"{rows:,} rows", unit="row", unit_scale=True, disable=None
    ) as progress:
        for ids in ascending_ids(rows, rng):
            packed = pa.py_buffer(packed_rows(len(ids), rng))
            stamps = np.full(len(ids), np.datetime64(AS_OF.replace(tzinfo=None), "us"))
            columns = [
                pa.array(ids),
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_BYTES), len(ids), [None, packed]),
                pa.array(stamps).cast(_SCHEMA.field("event_timestamp").type),
            ]
            file.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=BLOCK_ROWS)
            progress.update(len(ids))
