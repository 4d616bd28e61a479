"""The stock `feast` servers as processes of their own, on loopback, stopped at the end of the module."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from tests.feast_command import FEAST
from tests.releases import FeastRepository
from tests.waiting import PATIENCE_S

ATTEMPTS = 3
OPENER = build_opener(ProxyHandler({}))


@dataclass
class FeastServer:
    """A `feast serve` or `feast ui` process that answers."""

    process: subprocess.Popen
    port: int
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of the answer."""
        return self._ask(Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and decoded JSON of the answer."""
        headers = {"content-type": "application/json"}
        request = Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers)
        status, text = self._ask(request)
        return status, json.loads(text or "null")

    @staticmethod
    def _ask(request: Request) -> tuple[int, str]:
        try:
            with OPENER.open(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: gunicorn's workers with it
            self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def feast_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Call with a repository, a path that answers 200 once ready, and a `feast` command line."""
    servers: list[FeastServer] = []

    def start(repository: FeastRepository, ready: str, *command: str) -> FeastServer:
        for _ in range(ATTEMPTS):  # another process may take the port between its choice and its use
            servers.append(_launch(repository, tmp_path_factory.mktemp("feast"), command))
            if _answers(servers[-1], ready):
                return servers[-1]
            servers[-1].stop()
        pytest.fail(f"feast {command[0]} did not start: {servers[-1].log.read_text()[-3000:]}")

    yield start
    for server in servers:
        server.stop()


def _launch(repository: FeastRepository, home: Path, command: tuple[str, ...]) -> FeastServer:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = home / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*FEAST, *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=repository.path, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(home), "FEAST_USAGE": "False"}, start_new_session=True,
        )
    return FeastServer(process, port, log)


def _answers(server: FeastServer, ready: str) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            if server.get(ready)[0] == 200:
                return True
        except (URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    return False
