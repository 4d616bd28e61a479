"""Lookups over gRPC against an echo of the same bytes and Feast's feature server; and what a socket would give."""

import base64
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from online.lookup.client import LookupClient
from online.lookup.reader import VersionReader
from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.message import parsed
from tests.benchmarks.feast_stock import open_store, redis_store, stock_repository
from tests.benchmarks.harness import Result, environment, interleave, interval_of_ratio, overhead
from tests.benchmarks.lookup_client import KINDS, TABLE, ClientSide
from tests.benchmarks.serving import Serving, Spent, keep_asking
from tests.benchmarks.socket_server import NO_CALL, SocketClient, lookup_service
from tests.fleet import facet_environment, free_ports
from tests.redis_server import RedisServer
from tests.releases import WIDE_RANGE, published_rows

__all__ = ["against_echo", "against_feast_server"]

THREADS = 4
PROGRAMS = Path(sys.executable).parent
FEAST_START_S = 90


def against_echo(serving: Serving) -> Iterator[Result]:
    """One client, one request at a time: our client and server, the echo, and the same messages over a Unix socket.

    The echo is what gRPC is without us: its synchronous server, which is its fastest in Python.
    """
    host, sizes = serving.fleet().cpu_tiers[0].address, serving.sizes
    request_bytes, reply_bytes = _message_sizes(serving, host)
    echo = f"127.0.0.1:{serving.start('tests.benchmarks.echo_server', str(reply_bytes))[1]}"
    addresses = {"ours": host, "echo": echo, "socket": serving.socket_server()[0]}
    sides = {
        kind: ClientSide(
            KINDS[kind], calls=sizes.short_calls, process=serving.run(
                "tests.benchmarks.lookup_client", kind, address, *map(str, (sizes.batch, sizes.rows, request_bytes))
            ),
        )
        for kind, address in addresses.items()
    }
    timings = interleave(list(sides.values()), rounds=sizes.short_rounds, label="lookup over gRPC")
    for side in sides.values():
        side.process.kill()
    ours, rival, socket = (timings[side.name] for side in sides.values())
    said = {
        "batch": sizes.batch, "rows": sizes.rows, "request_bytes": request_bytes, "reply_bytes": reply_bytes,
        "threads": 1, "rounds": len(ours.rounds), "calls_a_round": ours.calls, "server": "grpc.aio",
        "parts_us": _parts(serving),
        "rounds_us": {kind: [s * 1e6 for s in timings[side.name].rounds] for kind, side in sides.items()},
    }
    yield overhead(
        "lookup512_p50_vs_grpc_echo", ours=ours.seconds * 1e6, rival=rival.seconds * 1e6, rival_name=rival.name,
        unit="us", ratio_interval_95=interval_of_ratio(ours, rival, lambda timing: timing.seconds), **said,
    )
    yield overhead(
        "lookup512_p99_vs_grpc_echo", ours=ours.p99 * 1e6, rival=rival.p99 * 1e6, rival_name=rival.name, unit="us",
        **said,
    )
    yield overhead(
        "lookup512_p50_socket_vs_grpc", ours=socket.seconds * 1e6, rival=ours.seconds * 1e6, rival_name=ours.name,
        unit="us", ours_is=socket.name, **said,
    )


def _parts(serving: Serving) -> dict[str, float]:
    """Where the time of a lookup goes: each part by itself in this process, microseconds; the rest is gRPC."""
    service, reader = lookup_service(serving.repository.workspace), VersionReader.open(serving.repository.workspace, 1)
    ids = np.random.default_rng(1).choice(serving.ids("item"), serving.sizes.batch)
    request = _request(ids)
    raw, answer = request.SerializeToString(), service.Lookup(request, NO_CALL)
    raw_answer = answer.SerializeToString()
    parts = {
        "segment lookup": lambda: reader.lookup(TABLE, ids),
        "service, segment lookup included": lambda: service.Lookup(request, NO_CALL),
        "write request": lambda: _request(ids).SerializeToString(),
        "read request": lambda: parsed(raw, lookup_pb2.LookupRequest.FromString),
        "write answer": answer.SerializeToString,
        "read answer": lambda: lookup_pb2.LookupResponse.FromString(raw_answer),
    }
    return {name: _median_us(part) for name, part in parts.items()}


def _median_us(call: Callable[[], Any], *, calls: int = 500) -> float:
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken) * 1e6, 1)


def _request(ids: np.ndarray) -> lookup_pb2.LookupRequest:
    return lookup_pb2.LookupRequest(
        request_id="0" * 16, accepted_versions=[1], tables=[lookup_pb2.TableIds(name=TABLE, ids=ids.tobytes())]
    )


def _message_sizes(serving: Serving, address: str) -> tuple[int, int]:
    """Bytes of a lookup of `batch` ids and of its answer, as they go over the wire."""
    ids = serving.ids("item")[: serving.sizes.batch]
    request = _request(ids)
    with grpc.insecure_channel(address) as channel:
        answer = lookup_pb2_grpc.LookupStub(channel).Lookup(request, timeout=5)
    return request.ByteSize(), answer.ByteSize()


def against_feast_server(serving: Serving) -> Iterator[Result]:
    """Clients that never rest: rows per second of the server's processor time, beside Feast's server on Redis."""
    batch, tier = serving.sizes.batch, serving.fleet().cpu_tiers[0]
    client, (socket_path, socket_pid) = LookupClient([tier.address]), serving.socket_server()
    known = serving.ids("item")
    with RedisServer() as redis:
        port, feast, check = _feast_server(serving, redis)
        connections = threading.local()

        def ours(random: np.random.Generator) -> None:
            client.lookup([1], {TABLE: random.choice(known, batch)})

        def over_socket(random: np.random.Generator) -> None:
            if not hasattr(connections, "socket"):
                connections.socket = SocketClient(socket_path)
            connections.socket.lookup(1, TABLE, random.choice(known, batch))

        def ask_feast(random: np.random.Generator) -> None:
            if not hasattr(connections, "feast"):
                connections.feast = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            ids = random.choice(known, batch)
            try:
                _ask_feast(connections.feast, ids)
            except (ConnectionError, http.client.HTTPException):  # it puts another process in its place now and then
                connections.feast.close()
                _ask_feast(connections.feast, ids)

        check()
        sides: dict[str, tuple[Callable[[np.random.Generator], None], int]] = {
            "ours": (ours, tier.process.pid), "feast": (ask_feast, feast.pid), "socket": (over_socket, socket_pid),
        }
        spent: dict[str, list[Spent]] = {name: [] for name in sides}
        for number in range(serving.sizes.rounds + 1):
            for name in sides if number % 2 else reversed(sides):
                ask, pid = sides[name]
                once = keep_asking(ask, threads=THREADS, seconds=serving.sizes.burst_s, pid=pid, seed=number)
                if number:  # the first turn warms up
                    spent[name].append(once)
    client.close()
    by_core, by_wall = {}, {}
    for name, turns in spent.items():
        by_core[name] = batch * statistics.median(turn.answers / max(turn.server_cpu_s, 0.01) for turn in turns)
        by_wall[name] = batch * statistics.median(turn.answers / turn.wall_s for turn in turns)
    said = {
        "batch": batch, "rows": serving.sizes.rows, "client_threads": THREADS, "rounds": serving.sizes.rounds,
        "seconds_a_round": serving.sizes.burst_s, "measured": "rows per second of the server process's processor time",
        "rows_per_wall_second": by_wall, "redis": "Unix socket; its own processor time is not counted",
    }
    yield Result(
        "lookup_rows_per_s_vs_feast_server", by_core["ours"], by_core["feast"], "feast serve on Redis",
        by_core["ours"] / by_core["feast"], "rows/s per core", said | environment(),
    )
    yield Result(
        "lookup_rows_per_s_socket_vs_grpc", by_core["socket"], by_core["ours"], "the CPU tier over gRPC",
        by_core["socket"] / by_core["ours"], "rows/s per core", said | environment(),
    )


def _feast_server(serving: Serving, redis: RedisServer) -> tuple[int, subprocess.Popen, Callable[[], None]]:
    """Stock `feast serve` over the same rows: its port, its process, and what checks that it answers with them."""
    repository = stock_repository(serving.repository, "server", redis_store(redis, skip_dedup=True))
    open_store(repository).materialize(*WIDE_RANGE, feature_views=["item_kge__v1"])
    port = free_ports(1)[0]
    process = subprocess.Popen(
        [str(PROGRAMS / "feast"), "serve", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"],
        cwd=repository, env=facet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    serving.stack.callback(process.wait)
    serving.stack.callback(process.terminate)
    deadline = time.monotonic() + FEAST_START_S
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("feast serve did not start")
        time.sleep(0.2)

    def check() -> None:
        ids, rows = published_rows(serving.repository.workspace, 1, TABLE)
        answer = json.loads(_ask_feast(http.client.HTTPConnection("127.0.0.1", port, timeout=30), ids[:3]))
        column = answer["metadata"]["feature_names"].index("row")
        values = answer["results"][column]["values"]
        if [base64.b64decode(value) for value in values] != [row.tobytes() for row in rows[:3]]:
            raise RuntimeError("feast serve has other rows")

    return port, process, check


def _ask_feast(connection: http.client.HTTPConnection, ids: np.ndarray) -> bytes:
    body = json.dumps({"features": ["item_kge__v1:row"], "entities": {"item": ids.tolist()}})
    connection.request("POST", "/get-online-features", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise RuntimeError(f"feast serve answered {response.status}: {answer[:300]}")
    return answer
