"""How fast 512 random ids become rows: the segment, and everything else that could answer, over the same rows."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from feast import FeatureStore

from online.ranking.scorer import dequantize
from pipelines.contracts.segment import Segment
from tests.benchmarks.bench import Bench
from tests.benchmarks.fbgemm_lookup import FbgemmTable, HashTable, PrunedMap
from tests.benchmarks.feast_stock import open_store, redis_store, stock_repository
from tests.benchmarks.harness import Result, Side, Timing, interleave, speeds_compared
from tests.benchmarks.materialize import materialize
from tests.benchmarks.redis_packed import load_packed, open_packed
from tests.benchmarks.redis_raw import keys_of, load_wire
from tests.benchmarks.sorted_array import SortedArray, rows_of
from tests.benchmarks.synthetic import DIM, ROW_BYTES, record_batches, table_file, view_of
from tests.redis_server import RedisServer

__all__ = ["lookups"]


class _Table:
    """The table of `bench.sizes.lookup` rows in memory, and the sides that read it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows = bench, bench.sizes.lookup
        self.path = table_file(bench.repository(self.rows).workspace)
        self.ids = pq.read_table(self.path, columns=["id"])["id"].to_numpy().copy()  # torch wants it writable
        self.packed = np.empty((self.rows, ROW_BYTES), np.uint8)
        end = 0
        for batch in record_batches(self.path):
            start, end = end, end + batch.num_rows
            self.packed[start:end] = rows_of(batch["row"], ROW_BYTES)
        self.offsets = {kind: torch.arange(bench.sizes.batch + 1, dtype=kind) for kind in (torch.int64, torch.int32)}
        self.rng = np.random.default_rng(1)

    def side(self, name: str, call: Callable[[Any], Any], given: Callable[[np.ndarray], Any]) -> Side:
        """A side whose calls get what `given` makes of random row numbers (B,), distinct within a call."""
        sizes = self.bench.sizes
        return Side(name, call, lambda: [given(self.numbers()) for _ in range(sizes.calls)])

    def numbers(self) -> np.ndarray:
        return self.rng.choice(self.rows, min(self.bench.sizes.batch, self.rows), replace=False)

    def ours(self) -> tuple[Side, Side]:
        """ids to packed rows, and ids to fp32 rows as `online.ranking.scorer` does it."""
        segment = Segment.open(self.bench.segment(self.rows))
        spec = segment.spec
        known = lambda numbers: self.ids[numbers]  # noqa: E731
        return (
            self.side("Segment.lookup to packed rows", segment.lookup, known),
            self.side(
                "Segment.lookup and FBGEMM's dequantize to fp32",
                lambda ids: dequantize(segment.lookup(ids)[0], spec, device="cpu"), known,
            ),
        )

    def fbgemm(self) -> list[Side]:
        """FBGEMM's chains from keys to fp32; each answers with our rows, or is not measured."""
        table = FbgemmTable(self.packed, dim=DIM)
        keys = torch.from_numpy(np.random.default_rng(2).permutation(self.rows).astype(np.int32))
        ids = torch.from_numpy(self.ids)
        sides = []
        for name, index, made in (
            ("pruned_hashmap_lookup of int64 ids + INT4 TBE", HashTable(ids), ids),
            ("pruned_hashmap_lookup of int32 ids + INT4 TBE", HashTable(keys), keys),
            ("PrunedMapCPU of int32 ids + INT4 TBE", PrunedMap(keys), keys),
        ):
            offsets = self.offsets[made.dtype]

            def chain(asked: torch.Tensor, index: Any = index, offsets: torch.Tensor = offsets) -> torch.Tensor:
                return table.rows(index.numbers(asked, offsets), offsets)

            self._require_same(name, chain, made)
            sides.append(self.side(name, chain, lambda numbers, made=made: made[torch.from_numpy(numbers)]))
        return sides

    def _require_same(self, name: str, chain: Callable[[torch.Tensor], torch.Tensor], keys: torch.Tensor) -> None:
        numbers = self.numbers()
        expected = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(torch.from_numpy(self.packed[numbers]), 4)
        if not torch.allclose(chain(keys[torch.from_numpy(numbers)]), expected, rtol=0, atol=1e-5):
            raise RuntimeError(f"{name}: other rows than were published")

    def index_select(self) -> Side:
        """Rows whose numbers are known already: no index at all."""
        rows = torch.from_numpy(self.packed)
        return self.side("torch.index_select of known rows", lambda n: rows.index_select(0, n), torch.from_numpy)

    def sorted_array(self) -> Side:
        directory = self.bench.scratch / "sorted_lookup"
        SortedArray.write(directory, record_batches(self.path), rows=self.rows, row_bytes=ROW_BYTES)
        table = SortedArray(directory)
        _touch(table.ids, table.rows)
        return self.side("numpy.searchsorted in sorted ids, and a gather", table.lookup, lambda n: self.ids[n])

    def redis_mget(self, server: RedisServer) -> Side:
        client = server.client()
        load_wire(server.socket_path, record_batches(self.path))
        for batch in record_batches(self.path, rows=4096):  # every key once: Redis also finishes growing its dictionary
            if None in client.mget(keys_of(batch["id"].to_numpy())):
                raise RuntimeError("MGET: a row that was written is not there")
        return self.side("Redis MGET", client.mget, lambda numbers: keys_of(self.ids[numbers]))

    def redis_packed(self, server: RedisServer) -> Side:
        load_packed(server, self.bench.repository(self.rows).workspace, scratch=self.bench.scratch)
        reader = open_packed(server, scratch=self.bench.scratch)
        return self.side("our packed form in Redis", reader.lookup, lambda numbers: self.ids[numbers])


def lookups(bench: Bench) -> Iterator[Result]:
    """All sides in one series, one thread each, and Feast over a smaller table."""
    torch.set_num_threads(1)
    table = _Table(bench)
    with ExitStack() as stack, torch.inference_mode():
        packed, fp32 = table.ours()
        fbgemm, index_select, sorted_array = table.fbgemm(), table.index_select(), table.sorted_array()
        mget = table.redis_mget(stack.enter_context(RedisServer()))
        redis_packed = table.redis_packed(stack.enter_context(RedisServer()))
        feast, our_feast = _feast(bench, stack.enter_context(RedisServer()))
        sides = [packed, fp32, *fbgemm, index_select, sorted_array, mget, redis_packed, feast, our_feast]
        timings = interleave(sides, rounds=bench.sizes.rounds, label=f"lookup of {bench.sizes.batch}")
    conditions = {
        "rows": table.rows, "batch": bench.sizes.batch, "row_bytes": ROW_BYTES, "threads": 1,
        "tables": "filled and read once before", "ids": "random known ids, other ones in each call, made before timing",
    }
    fastest: Timing = min((timings[side.name] for side in fbgemm), key=lambda timing: timing.seconds)
    others = {side.name: timings[side.name].seconds * 1e6 for side in fbgemm}

    def result(name: str, ours: Side, rival: Timing, **more: Any) -> Result:
        return speeds_compared(name, ours=timings[ours.name], rival=rival, **conditions | more)

    yield result("lookup512_vs_fbgemm", fp32, fastest, answer="fp32 rows", fbgemm_chains_us=others)
    yield result("lookup512_vs_index_select", packed, timings[index_select.name], answer="packed rows")
    yield result("index_lookup_vs_sorted_array", packed, timings[sorted_array.name], answer="packed rows, found mask")
    redis = {"answer": "packed rows (MGET: a list of bytes)", "redis": "Unix socket, redis-py and hiredis; MGET's keys "
             "packed before timing"}
    yield result("lookup512_vs_redis_mget", packed, timings[mget.name], **redis)
    yield result("redis_packed_lookup512", redis_packed, timings[mget.name], **redis)
    small = {"answer": "packed rows (Feast: its response object)", "rival_rows": _feast_rows(bench)}
    yield result("lookup512_vs_feast_redis", packed, timings[feast.name], **small, redis="Unix socket")
    small = {"answer": "Feast's response object", "rows": _feast_rows(bench)}
    yield result("get_online_features512_vs_feast_redis", our_feast, timings[feast.name], **small, redis="Unix socket")


def _feast_rows(bench: Bench) -> int:
    """Feast's time does not depend on the size of its table; loading it does."""
    return min(bench.sizes.feast, 100_000)


def _feast(bench: Bench, server: RedisServer) -> list[Side]:
    """`get_online_features` over Feast's Redis store, and over ours."""
    rows, rng = _feast_rows(bench), np.random.default_rng(3)
    repository = bench.repository(rows)
    bench.segment(rows)
    stock = open_store(stock_repository(repository, "lookup", redis_store(server)))
    materialize(stock)
    ids = pq.read_table(table_file(repository.workspace), columns=["id"])["id"].to_numpy()
    batch, calls = min(bench.sizes.batch, rows), max(3, bench.sizes.calls // 10)
    sides = []
    for name, store in (
        ("Feast get_online_features on Redis", stock), ("Feast get_online_features on segments", repository.store())
    ):

        def read(asked: list[int], store: FeatureStore = store) -> Any:
            return store.get_online_features(features=[f"{view_of()}:row"], entity_rows={"item": asked})

        if None in read(ids[:1000].tolist()).to_dict()["row"]:
            raise RuntimeError(f"{name}: a row that was materialized is not there")
        sides.append(Side(name, read, lambda: [rng.choice(ids, batch, replace=False).tolist() for _ in range(calls)]))
    return sides


def _touch(*arrays: np.ndarray) -> None:
    for array in arrays:
        array.sum(dtype=np.int64)
