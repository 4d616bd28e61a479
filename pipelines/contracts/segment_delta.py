"""The segment of a version that shares most rows with one before: theirs, by hard links, and what is different.

```
<segment>/
  base/           a whole segment, all of its files hard links to those of the version before
  overlay/        a segment of the rows that are not there, or are others there, and of all hash buckets
  replaced.npy    uint8 (ceil(base rows / 8),), a bit for each row of base: not of this version
  delta.json      spec, version, manifest hash, the SHA-256 of the files above that name the others
  delta.sha256    the hash of delta.json
```

```
id ──► base: row ──┬── its fingerprint is the id's, its bit not set ──► the row
                   └── else ──► overlay: its answer
```

On the disk and in memory the rows of `base` lie once, however many versions share them; the directory needs no other,
so that any of those versions may be retired first. The overlay has 64-bit fingerprints: no id finds another's row in
it, and an unknown id passes for a known one no more often than in `base`. A delta never lies upon a delta: it takes the
base of the one before.
"""

from pathlib import Path

import numpy as np

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.ids import batch_of
from pipelines.contracts.mapped_array import MappedArray, open_array
from pipelines.contracts.segment import Segment
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
from pipelines.contracts.segment_index import MIN_ROW_BYTES, gather_newer

__all__ = ["DeltaSegment", "header_of", "open_segment"]


class DeltaSegment:
    """Batched reader of one delta; as safe to share as a `Segment`.

    >>> segment = DeltaSegment.open(path)                             # doctest: +SKIP
    >>> rows, found = segment.lookup(np.array([17, 42]))              # doctest: +SKIP

    Attributes:
        base, overlay: the two segments it reads.
    """

    at_hand = True

    def __init__(self, header: DeltaHeader, base: Segment, overlay: Segment, replaced: MappedArray) -> None:
        self.spec, self.version, self.manifest_sha256 = header.table, header.version, header.manifest_sha256
        self.base, self.overlay, self._replaced = base, overlay, replaced.array
        self._row_bytes = header.table.row_bytes
        self.files = (*base.files, *overlay.files, *((replaced.file,) if replaced.file else ()))

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True, part: tuple[int, int] | None = None) -> "DeltaSegment":
        """Map a delta; with `verify` each of its files, the shared ones too, is hashed first; `part` as `Segment.open`.

        Raises:
            VersionNotFound: there is no delta here.
            IntegrityError: a file is missing, truncated, has other bytes than were written, or does not fit the others.
        """
        header = read_header(directory / DELTA_NAME, DeltaHeader)

        def opened(name: str) -> Segment:
            sha256 = header.files[f"{name}/{HEADER_NAME}"]
            segment = Segment.open(directory / name, verify=verify, part=part, header_sha256=sha256)
            if not header.table.is_like(segment.spec):
                raise IntegrityError(
                    f"{directory / name} does not fit {DELTA_NAME}", expected=f"a table like {header.table}",
                    got=str(segment.spec), remedy=REMEDY,
                )
            return segment

        base, overlay = opened(BASE), opened(OVERLAY)
        replaced = open_array(
            directory / REPLACED, np.uint8, (-(-base.spec.rows // 8),), remedy=REMEDY, populate=verify,
            sha256=header.files[REPLACED] if verify else None,
        )
        segment = cls(header, base, overlay, replaced)
        segment.lookup(np.zeros(1, np.int64))  # loads the compiled lookup now, so that no request waits for it
        return segment

    @property
    def shared_rows(self) -> int:
        """How many rows are those of the base."""
        return self.spec.rows - self.overlay.spec.rows

    def lookup(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Segment.lookup`: int64 (B,) -> rows uint8 (B, row_bytes), found bool (B,)."""
        for file in self.files:
            file.require_whole()
        ids = batch_of(ids)
        size = len(ids) * self._row_bytes
        rows, found = np.empty(size + MIN_ROW_BYTES, np.uint8), np.empty(len(ids), np.bool_)
        gather_newer(
            ids, self.base.index, self._replaced, self.overlay.index, self.overlay.default, self._row_bytes, rows, found
        )
        return rows[:size].reshape(len(ids), self._row_bytes), found


def open_segment(
    directory: Path, *, verify: bool = True, part: tuple[int, int] | None = None
) -> Segment | DeltaSegment:
    """The reader of what lies at `directory`; takes and raises what `Segment.open` does."""
    kind = DeltaSegment if (directory / DELTA_NAME).is_file() else Segment
    return kind.open(directory, verify=verify, part=part)


def header_of(directory: Path) -> SegmentHeader | DeltaHeader:
    """What lies at `directory`, by its header alone; raises as `read_header`."""
    if (directory / DELTA_NAME).is_file():
        return read_header(directory / DELTA_NAME, DeltaHeader)
    return read_header(directory / HEADER_NAME, SegmentHeader)
