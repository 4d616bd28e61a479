"""A real redis-server for tests and benchmarks: own temporary directory, loopback only, no persistence, gone on exit.

```
with RedisServer() as server:
    server.client().ping()              # redis.Redis over the unix socket; client(tcp=True) over loopback
    server.url, server.tcp_url          # unix://… and redis://127.0.0.1:<port>/0
```
"""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import redis

from tests.waiting import PATIENCE_S, until

__all__ = ["RedisServer", "redis_cluster"]

SLOTS = 16_384


class RedisServer:
    """A redis-server process; a context manager. The temporary directory is short enough for a unix socket's path.

    Attributes:
        port: its loopback TCP port.
        socket_path: its unix socket.
        url: a URL over the unix socket, for `redis.from_url`; `tcp_url` over loopback TCP.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._clients: list[redis.Redis] = []

    def __enter__(self) -> Self:
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError("redis-server is not installed: apt-get install redis-server")
        self.directory = Path(tempfile.mkdtemp(prefix="facet-redis-"))
        self.socket_path = str(self.directory / "s")
        self.port = _free_port()
        self.url = f"unix://{self.socket_path}?db=0"
        self.tcp_url = f"redis://127.0.0.1:{self.port}/0"
        self._process = subprocess.Popen(
            [
                program, "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.socket_path,
                "--dir", str(self.directory), "--save", "", "--appendonly", "no", "--daemonize", "no",
                "--logfile", "log", *self._options,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill it and delete its directory; again is fine."""
        for client in self._clients:
            client.close()
        if self._process.poll() is None:
            self._process.kill()  # nothing of it is kept
        self._process.wait(PATIENCE_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, *, tcp: bool = False) -> redis.Redis:
        """A client that is closed with the server."""
        self._clients.append(redis.from_url(self.tcp_url if tcp else self.url))
        return self._clients[-1]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.client().ping()
                return
            except redis.ConnectionError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self.directory / "log"
                    text = log.read_text()[-2000:] if log.exists() else "no log"
                    raise RuntimeError(f"redis-server did not start: {text}") from None
                time.sleep(0.01)


@contextmanager
def redis_cluster(nodes: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster of masters on loopback that share the slots evenly; yields its servers once each sees it whole."""
    options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "5000")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(RedisServer(*options, "--cluster-port", str(_free_port()))) for _ in range(nodes)
        ]
        bounds = [SLOTS * node // nodes for node in range(nodes + 1)]
        for number, server in enumerate(servers):
            client = server.client()
            client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for server in servers[1:]:
            bus = int(server.client().config_get("cluster-port")["cluster-port"])
            servers[0].client().execute_command("CLUSTER MEET", "127.0.0.1", server.port, bus)
        until(lambda: all(_sees_whole_cluster(server, nodes) for server in servers))
        yield servers


def _sees_whole_cluster(server: RedisServer, nodes: int) -> bool:
    info = server.client().execute_command("CLUSTER INFO")
    state = info if isinstance(info, dict) else dict(
        line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line
    )
    return state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == nodes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
