"""Clients that mean harm, beside the traffic: silent ones, ones that read nothing, ones that send junk.

```
with HostileClients(ports) as hostile:      host:port of any of our servers; some may be away
    ...                                     traffic that must not notice
hostile.done                                what they did, by kind
```

None has credentials. They hold what they took for some seconds, let go, and begin again. Junk is refused at once, so it
is sent at a bounded rate: the machine is shared with the traffic, and what it takes to send junk is not what is tested.
"""

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

import numpy as np

from online.proto import lookup_pb2
from tests.online.http2 import PREFACE, Connection, frame
from tests.waiting import joined

__all__ = ["HostileClients"]

HOLD_S = 3.0
PAUSE_S = 0.05
SILENT_CALLS, UNREAD_CALLS, CONNECTIONS, EMPTY_TABLES = 200, 40, 30, 300_000
METHODS = ("/facet.v1.Lookup/Lookup", "/facet.v1.Rank/Rank", "/grpc.health.v1.Health/Check")


class HostileClients:
    """Threads, one for each kind of harm, against servers of this machine chosen at random.

    Args:
        addresses: `host:port` of each.
        versions: that are published, with a table `item.kge`.

    Attributes:
        done: how often each kind was done. A server that is away is tried again.
    """

    def __init__(self, addresses: Sequence[str], *, versions: Sequence[int], seed: int = 0) -> None:
        self._ports = [int(address.rpartition(":")[2]) for address in addresses]
        large = lookup_pb2.TableIds(name="item.kge", ids=np.arange(20_000).tobytes())
        self._large = lookup_pb2.LookupRequest(accepted_versions=versions, tables=[large]).SerializeToString()
        self._many = lookup_pb2.LookupRequest(tables=[lookup_pb2.TableIds()] * EMPTY_TABLES).SerializeToString()
        self.done: Counter[str] = Counter()
        self._over, self._seed = threading.Event(), seed
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        kinds = (self._silent, self._unread, self._many_fields, self._junk, self._idle_connections)
        for number, kind in enumerate(kinds):
            chance = random.Random(self._seed * len(kinds) + number)
            self._threads.append(threading.Thread(target=self._again_and_again, args=(kind, chance)))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        joined(*self._threads)

    def _again_and_again(self, kind: Callable[[int, random.Random], None], chance: random.Random) -> None:
        while not self._over.is_set():
            try:
                kind(chance.choice(self._ports), chance)
            except OSError:  # it is away, or has ended the connection
                self._over.wait(0.2)
            else:
                self.done[kind.__name__.strip("_")] += 1
                self._over.wait(PAUSE_S)

    def _silent(self, port: int, chance: random.Random) -> None:
        """Calls whose message does not come."""
        with Connection(port) as connection:
            for _ in range(SILENT_CALLS):
                connection.call(chance.choice(METHODS), None)
            self._over.wait(HOLD_S)

    def _unread(self, port: int, chance: random.Random) -> None:
        """Calls for large answers, on a connection that lets none of their bytes come."""
        with Connection(port, window=0) as connection:
            for _ in range(UNREAD_CALLS):
                connection.call(METHODS[0], self._large)
            self._over.wait(HOLD_S)

    def _many_fields(self, port: int, chance: random.Random) -> None:
        """A message of very many empty fields."""
        with Connection(port) as connection:
            connection.call(METHODS[0], self._many)
            self._over.wait(HOLD_S / 3)

    def _junk(self, port: int, chance: random.Random) -> None:
        """Bytes that are no HTTP/2, or frames that are none."""
        with socket.create_connection(("127.0.0.1", port)) as connection:
            if chance.random() < 0.5:
                connection.sendall(PREFACE)
                connection.sendall(frame(chance.randrange(12), chance.randrange(256), 1, chance.randbytes(99)))
            connection.sendall(chance.randbytes(4096))
            with suppress(TimeoutError):
                connection.settimeout(HOLD_S / 3)
                connection.recv(4096)

    def _idle_connections(self, port: int, chance: random.Random) -> None:
        """Connections that say nothing."""
        opened: list[socket.socket] = []
        try:
            for _ in range(CONNECTIONS):
                opened.append(socket.create_connection(("127.0.0.1", port)))
            self._over.wait(HOLD_S)
        finally:
            for connection in opened:
                connection.close()
