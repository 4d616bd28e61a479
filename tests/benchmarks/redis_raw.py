"""Plain Redis as it is used for embeddings: one key of 8 bytes (the id) and one value (the packed row) per row."""

import socket
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import redis

from tests.benchmarks.sorted_array import rows_of
from tests.benchmarks.synthetic import ROW_BYTES
from tests.redis_server import RedisServer

__all__ = ["PIPELINES", "keys_of", "load_pipelined", "load_wire", "patient", "used_bytes"]

PIPELINES = ((100, 50), (500, 10), (1000, 10), (5000, 2), (5000, 10))
"""(keys of an MSET, MSETs of a pipeline) to choose the fastest from."""

WIRE_KEYS = 512
_PAIR = np.dtype([("a", "S4"), ("key", "V8"), ("b", "S7"), ("row", f"V{ROW_BYTES}"), ("c", "S2")])


def patient(server: RedisServer) -> redis.Redis:
    """A client that waits for slow answers: deleting millions of keys takes longer than others allow for one."""
    return redis.from_url(server.url, socket_timeout=600)


def keys_of(ids: np.ndarray) -> list[bytes]:
    """The 8 bytes of each id."""
    return ids.view("V8").tolist()


def load_pipelined(
    client: redis.Redis, batches: Iterable[pa.RecordBatch], *, keys_an_mset: int, msets_a_pipeline: int
) -> None:
    """Write every row with redis-py and hiredis: pipelined MSETs."""
    for batch in batches:
        pairs: list[bytes] = [b""] * (2 * batch.num_rows)
        pairs[0::2] = keys_of(batch["id"].to_numpy())
        pairs[1::2] = rows_of(batch["row"], ROW_BYTES).view(f"V{ROW_BYTES}").ravel().tolist()
        msets = [pairs[start : start + 2 * keys_an_mset] for start in range(0, len(pairs), 2 * keys_an_mset)]
        for start in range(0, len(msets), msets_a_pipeline):
            with client.pipeline(transaction=False) as pipeline:
                for mset in msets[start : start + msets_a_pipeline]:
                    pipeline.execute_command("MSET", *mset)
                pipeline.execute()


def load_wire(socket_path: str, batches: Iterable[pa.RecordBatch]) -> None:
    """Write every row as fast as the server takes it: MSETs laid out by numpy as they lie on the wire, no client."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(socket_path)
        for batch in batches:
            pairs = np.empty(batch.num_rows, _PAIR)
            pairs["a"], pairs["b"], pairs["c"] = b"$8\r\n", f"\r\n${ROW_BYTES}\r\n".encode(), b"\r\n"
            pairs["key"] = batch["id"].to_numpy().view("V8")
            pairs["row"] = rows_of(batch["row"], ROW_BYTES).view(f"V{ROW_BYTES}").ravel()
            msets = [pairs[start : start + WIRE_KEYS] for start in range(0, len(pairs), WIRE_KEYS)]
            for mset in msets:
                wire.sendall(b"*%d\r\n$4\r\nMSET\r\n" % (1 + 2 * len(mset)))
                wire.sendall(mset)
            replies = wire.recv(5 * len(msets), socket.MSG_WAITALL)
            if replies != b"+OK\r\n" * len(msets):
                raise redis.ResponseError(f"MSET was answered with {replies[:200]!r}")


def used_bytes(client: redis.Redis) -> int:
    """Memory that the server has allocated."""
    return client.info("memory")["used_memory"]
