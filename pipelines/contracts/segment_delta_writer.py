"""From record batches and the segment of a version before to a segment that shares its rows.

```
batches ──► compared with the base ──► few differ? ──► base/ linked, overlay/ written from the same batches again
                                       else, or if the base cannot be linked or is damaged ──► no delta
```

Whether rows are the same is seen by their bytes, not by what anybody says about them.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.contracts.durable import creating_directory, sha256_of
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.sealed import read_sealed, seal_path, write_sealed
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import open_segment
from pipelines.contracts.segment_header import (
    BASE,
    DELTA_NAME,
    HEADER_NAME,
    OVERLAY,
    REMEDY,
    REPLACED,
    DeltaHeader,
    SegmentHeader,
    read_header,
)
from pipelines.contracts.segment_index import match_rows
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_batches import checked_batches
from pipelines.contracts.verified import open_verified

__all__ = ["MOST_CHANGED", "write_copy", "write_delta"]

logger = logging.getLogger(__name__)

MOST_CHANGED = 0.1
"""Of a table's rows. Lookups are slower the more of them differ, and there is the less to save."""


class _NotShared(Exception):
    """Why the table is to be written in full."""


def write_delta(
    directory: Path, *, spec: TableSpec, version: int, manifest_sha256: str, batches: Iterable[pa.RecordBatch],
    parent: Path, most_changed: float = MOST_CHANGED,
) -> bool:
    """Write a segment that shares what it can with the one at `parent`, unless they have too little in common.

    Memory is a few times a batch, two bits for each row of the base, one for each row of the table, and the index of
    the overlay.

    Args:
        batches: as `write_segment` takes them; iterated several times.

    Returns:
        Whether it was written; if not, nothing is left of it, and a line of the log says why.

    Raises:
        InvalidTable, OSError: as `write_segment`.
    """
    try:
        with creating_directory(directory, read_only=True) as staging:
            base = _link_base(parent, staging / BASE)
            _require_kind(base.spec, spec)
            kept, masks, changed_rows = _compare(batches, spec, base, most_changed)
            _check_base(staging / BASE, rows=True)
            np.save(staging / REPLACED, ~kept)
            write_segment(
                staging / OVERLAY, spec=replace(spec, rows=changed_rows), version=version,
                manifest_sha256=manifest_sha256, batches=_changed(batches, masks), exact_rows=changed_rows,
            )
            names = (REPLACED, DeltaHeader.BASE_HEADER, DeltaHeader.OVERLAY_HEADER)
            header = {
                "format": DeltaHeader.FORMAT,
                "version": version,
                "manifest_sha256": manifest_sha256,
                "table": spec.to_dict(),
                "files": {name: sha256_of(staging / name) for name in names},
            }
            write_sealed(staging / DELTA_NAME, json.dumps(header, indent=1))
    except (_NotShared, VersionNotFound, IntegrityError) as error:
        _say_why(directory, parent, error)
        return False
    logger.info("%s shares %d of %d rows with %s", directory, spec.rows - changed_rows, spec.rows, parent)
    return True


def write_copy(
    directory: Path, *, spec: TableSpec, version: int, manifest_sha256: str, parent: Path, parent_manifest_sha256: str
) -> bool:
    """Write a segment of the very rows of the one at `parent`: links to its files, and a header of its own.

    The caller knows that the rows are the same; `parent` is checked to be whole, and of the manifest he knows it from.

    Returns:
        Whether it was written; if not, nothing is left of it, and a line of the log says why.

    Raises:
        OSError: as `write_segment`.
    """
    try:
        with creating_directory(directory, read_only=True) as staging:
            _link_all(parent, staging)
            theirs = open_segment(staging)
            if theirs.manifest_sha256 != parent_manifest_sha256:
                raise _NotShared(f"it is of manifest {theirs.manifest_sha256}, not {parent_manifest_sha256}")
            _require_kind(theirs.spec, spec)
            if theirs.spec.rows != spec.rows:
                raise _NotShared(f"it has {theirs.spec.rows} rows, not {spec.rows}")
            path = next(path for path in (staging / DELTA_NAME, staging / HEADER_NAME) if path.exists())
            identity = {"version": version, "manifest_sha256": manifest_sha256, "table": spec.to_dict()}
            header = read_sealed(path, remedy="") | identity
            for linked in (path, seal_path(path)):
                linked.unlink()  # else the parent's own would be written to
            write_sealed(path, json.dumps(header, indent=1))
    except (_NotShared, VersionNotFound, IntegrityError) as error:
        _say_why(directory, parent, error)
        return False
    logger.info("%s has the rows of %s", directory, parent)
    return True


def _say_why(directory: Path, parent: Path, error: Exception) -> None:
    level = logging.WARNING if isinstance(error, IntegrityError) else logging.INFO
    logger.log(level, "%s shares no rows with %s: %s", directory, parent, error)


def _require_kind(theirs: TableSpec, ours: TableSpec) -> None:
    """Two tables can share rows if they differ in nothing but how many they have and what unknown ids get."""
    if not theirs.is_like(ours):
        raise _NotShared(f"it is of another kind of table: {theirs}")


def _link_base(parent: Path, directory: Path) -> Segment:
    """Link the base of the segment at `parent`, and open it without having hashed its rows."""
    _link_all(parent / BASE if (parent / DELTA_NAME).is_file() else parent, directory)
    _check_base(directory, rows=False)
    return Segment.open(directory, verify=False)


def _link_all(source: Path, target: Path) -> None:
    try:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                link = target / path.relative_to(source)
                link.parent.mkdir(exist_ok=True)
                os.link(path, link)
    except OSError as error:  # another file system, too many links, not allowed, retired meanwhile
        raise _NotShared(f"{error.filename} cannot be linked ({error.strerror})") from error


def _check_base(directory: Path, *, rows: bool) -> None:
    """Hash the base's rows, or everything else: the kernels trust the index, of which there is little."""
    for name, sha256 in read_header(directory / HEADER_NAME, SegmentHeader).files.items():
        if (name == "rows.npy") == rows:
            with open_verified(directory / name, sha256, remedy=REMEDY):
                pass


def _compare(
    batches: Iterable[pa.RecordBatch], spec: TableSpec, base: Segment, most_changed: float
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Which rows of the base are kept, a bit each; which rows of each batch are not among them; how many those are.

    An id that passes in the base for another, with other bytes, takes the other's row from it too: the other is then
    found changed when all are compared once more.

    Raises:
        _NotShared: more than `most_changed` of the table's rows are not in the base, or of the base's not in the table.
    """
    size, limit = -(-base.spec.rows // 8), int(most_changed * spec.rows)
    replaced = np.zeros(size, np.uint8)
    while True:
        kept, masks, changed_rows = np.zeros(size, np.uint8), [], 0
        for ids, rows in checked_batches(batches, spec):
            changed = np.empty(len(ids), np.bool_)
            rows = np.ascontiguousarray(rows).reshape(-1)
            match_rows(ids, rows, spec.row_bytes, base.index, replaced, kept, changed)
            masks.append(np.packbits(changed))
            changed_rows += int(np.count_nonzero(changed))
            if changed_rows > limit:
                raise _NotShared(f"more than {limit} of {spec.rows} rows are not those of the base")
        if not (replaced & kept).any():
            break
    left = base.spec.rows - int(np.bitwise_count(kept).sum())
    if left > limit:
        raise _NotShared(f"{left} rows of the base are not of the table, which has {spec.rows}")
    return kept, masks, changed_rows


def _changed(batches: Iterable[pa.RecordBatch], masks: list[np.ndarray]) -> Iterator[pa.RecordBatch]:
    for batch, mask in zip((batch for batch in batches if batch.num_rows), masks, strict=True):
        if mask.any():
            yield batch.filter(pa.array(np.unpackbits(mask, count=batch.num_rows).view(np.bool_)))
