"""A fleet as users run it: `facet serve` processes on loopback that can be killed, brought back and watched.

```
with Fleet(workspace, shards=2, replicas=2, rankers=2, versions="1") as fleet:
    fleet.rankers[0].address                  host:port of its service; .admin for `facet rollout` and `facet status`
    fleet.cpu_tiers[1].kill(); fleet.cpu_tiers[1].start().wait_ready()
```

Every host has a name and fixed ports, so that one that comes back is found where it was, as what it was.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

from online.observe.metrics import WORKERS_DIRECTORY
from pipelines.contracts.workspace import Workspace
from tests.waiting import PATIENCE_S

__all__ = ["FACET", "Fleet", "Host", "anonymous_bytes", "descendants", "descriptors", "facet_environment", "free_ports"]

FACET = [sys.executable, "-c", "from pipelines.cli import main; main()"]


@dataclass
class Host:
    """One `facet serve` process.

    Attributes:
        words: its command line after `facet --workspace …`.
        kills: how often it was killed.
    """

    name: str
    role: str
    workspace: Workspace
    words: Sequence[str]
    port: int
    admin_port: int
    log: Path
    shard: str = ""
    kills: int = 0
    process: subprocess.Popen | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self.admin_port}"

    @property
    def target(self) -> str:
        """How a ranker names it: with its shard, if it has only a part of the ids."""
        return f"{self.shard}={self.address}" if self.shard else self.address

    def start(self) -> Self:
        command = [
            *FACET, "--workspace", str(self.workspace.root), "serve", self.role, "--name", self.name,
            "--port", str(self.port), "--admin-port", str(self.admin_port), *self.words,
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=facet_environment(),
            )
        return self

    def wait_ready(self) -> Self:
        """Wait for its ready line; raises `RuntimeError` with its log if it ends or takes too long."""
        clock = threading.Timer(PATIENCE_S, self.process.kill)
        clock.start()
        line = self.process.stdout.readline()
        clock.cancel()
        if not line:
            raise RuntimeError(f"{self.name} did not get ready: {self.log.read_text()[-3000:]}")
        self.ready = json.loads(line)
        return self

    @property
    def pids(self) -> list[int]:
        """The process and its workers."""
        return [self.process.pid, *descendants(self.process.pid)]

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.kills += 1
        self.process.kill()
        self._reap()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP for so long: its connections stay open, and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not help; its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._reap()

    def _reap(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        return status


class Fleet:
    """CPU hosts of every shard and replica, and rankers that know them all.

    Args:
        versions: what they serve when they are started for the first time, such as "1".
        tier_options, ranker_options: more words for their command lines.
        prefix: of every host's name; fleets that share a workspace need different ones.
    """

    def __init__(
        self, workspace: Workspace, *, logs: Path, shards: int = 1, replicas: int = 1, rankers: int = 1,
        versions: str = "1", tier_options: Sequence[str] = (), ranker_options: Sequence[str] = (), prefix: str = "",
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.workspace = workspace
        self._stack = ExitStack()
        ports = iter(free_ports(2 * (shards * replicas + rankers)))

        def host(name: str, role: str, words: Sequence[str], shard: str = "") -> Host:
            words = ["--versions", versions, *words]
            return Host(name, role, workspace, words, next(ports), next(ports), logs / f"{name}.log", shard)

        self.cpu_tiers: list[Host] = []
        for shard in range(shards):
            part = f"{shard}/{shards}" if shards > 1 else ""
            for replica in range(replicas):
                words = [*(("--shard", part) if part else ()), *tier_options]
                self.cpu_tiers.append(host(f"{prefix}cpu-{shard}-{replica}", "cpu-tier", words, part))
        targets = [word for tier in self.cpu_tiers for word in ("--cpu-tier", tier.target)]
        self.rankers = [
            host(f"{prefix}ranker-{number}", "ranker", [*targets, *ranker_options]) for number in range(rankers)
        ]

    @property
    def hosts(self) -> list[Host]:
        return [*self.cpu_tiers, *self.rankers]

    @property
    def admin_options(self) -> list[str]:
        """How `facet rollout` and `facet status` are told of every host."""
        tiers = [word for tier in self.cpu_tiers for word in ("--cpu-tier", tier.admin)]
        return tiers + [word for ranker in self.rankers for word in ("--ranker", ranker.admin)]

    def __enter__(self) -> Self:
        for host in self.hosts:
            self._stack.callback(host.stop)
        for group in (self.cpu_tiers, self.rankers):  # a ranker is ready only when it has got rows
            for host in group:
                host.start()
            for host in group:
                host.wait_ready()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def rollout(self, to: int, *options: str) -> subprocess.Popen:
        """`facet rollout --to …` over the whole fleet, as a process."""
        return subprocess.Popen(
            [
                *FACET, "--workspace", str(self.workspace.root), "rollout", "--to", str(to), *self.admin_options,
                *options,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=facet_environment(),
        )


def facet_environment() -> dict[str, str]:
    """The environment of every process: UTC, and one thread each for what computes.

    Feast, once imported, has every process that is started from here count its metrics in files, which is slower.
    """
    inherited = {name: value for name, value in os.environ.items() if name != WORKERS_DIRECTORY}
    return {**inherited, "TZ": "UTC", "OMP_NUM_THREADS": "1"}


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs: what can leak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status names no RssAnon")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    listed: list[str] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):  # of any thread
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile, and has none
            listed += path.read_text().split()
    return [descendant for child in map(int, listed) for descendant in (child, *descendants(child))]


def free_ports(count: int) -> list[int]:
    """Different free ports below those that connections get, so that nobody takes a port while its host is away."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    drawn = random.SystemRandom().sample(range(10_000, max(first_ephemeral, 11_000)), 200)
    return list(islice(filter(_is_free, drawn), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
