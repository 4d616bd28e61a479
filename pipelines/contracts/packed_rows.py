"""The rows of one table of one version in a key-value server: buckets of about sixteen rows under computed keys.

```
id ──hash──► bucket ──► key   {item.kge@7:1f0c9a3b/00d2}0000a41f          (everything up to } is its shard's)
                        value  id │ row │ id │ row │ … │ CRC-32
                               8 B          ascending      4 B, over all before it
```

A key and value of their own for every row would cost the server three times the row; a bucket shares that cost, and
its ids keep lookups exact. The keys follow from the table's layout record alone, so that a table is deleted without
asking the server what it has. The part in braces is what a Redis cluster hashes: the buckets of a shard share a slot,
and shard s of 64 lies in the s-th 64th of the slots. It names the manifest, so that no two writers ever share a key.
"""

import binascii
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
from numba import njit

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.hashing import bucket_of
from pipelines.contracts.ids import batch_of
from pipelines.contracts.perfect_hash import load64
from pipelines.contracts.spec import TableSpec

__all__ = ["BUCKET_ROWS", "SHARDS", "PackedLayout", "are_whole", "find_rows", "pack", "unpack"]

FORMAT = 1
BUCKET_ROWS = 16  # on average. 12: 6 % more memory; 24: 2 % less, and half as much again to fetch for an id
SHARDS = 64
SEED = 0x5EED  # of the hash that spreads ids over buckets
ID_BYTES, CRC_BYTES = 8, 4

_SLOTS = 16_384
_CRC_OF_WHOLE = 0x2144DF1C  # CRC-32 of any bytes followed by their own CRC-32, little-endian
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_HEX_SHIFTS = np.arange(28, -4, -4)


@dataclass(frozen=True)
class PackedLayout:
    """The record that says how a table is laid out; stored beside it, as JSON.

    Attributes:
        buckets: how many; at least 1.
        sha256: over the values of all buckets in order; None until all are written.

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

    @classmethod
    def plan(cls, spec: TableSpec, *, version: int, manifest_sha256: str) -> Self:
        return cls(spec, version, manifest_sha256, max(1, -(-spec.rows // BUCKET_ROWS)))

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
                "format": FORMAT, "version": self.version, "manifest_sha256": self.manifest_sha256,
                "table": self.spec.to_dict(), "buckets": self.buckets, "sha256": self.sha256,
            }
        )

    @classmethod
    def from_json(cls, text: bytes, *, where: str) -> Self:
        """Raises `IntegrityError`, naming `where`, if this is no layout of this format."""
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}")
            return cls(
                TableSpec(**raw["table"]), raw["version"], raw["manifest_sha256"], raw["buckets"], raw["sha256"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{where} cannot be understood", expected=f"a layout of format {FORMAT}", got=repr(error),
                remedy="Delete it and materialize the version again.",
            ) from error


def pack(records: np.ndarray, buckets: np.ndarray, *, count: int) -> list[bytes]:
    """Values of buckets 0 .. count - 1.

    Args:
        records: uint8 (N, record_bytes), id and row; their order within a bucket stays.
        buckets: int64 (N,), the bucket of each, below `count`.

    >>> values = pack(np.array([[7] * 10, [8] * 10], np.uint8), np.array([1, 0]), count=3)
    >>> [len(value) for value in values], are_whole(values)
    ([14, 14, 4], True)
    """
    # 16-bit numbers are sorted by radix, several times as fast
    order = np.argsort(buckets.astype(np.uint16) if count <= 65_536 else buckets, kind="stable")
    view = memoryview(records[order].reshape(-1))
    ends = np.cumsum(np.bincount(buckets, minlength=count)) * records.shape[1]
    return [_with_crc(bytes(view[start:end])) for start, end in pairwise([0, *ends.tolist()])]


def _with_crc(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "little")


def are_whole(values: Sequence[bytes]) -> bool:
    """Whether all of these are what was packed: their CRC-32 fits."""
    return set(map(zlib.crc32, values)) <= {_CRC_OF_WHOLE}


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
