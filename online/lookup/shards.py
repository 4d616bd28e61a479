"""Which part of the ids a CPU host answers, and how a batch is cut into those parts and put together again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.ids import batch_of
from pipelines.contracts.segment_index import finalize

__all__ = ["MAX_SHARDS", "Cut", "Shard", "cut", "shard_of", "targets_by_shard"]

MAX_SHARDS = 4096

_U32 = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count` of the ids, by the formula of `lookup.proto`; 0/1 is all of them.

    >>> Shard.parse("0/2")
    Shard(index=0, count=2)

    Raises:
        InvalidConfig: there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAX_SHARDS:
            raise InvalidConfig(
                "shard", expected=f"index/count with 0 <= index < count <= {MAX_SHARDS}", got=str(self),
                remedy="Count shards from 0, as in 0/2 and 1/2.",
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that `index/count` names, in decimal digits; raises `InvalidConfig`."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not match:
            raise InvalidConfig(
                "shard", expected="index/count", got=repr(text), remedy="Count shards from 0, as in 0/2 and 1/2."
            )
        return cls(int(match[1]), int(match[2]))

    def strays(self, ids: np.ndarray) -> int:
        """How many of `ids` (int64 (B,)) fall into another shard."""
        return 0 if self.count == 1 else _strays(batch_of(ids), self.index, self.count)


def targets_by_shard(targets: Sequence[str]) -> list[list[str]]:
    """Addresses by shard, replicas together, of `host:port`, which has all ids, or `index/count=host:port`.

    >>> targets_by_shard(["0/2=a:1", "1/2=b:1", "0/2=c:1"])
    [['a:1', 'c:1'], ['b:1']]

    Raises:
        InvalidConfig: there are none, they divide the ids in different ways, a shard is missing, or an address is
            named twice.
    """
    shards: dict[Shard, list[str]] = {}
    for target in targets:
        shard, equals, address = target.rpartition("=")
        shards.setdefault(Shard.parse(shard) if equals else Shard(0, 1), []).append(address)
    counts = {shard.count for shard in shards}
    if len(counts) != 1:
        raise InvalidConfig(
            "servers", expected="at least one host:port, or each shard as index/count=host:port, all of one count",
            got=", ".join(targets) or "none", remedy="Name replicas of one division of the ids.",
        )
    missing = [str(shard) for shard in (Shard(i, max(counts)) for i in range(max(counts))) if shard not in shards]
    if missing:
        raise InvalidConfig(
            "servers", expected="at least one for every shard", got=f"none for {', '.join(missing)}",
            remedy="Name a host of each, as index/count=host:port.",
        )
    addresses = [address for replicas in shards.values() for address in replicas]
    if len(set(addresses)) < len(addresses):
        raise InvalidConfig(
            "servers", expected="every address once", got=", ".join(targets),
            remedy="Name each host once; `connections` opens several connections to each.",
        )
    return [shards[shard] for shard in sorted(shards, key=lambda shard: shard.index)]


def shard_of(ids: np.ndarray, count: int) -> np.ndarray:
    """Shard of each id among `count`: int64 (B,) -> int64 (B,).

    >>> shard_of(np.arange(8), 2).tolist()
    [0, 0, 1, 0, 1, 1, 1, 0]
    """
    ids = batch_of(ids)
    shards = np.empty(len(ids), np.int64)
    _shard_of(ids, count, shards)
    return shards


@dataclass(frozen=True, slots=True)
class Cut:
    """A batch in the order of its shards.

    ```
    batch   7 3 9 4        ids     3 4 | 7 9      of shard s: ids[bounds[s] : bounds[s + 1]]
    shard   1 0 1 0        places  1 3 | 0 2      where each of them stood in the batch
    ```

    Attributes:
        ids, places: int64 (B,).
        bounds: S + 1 numbers.
    """

    ids: np.ndarray
    places: np.ndarray
    bounds: list[int]

    def of(self, shard: int) -> np.ndarray:
        """The ids of one shard, in the order in which they stand in the batch."""
        return self.ids[self.bounds[shard] : self.bounds[shard + 1]]

    def put_back(self, shard: int, part: np.ndarray, whole: np.ndarray) -> None:
        """Copy a shard's answers, (n, ...) in the order of its ids, to where its ids stood in `whole`, (B, ...)."""
        whole[self.places[self.bounds[shard] : self.bounds[shard + 1]]] = part


def cut(ids: np.ndarray, count: int) -> Cut:
    """Sort a batch, int64 (B,), by shard; within a shard the order stays."""
    ids = batch_of(ids)
    by_shard, places, bounds = np.empty_like(ids), np.empty_like(ids), np.zeros(count + 1, np.int64)
    _cut(ids, count, by_shard, places, bounds)
    return Cut(by_shard, places, bounds.tolist())


@njit(nogil=True, cache=True)
def _shard(id_, count):
    # every operand unsigned: with a signed one the product would become a float
    return np.int64(((finalize(np.uint64(id_)) >> _U32) * np.uint64(count)) >> _U32)


@njit(nogil=True, cache=True)
def _shard_of(ids, count, shards):
    for i in range(len(ids)):
        shards[i] = _shard(ids[i], count)


@njit(nogil=True, cache=True)
def _strays(ids, index, count):
    strays = 0
    for id_ in ids:
        strays += _shard(id_, count) != index
    return strays


@njit(nogil=True, cache=True)
def _cut(ids, count, by_shard, places, bounds):
    for id_ in ids:
        bounds[_shard(id_, count) + 1] += 1
    for shard in range(count):
        bounds[shard + 1] += bounds[shard]
    cursor = bounds[:-1].copy()
    for i in range(len(ids)):
        shard = _shard(ids[i], count)
        by_shard[cursor[shard]], places[cursor[shard]] = ids[i], i
        cursor[shard] += 1
