"""What a segment says of itself: read whole, and refused unless all of it fits together, before any array is mapped.

The compiled kernels check no bounds. What keeps them inside the arrays is checked here and in `segment.require_parts`:
the header has every number they use, in its range; it lists and hashes every array; from its numbers follow type, shape
and size of each file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.contracts.errors import IntegrityError, InvalidConfig, VersionNotFound
from pipelines.contracts.names import sha256_name, version_number
from pipelines.contracts.sealed import read_sealed
from pipelines.contracts.segment_index import row_stride
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.strict import build

__all__ = [
    "ARRAYS", "BASE", "DELTA_NAME", "HEADER_NAME", "OVERLAY", "REMEDY", "REPLACED", "DeltaHeader", "IndexNumbers",
    "SegmentHeader", "read_header",
]

HEADER_NAME, DELTA_NAME = "segment.json", "delta.json"
ARRAYS = ("rows.npy", "parts.npy", "pilots.npy", "remap.npy")
BASE, OVERLAY, REPLACED = "base", "overlay", "replaced.npy"
REMEDY = "Delete the segment and materialize the version again."

Shape = tuple[type, tuple[int, ...]]
"""Element type and shape of an array."""


@dataclass(frozen=True)
class IndexNumbers:
    """The numbers of a segment's index: see `pipelines.contracts.segment_index.PARAMETERS`.

    Attributes:
        fingerprint_bytes: of a row's fingerprint; 2 or 8.
    """

    seed: int
    part_shift: int
    pilots: int
    slots: int
    fingerprint_bytes: int

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**64, "a seed of 64 bits", self.seed)
        _require(23 <= self.part_shift <= 63, "a part_shift of 23 to 63", self.part_shift)
        _require(1 <= self.pilots < 2**32, "1 to 2**32 - 1 pilots", self.pilots)
        _require(1 <= self.slots <= 2**17, "1 to 2**17 slots", self.slots)
        _require(self.fingerprint_bytes in (2, 8), "a fingerprint of 2 or 8 bytes", self.fingerprint_bytes)

    @property
    def parts(self) -> int:
        return 1 << (63 - self.part_shift)


@dataclass(frozen=True)
class SegmentHeader:
    """`segment.json`.

    Attributes:
        files: name of each array -> SHA-256 of its file.
    """

    format: int
    version: int
    manifest_sha256: str
    table: TableSpec
    index: IndexNumbers
    files: dict[str, str]

    FORMAT = 3

    def __post_init__(self) -> None:
        _require_identity(self)
        _require_files(self.files, ARRAYS)
        _require(self.shapes["remap.npy"][1][0] >= 0, "a slot for every row", self.index.slots)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of each array, which its file must have."""
        rows, index = self.table.rows, self.index
        return {
            "rows.npy": (np.uint8, (rows, row_stride(self.table.row_bytes, index.fingerprint_bytes))),
            "parts.npy": (np.uint64, (index.parts + 1, 2)),
            "pilots.npy": (np.uint8, (index.parts * index.pilots,)),
            "remap.npy": (np.uint16, (index.parts * index.slots - (rows - self.table.buckets),)),
        }


@dataclass(frozen=True)
class DeltaHeader:
    """`delta.json`.

    Attributes:
        files: the bits of what is replaced and the headers of the two segments -> SHA-256.
    """

    format: int
    version: int
    manifest_sha256: str
    table: TableSpec
    files: dict[str, str]

    FORMAT = 1
    BASE_HEADER, OVERLAY_HEADER = f"{BASE}/{HEADER_NAME}", f"{OVERLAY}/{HEADER_NAME}"

    def __post_init__(self) -> None:
        _require_identity(self)
        _require_files(self.files, (REPLACED, self.BASE_HEADER, self.OVERLAY_HEADER))


Header = TypeVar("Header", SegmentHeader, DeltaHeader)


def read_header(path: Path, kind: type[Header], *, sha256: str | None = None) -> Header:
    """The header at `path`, checked against its seal and in itself.

    Args:
        sha256: of its bytes, where another file names it.

    Raises:
        VersionNotFound: there is none.
        IntegrityError: it was altered, is of another format, or its parts do not fit together.
    """
    if sha256 is None and not path.is_file():
        raise VersionNotFound(
            f"no segment at {path.parent}", expected="a materialized table", got="nothing there",
            remedy="Run `feast materialize` over the version's time.",
        )
    try:
        raw = read_sealed(path, sha256=sha256, remedy=REMEDY)
        if isinstance(raw, dict):  # before its keys: another format has others
            _require(raw.get("format") == kind.FORMAT, f"format {kind.FORMAT}", raw.get("format"))
        return build(kind, raw, where="header", manual="pipelines/contracts/segment.md")
    except (FileNotFoundError, ValueError, InvalidConfig) as error:
        raise IntegrityError(
            f"{path} cannot be understood", expected=f"a whole {kind.__name__} of format {kind.FORMAT}",
            got=repr(error), remedy=REMEDY,
        ) from error


def _require_identity(header: SegmentHeader | DeltaHeader) -> None:
    version_number(str(header.version))


def _require_files(files: dict[str, str], names: tuple[str, ...]) -> None:
    _require(sorted(files) == sorted(names), f"the SHA-256 of {names}", files)
    for sha256 in files.values():
        sha256_name(sha256)


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got}")
