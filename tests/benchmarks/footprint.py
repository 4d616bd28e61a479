"""What a row costs with its index: the segment on disk and in memory, and Redis in its three forms."""

from collections.abc import Iterator

from tests.benchmarks.bench import Bench, segment_bytes
from tests.benchmarks.feast_stock import open_store, redis_store, stock_repository
from tests.benchmarks.harness import Result, sizes_compared
from tests.benchmarks.materialize import materialize
from tests.benchmarks.redis_packed import load_packed
from tests.benchmarks.redis_raw import keys_of, load_wire, used_bytes
from tests.benchmarks.synthetic import ROW_BYTES, record_batches, table_file
from tests.redis_server import RedisServer

__all__ = ["bytes_per_row"]

RAW = "Redis, a key and a value per row"


def bytes_per_row(bench: Bench) -> Iterator[Result]:
    """Bytes per row at two sizes."""
    sizes = bench.sizes
    feast = _feast_redis(bench)
    for rows, suffix in ((sizes.stream, ""), (sizes.lookup, "_larger_table")):
        segment, raw, packed = segment_bytes(bench.segment(rows)) / rows, _raw_redis(bench, rows), _packed(bench, rows)
        conditions = {"rows": rows, "row_bytes": ROW_BYTES}
        yield sizes_compared(
            f"bytes_per_row_segment{suffix}", ours=segment, rival=raw, rival_name=RAW, **conditions,
            measured="ours: all files of the segment; Redis: used_memory with the rows less without",
        )
        yield sizes_compared(
            f"bytes_per_row_redis{suffix}", ours=packed, rival=raw, rival_name=RAW, **conditions,
            measured="used_memory with the rows less without, both",
        )
        if not suffix:
            yield sizes_compared(
                "bytes_per_row_vs_feast_redis", ours=segment, rival=feast, rival_name="Feast's Redis online store",
                **conditions, rival_rows=sizes.feast,
            )


def _raw_redis(bench: Bench, rows: int) -> float:
    path = table_file(bench.repository(rows).workspace)
    with RedisServer() as server:
        client = server.client()
        before = used_bytes(client)
        load_wire(server.socket_path, record_batches(path))
        for batch in record_batches(path, rows=4096):  # reading also finishes the growing of the dictionary
            client.mget(keys_of(batch["id"].to_numpy()))
        return (used_bytes(client) - before) / rows


def _packed(bench: Bench, rows: int) -> float:
    with RedisServer() as server:
        before = used_bytes(server.client())
        load_packed(server, bench.repository(rows).workspace, scratch=bench.scratch)
        return (used_bytes(server.client()) - before) / rows


def _feast_redis(bench: Bench) -> float:
    rows = bench.sizes.feast
    with RedisServer() as server:
        before = used_bytes(server.client())
        materialize(open_store(stock_repository(bench.repository(rows), "footprint", redis_store(server))))
        return (used_bytes(server.client()) - before) / rows
