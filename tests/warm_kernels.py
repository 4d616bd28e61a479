"""Importing this loads the compiled kernels of segments: once in the fork server of `tests.crash`, for all children."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec

with tempfile.TemporaryDirectory() as folder:
    directory = Path(folder) / "segment"
    spec = TableSpec("item.kge", 8, 1, "int4", "vocabulary", "00" * 8)
    row = pa.record_batch({"id": pa.array([1], pa.int64()), "row": pa.array([bytes(8)], pa.binary(8))})
    write_segment(directory, spec=spec, version=1, manifest_sha256="", batches=[row])
    Segment.open(directory).lookup(np.array([1]))
