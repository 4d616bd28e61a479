"""The rows of one table of one version in a key-value server: buckets of about sixteen rows under computed keys.

```
id ──hash──► bucket ──► key   {item.kge@7:1f0c9a3b/00d2}0000a41f          (everything up to } is its shard's)
                        value  id │ row │ id │ row │ … │ CRC-32
                               8 B          ascending      4 B, over manifest, key and all before it
```

A key and value of their own for every row would cost the server three times the row; a bucket shares that cost, and
its ids keep lookups exact. The keys follow from the table's layout record alone, so that a table is deleted without
asking the server what it has. A value is whole only under its own key: one that was renamed, or copied from another
table, is told by its checksum. The part in braces is what a Redis cluster hashes: the buckets of a shard share a slot,
and shard s of 64 lies in the s-th 64th of the slots. It names the manifest, so that no two writers ever share a key.
"""

import binascii
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, repeat
from typing import Self

import numpy as np
from numba import njit

from pipelines.contracts.errors import IntegrityError, InvalidConfig
from pipelines.contracts.hashing import bucket_of
from pipelines.contracts.ids import batch_of
from pipelines.contracts.names import version_number
from pipelines.contracts.perfect_hash import load64
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.strict import build

__all__ = ["BUCKET_ROWS", "FORMAT", "SHARDS", "PackedLayout", "find_rows", "pack", "unpack"]

FORMAT = 2
UNBOUND = 1  # the format before: a checksum over the records alone, under the same keys
BUCKET_ROWS = 16  # on average. 12: 6 % more memory; 24: 2 % less, and half as much again to fetch for an id
SHARDS = 64
SEED = 0x5EED  # of the hash that spreads ids over buckets
ID_BYTES, CRC_BYTES = 8, 4

_SLOTS = 16_384
_CRC_OF_WHOLE = 0x2144DF1C  # CRC-32 of any bytes followed by their own CRC-32, little-endian, whatever it starts from
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_HEX_SHIFTS = np.arange(28, -4, -4)


@dataclass(frozen=True)
class PackedLayout:
    """The record that says how a table is laid out; stored beside it, as JSON.

    Attributes:
        buckets: how many; at least 1.
        sha256: over the values of all buckets in order; None until all are written.
        format: a table of format `UNBOUND` can be deleted by its layout, but not read.

    >>> spec = TableSpec("item.kge", 8, 40, "int4", "vocabulary", "00" * 8)
    >>> layout = PackedLayout.plan(spec, version=7, manifest_sha256="1f0c9a3b55")
    >>> layout.buckets, layout.keys(np.array([2]))
    (3, [b'{item.kge@7:1f0c9a3b/003b}00000002'])
    """

    spec: TableSpec
    version: int
    manifest_sha256: str
    buckets: int
    sha256: str | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format not in (FORMAT, UNBOUND):
            raise ValueError(f"expected format {FORMAT}, got {self.format}")
        version_number(str(self.version))
        if self.buckets != _buckets(self.spec):
            raise ValueError(f"expected {_buckets(self.spec)} buckets for {self.spec.rows} rows, got {self.buckets}")

    @classmethod
    def plan(cls, spec: TableSpec, *, version: int, manifest_sha256: str) -> Self:
        return cls(spec, version, manifest_sha256, _buckets(spec))

    @property
    def record_bytes(self) -> int:
        """Bytes of a row with its id."""
        return ID_BYTES + self.spec.row_bytes

    def sealed(self, sha256: str) -> Self:
        return replace(self, sha256=sha256)

    def bucket_of(self, ids: np.ndarray) -> np.ndarray:
        """Bucket of each stored id: int64 (N,) -> int64 (N,)."""
        return bucket_of(ids, buckets=self.buckets, seed=SEED)

    def keys(self, buckets: np.ndarray) -> list[bytes]:
        """Key of each bucket: int64 (K,)."""
        text = np.empty((len(buckets), self._tags.shape[1] + len(_HEX_SHIFTS)), np.uint8)
        text[:, : self._tags.shape[1]] = self._tags[buckets * SHARDS // self.buckets]
        text[:, self._tags.shape[1] :] = _HEX[(buckets[:, None] >> _HEX_SHIFTS) & 15]
        return text.view(f"S{text.shape[1]}").reshape(-1).tolist()

    def seal(self, keys: Sequence[bytes], contents: Sequence[bytes]) -> list[bytes]:
        """The values of keys: contents as `pack` gives them, each with its checksum."""
        crcs = map(zlib.crc32, contents, map(zlib.crc32, keys, repeat(self._crc_start)))
        return [content + crc.to_bytes(CRC_BYTES, "little") for content, crc in zip(contents, crcs, strict=True)]

    def are_whole(self, keys: Sequence[bytes], values: Sequence[bytes]) -> bool:
        """Whether each value is what was sealed under its key.

        >>> layout = PackedLayout.plan(
        ...     TableSpec("item.kge", 8, 40, "int4", "vocabulary", "00" * 8), version=7, manifest_sha256="1f0c9a3b55"
        ... )
        >>> values = layout.seal([b"a", b"b"], [b"1", b"2"])
        >>> layout.are_whole([b"a", b"b"], values), layout.are_whole([b"b", b"a"], values)
        (True, False)
        """
        return set(map(zlib.crc32, values, map(zlib.crc32, keys, repeat(self._crc_start)))) <= {_CRC_OF_WHOLE}

    @cached_property
    def _crc_start(self) -> int:
        return zlib.crc32(self.manifest_sha256.encode())

    def runs(self, first: int, end: int, *, most: int) -> Iterator[np.ndarray]:
        """Buckets first .. end - 1 in order, as runs of at most `most` that lie in one shard each."""
        while first < end:
            next_shard = -(-(first * SHARDS // self.buckets + 1) * self.buckets // SHARDS)
            stop = min(end, next_shard, first + most)
            yield np.arange(first, stop)
            first = stop

    @cached_property
    def _tags(self) -> np.ndarray:
        """What the keys of each shard begin with, uint8 (SHARDS, width): the first tags found that cover the slots."""
        tags: dict[int, bytes] = {}
        nonce = 0
        while len(tags) < SHARDS:
            tag = f"{self.spec.name}@{self.version}:{self.manifest_sha256[:8]}/{nonce:04x}".encode()
            # the CRC-16 of Redis is the one of XMODEM, which Python has
            tags.setdefault(binascii.crc_hqx(tag, 0) % _SLOTS * SHARDS // _SLOTS, b"{" + tag + b"}")
            nonce += 1
        return np.array([np.frombuffer(tags[shard], np.uint8) for shard in range(SHARDS)])

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": self.format, "version": self.version, "manifest_sha256": self.manifest_sha256,
                "table": self.spec.to_dict(), "buckets": self.buckets, "sha256": self.sha256,
            }
        )

    @classmethod
    def from_json(cls, text: bytes, *, where: str) -> Self:
        """Raises `IntegrityError`, naming `where`, if this is no layout of this format."""
        try:
            written = build(_Written, json.loads(text), where=where, manual="pipelines/contracts/packed_rows.py")
            return cls(
                written.table, written.version, written.manifest_sha256, written.buckets, written.sha256,
                written.format,
            )
        except (ValueError, RecursionError, InvalidConfig) as error:
            raise IntegrityError(
                f"{where} cannot be understood", expected=f"a layout of format {FORMAT}", got=repr(error),
                remedy="Delete it and materialize the version again.",
            ) from error


@dataclass(frozen=True)
class _Written:
    """A layout as JSON has it."""

    format: int
    version: int
    manifest_sha256: str
    table: TableSpec
    buckets: int
    sha256: str | None


def _buckets(spec: TableSpec) -> int:
    return max(1, -(-spec.rows // BUCKET_ROWS))


def pack(records: np.ndarray, buckets: np.ndarray, *, count: int) -> list[bytes]:
    """Records of buckets 0 .. count - 1, which `PackedLayout.seal` makes values of.

    Args:
        records: uint8 (N, record_bytes), id and row; their order within a bucket stays.
        buckets: int64 (N,), the bucket of each, below `count`.

    >>> packed = pack(np.array([[7] * 10, [8] * 10], np.uint8), np.array([1, 0]), count=3)
    >>> [content.hex() for content in packed]
    ['08080808080808080808', '07070707070707070707', '']
    """
    # 16-bit numbers are sorted by radix, several times as fast
    order = np.argsort(buckets.astype(np.uint16) if count <= 65_536 else buckets, kind="stable")
    view = memoryview(records[order].reshape(-1))
    ends = np.cumsum(np.bincount(buckets, minlength=count)) * records.shape[1]
    return [bytes(view[start:end]) for start, end in pairwise([0, *ends.tolist()])]


def unpack(value: bytes, *, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 (n,) and rows uint8 (n, row_bytes) of one value."""
    records = np.frombuffer(value[:-CRC_BYTES], np.uint8).reshape(-1, ID_BYTES + row_bytes)
    return records[:, :ID_BYTES].copy().view("<i8").reshape(-1), records[:, ID_BYTES:]


def find_rows(
    values: Sequence[bytes], ids: np.ndarray, places: np.ndarray, *, row_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Look every id up in the value of its bucket.

    Args:
        values: K whole values.
        ids: int64 (B,).
        places: int64 (B,), which value each id would be in.

    Returns:
        rows: uint8 (B, row_bytes), undefined where none was found.
        found: bool (B,).
    """
    bounds = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=bounds[1:])
    rows, found = np.empty((len(ids), row_bytes), np.uint8), np.zeros(len(ids), np.bool_)
    _find(np.frombuffer(b"".join(values), np.uint8), bounds, batch_of(ids), places, rows, found)
    return rows, found


@njit(nogil=True, cache=True)
def _find(buffer, bounds, ids, places, rows, found):
    record_bytes = 8 + rows.shape[1]
    for i in range(len(ids)):
        at, last = bounds[places[i]], bounds[places[i] + 1] - 4 - record_bytes
        while at <= last:
            if load64(buffer, at) == np.uint64(ids[i]):
                rows[i] = buffer[at + 8 : at + record_bytes]
                found[i] = True
                break
            at += record_bytes
