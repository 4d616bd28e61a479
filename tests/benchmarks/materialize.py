"""How fast a published table becomes readable: `feast materialize` with our engine, with Feast's own, and raw Redis."""

import contextlib
import io
import sqlite3
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from feast import FeatureStore

from pipelines.contracts.durable import remove_directory
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_writer import write_segment
from tests.benchmarks.bench import Bench, different_rows
from tests.benchmarks.feast_stock import open_store, redis_store, sqlite_path, sqlite_store, stock_repository
from tests.benchmarks.harness import Result, Side, interleave, measured, speeds_compared
from tests.benchmarks.redis_packed import load_packed
from tests.benchmarks.redis_raw import PIPELINES, load_pipelined, load_wire, patient
from tests.benchmarks.sorted_array import SortedArray
from tests.benchmarks.synthetic import ROW_BYTES, TABLE, record_batches, table_file, view_of
from tests.redis_server import RedisServer
from tests.releases import WIDE_RANGE

__all__ = ["against_feast", "against_redis", "against_sorted_array"]

OURS = "FeatureStore.materialize, SegmentEngine"


def materialize(store: FeatureStore) -> None:
    """`feast materialize` of the table's view over all time, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        store.materialize(*WIDE_RANGE, feature_views=[view_of()])


def _ours(bench: Bench, rows: int) -> Side:
    """Our engine on the version of that size; counts every row and removes the segment after each round."""
    repository = bench.repository(rows)
    bench.drop_segment(rows)

    def after() -> None:
        got = Segment.open(repository.workspace.segment(1, TABLE), verify=False).spec.rows
        _require_rows(OURS, rows, got)
        bench.drop_segment(rows)

    return Side(OURS, materialize, inputs=lambda: (repository.store(),), after=after)


def _require_rows(who: str, expected: int, got: int) -> None:
    if got != expected:
        raise RuntimeError(f"{who}: expected {expected} rows, got {got}; a side that loses rows is not measured")


def against_feast(bench: Bench) -> Iterator[Result]:
    """Our engine and Feast's own, on the same view over the same Parquet file."""
    rows = bench.sizes.feast
    repository = bench.repository(rows)
    with RedisServer() as server:
        client = server.client()
        sqlite = stock_repository(repository, "sqlite", sqlite_store("sqlite"))
        redis = stock_repository(repository, "redis", redis_store(server))
        redis_fast = stock_repository(repository, "redis_fast", redis_store(server, skip_dedup=True))

        def after_sqlite() -> None:
            with contextlib.closing(sqlite3.connect(sqlite_path(repository, "sqlite"))) as database:
                got = database.execute(f"SELECT count(*) FROM stock_{view_of()}").fetchone()[0]
                database.execute(f"DELETE FROM stock_{view_of()}")
                database.commit()
                database.execute("VACUUM")
            _require_rows("Feast's engine into SQLite", rows, got)

        def after_redis() -> None:
            _require_rows("Feast's engine into Redis", rows, client.dbsize())
            client.flushall()

        sides = [
            _ours(bench, rows),
            Side("Feast's engine into SQLite", materialize, lambda: (open_store(sqlite),), after_sqlite),
            Side("Feast's engine into Redis", materialize, lambda: (open_store(redis),), after_redis),
            Side("Feast's engine into Redis, skip_dedup", materialize, lambda: (open_store(redis_fast),), after_redis),
        ]
        timings = interleave(sides, rounds=bench.sizes.rounds, label="materialize").values()
    ours, into_sqlite, into_redis, into_redis_fast = timings
    conditions = {
        "rows": rows, "row_bytes": ROW_BYTES, "threads": "each as it comes",
        "timed": "FeatureStore.materialize from call to return, on a new store object; same Parquet file, in the cache",
        "feast_settings": "LocalComputeEngine, pull_latest_features, online_write_batch_size 10000",
        "redis": "Unix socket, no persistence",
    }
    yield speeds_compared("materialize_vs_feast_sqlite", ours=ours, rival=into_sqlite, amount=rows, **conditions)
    yield speeds_compared("materialize_vs_feast_redis", ours=ours, rival=into_redis, amount=rows, **conditions)
    yield speeds_compared(
        "materialize_vs_feast_redis_skip_dedup", ours=ours, rival=into_redis_fast, amount=rows, **conditions
    )


def against_redis(bench: Bench) -> Iterator[Result]:
    """Our engine and raw MSETs, on the same Parquet file."""
    rows = bench.sizes.stream
    path = table_file(bench.repository(rows).workspace)
    with RedisServer() as server, patient(server) as client:
        keys, msets = _fastest_pipeline(server, path)

        def after() -> None:
            _require_rows("MSET", rows, client.dbsize())
            client.flushall()

        sides = [
            _ours(bench, rows),
            Side(
                f"pipelined MSET, redis-py and hiredis ({keys} keys an MSET, {msets} MSETs a pipeline)",
                lambda _: load_pipelined(client, record_batches(path), keys_an_mset=keys, msets_a_pipeline=msets),
                after=after,
            ),
            Side(
                "MSETs laid out by numpy, no client library",
                lambda _: load_wire(server.socket_path, record_batches(path)), after=after,
            ),
            Side(
                "our packed form in Redis, written as the engine does",
                lambda _: load_packed(server, bench.repository(rows).workspace, scratch=bench.scratch),
                after=client.flushall,
            ),
        ]
        ours, mset, wire, packed = interleave(sides, rounds=bench.sizes.rounds, label="materialize").values()
    conditions = {
        "rows": rows, "row_bytes": ROW_BYTES, "threads": "each as it comes; the server is a process of its own",
        "timed": "ours: FeatureStore.materialize, hashes and fsync included; Redis: Parquet batches to MSETs over a "
        "Unix socket, no persistence",
    }
    yield speeds_compared("materialize_vs_redis_mset", ours=ours, rival=mset, amount=rows, **conditions)
    yield speeds_compared("redis_packed_write_vs_redis_mset", ours=packed, rival=mset, amount=rows, **conditions)
    yield speeds_compared("materialize_vs_redis_wire", ours=ours, rival=wire, amount=rows, **conditions)
    bench.segment(rows)
    yield measured(
        "materialize_different_rows", ours=different_rows(bench.repository(rows).workspace), unit="rows",
        rows=rows, checked="every published id looked up and compared, byte for byte",
    )


def _fastest_pipeline(server: RedisServer, path: Path) -> tuple[int, int]:
    """The shape of a pipeline that loads the first rows of the table fastest, of three tries each."""
    client, batches = server.client(), list(islice(record_batches(path), 4))
    spent = {}
    for shape in PIPELINES * 3:
        start = time.perf_counter()
        load_pipelined(client, batches, keys_an_mset=shape[0], msets_a_pipeline=shape[1])
        spent[shape] = min(spent.get(shape, float("inf")), time.perf_counter() - start)
        client.flushall()
    return min(spent, key=spent.get)


def against_sorted_array(bench: Bench) -> Iterator[Result]:
    """Writing a segment with its perfect hash, and writing the same rows beside a sorted array of ids."""
    rows = bench.sizes.stream
    workspace = bench.repository(rows).workspace
    manifest = workspace.versions.manifest(1)
    path, segment, sorted_array = table_file(workspace), bench.scratch / "segment", bench.scratch / "sorted"
    sides = [
        Side(
            "write_segment: rows in the order of a perfect hash",
            lambda _: write_segment(
                segment, spec=manifest.table(TABLE), version=1, manifest_sha256=manifest.sha256,
                batches=record_batches(path),
            ),
            after=lambda: remove_directory(segment, within=segment.parent),
        ),
        Side(
            "rows beside a sorted array of ids",
            lambda _: SortedArray.write(sorted_array, record_batches(path), rows=rows, row_bytes=ROW_BYTES),
            after=lambda: remove_directory(sorted_array, within=sorted_array.parent),
        ),
    ]
    ours, rival = interleave(sides, rounds=bench.sizes.rounds, label="index build").values()
    yield speeds_compared(
        "index_build_vs_sorted_array", ours=ours, rival=rival, amount=rows, rows=rows,
        timed="Parquet batches to a flushed and hashed directory; the ids come sorted, so the rival sorts nothing",
    )
