"""One client of a lookup, as a process of its own, and what it asks.

`python -m tests.benchmarks.lookup_client KIND ADDRESS BATCH ROWS REQUEST_BYTES` asks as often as a line on stdin says,
and prints what every call took: a JSON list of seconds. In one process, a client would find the caches full of what
the others do.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.benchmarks.harness import timed
from tests.releases import entity_ids

__all__ = ["KINDS", "TABLE", "ClientSide"]

TABLE = "item.kge"
KINDS = {
    "ours": "LookupClient to a CPU host",
    "echo": "grpc echo of as many raw bytes",
    "socket": "the same messages over a Unix socket",
}
"""Kind -> what it is."""


@dataclass(frozen=True)
class ClientSide:
    """A contestant as `harness.Side` is, whose calls are made, and timed, by a process of this module.

    Attributes:
        process: with pipes.
        calls: of a turn.
    """

    name: str
    process: subprocess.Popen
    calls: int

    def turn(self) -> Sequence[float]:
        print(self.calls, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client of {self.name} has ended")
        return json.loads(line)

    def after(self) -> None:
        """A turn leaves nothing."""


def _asking(kind: str, address: str, message: bytes) -> Callable[[np.ndarray], Any]:
    if kind == "ours":
        from online.lookup.client import LookupClient

        client = LookupClient([address])
        return lambda ids: client.lookup([1], {TABLE: ids})
    if kind == "socket":
        from tests.benchmarks.socket_server import SocketClient

        over_socket = SocketClient(address)
        return lambda ids: over_socket.lookup(1, TABLE, ids)
    import grpc

    from tests.benchmarks.echo_server import METHOD

    echo = grpc.insecure_channel(address).unary_unary(METHOD)
    return lambda ids: echo(message, timeout=2)


def _main(kind: str, address: str, batch: int, rows: int, request_bytes: int, lines: Iterable[str]) -> None:
    ask = _asking(kind, address, bytes(request_bytes))
    random, known = np.random.default_rng(0), entity_ids("item", rows)
    for line in lines:
        asked = [random.choice(known, batch) for _ in range(int(line))]
        print(json.dumps([timed(ask, ids) for ids in asked]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:3], *map(int, sys.argv[3:6]), sys.stdin)
