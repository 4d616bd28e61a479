"""Several processes that answer lookups on one port, as one host: its parent process starts, watches and directs them.

```
                     ┌── lookup port ──► worker 0 ─┐
  rankers ───────────┤                   worker 1 ─┼── map the same pages
                     └─ (SO_REUSEPORT) ► worker 2 ─┘
                                            ▲  a Unix socket each, in a directory of the parent's user
  rollout ───────────── admin port ──────► parent   what the host holds; worker died, or hangs: another one
```

Changes reach all workers or are refused. A worker that starts is told by its parent what to hold, and listens only when
it holds that. A pipe from the parent tells a worker that its parent is gone, however it went.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from online.host_state import HostState
from online.lookup.worker import FOLDER_PREFIX
from online.observe.metrics import WORKERS_DIRECTORY
from online.proto import admin_pb2, admin_pb2_grpc
from online.rpc.guard import Call
from online.rpc.server import STOP_GRACE_S
from online.rpc_error import CODE_KEY, Code, RpcError, rpc_error_from
from pipelines.contracts.errors import InvalidConfig, Unavailable

__all__ = ["Workers", "WorkersAdminService", "merged", "reserve_port"]

logger = logging.getLogger(__name__)

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # what a call to a worker that ends comes to
LONGEST_S = 3600.0  # that a load may take, and a start
STATUS_S = 5.0
POLL_S = 0.25
WATCH_S, MISSED = 5.0, 3
"""A worker is asked so often whether it is there, and has as long again to say so; after so many times in a row that it
did not, it is taken to hang. Once alone may be a pause of the whole machine."""
PAUSES_S = (0.1, 5.0)  # before a worker that did not start is started again: at first, at most


def reserve_port(host: str, port: int, *, patience_s: float = 2.0) -> socket.socket:
    """Take a port for workers to share, where nobody listens yet; hold it as long as the socket is open.

    Args:
        port: 0 picks a free one.
        patience_s: workers of a parent that was killed may take a moment to end.

    Raises:
        InvalidConfig: somebody else listens there, or it is not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InvalidConfig(
            f"cannot listen on {host} for lookup", expected="an address of this host", got=str(error),
            remedy="Correct --host.",
        ) from error
    until = time.monotonic() + patience_s
    while True:
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(address)
        except OSError as error:
            held.close()
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise InvalidConfig(
                f"cannot listen on {host}:{port} for lookup", expected="a port that is free on this host",
                got=str(error), remedy="Stop what uses it, give another port, or 0 for any free one.",
            ) from error
        # Only now: bound with it, the port could be one that somebody else shares in the same way.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return held


class Workers:
    """The worker processes of one host.

    Args:
        command: starts a worker, which calls `state_from_parent` and serves a `WorkerAdmin`; the path of its socket is
            added to it.
        state: what the workers hold at first.
        whole: whether to refuse to start without one of these versions.
        remember: is given what the host holds after every change, before the change returns.
        count_in_files: whether the workers count their metrics where this process can add them up.

    Attributes:
        metrics_folder: where they do, else None.
    """

    def __init__(
        self, command: Sequence[str], count: int, *, state: HostState, whole: bool,
        remember: Callable[[HostState], None] | None = None, count_in_files: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # 0700: other users cannot direct the workers
        self.metrics_folder = self._folder / "metrics" if count_in_files else None
        environment = dict(os.environ)
        if self.metrics_folder:
            self.metrics_folder.mkdir()
            environment[WORKERS_DIRECTORY] = str(self.metrics_folder)
        self._workers = [
            _Worker(number, command, self._folder / f"{number}.sock", environment) for number in range(count)
        ]
        self._state, self._whole, self._remember = state, whole, remember
        self._changing = threading.Lock()  # held while what the host holds changes, or a worker becomes that
        self._stopping = threading.Event()

    @property
    def state(self) -> HostState:
        """What the host holds."""
        return self._state

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def start(self) -> None:
        """Start all; returns when all answer.

        Raises:
            Unavailable: one ended instead; its own error is on stderr.
        """
        with self._changing:
            with ThreadPoolExecutor(len(self._workers)) as pool:
                started = list(
                    pool.map(lambda worker: worker.start(self._state, self._whole, self._stopping), self._workers)
                )
            if not all(started):
                self.stop()
                raise Unavailable(
                    "the host's workers did not start", expected=f"{len(started)} that answer",
                    got=f"{sum(started)}", remedy="See their errors above.",
                )
            self._state = state_of(self._ask("Status", admin_pb2.StatusRequest(), STATUS_S)[0])
            if self._whole and self._remember:
                self._remember(self._state)
        for worker in self._workers:
            threading.Thread(target=self._watch, args=(worker,), name=f"watch-{worker.number}", daemon=True).start()

    def stop(self) -> None:
        """Have all end as after SIGTERM: what is under way is answered; returns when they are gone."""
        self._stopping.set()
        for worker in self._workers:
            worker.end()
        until = time.monotonic() + 2 * STOP_GRACE_S
        for worker in self._workers:
            worker.wait_gone(max(until - time.monotonic(), 0.0))
        shutil.rmtree(self._folder, ignore_errors=True)

    def change(
        self, method: str, request: admin_pb2.VersionRequest, timeout_s: float
    ) -> admin_pb2.CpuTierStatus:
        """Ask all workers for the same; raises the first one's refusal."""
        # Twice, as every change may be repeated. The first takes its time without delaying a worker's restart; the
        # second reaches those that were restarted meanwhile, and is at once done by all others.
        until = time.monotonic() + timeout_s
        self._ask(method, request, timeout_s)
        with self._settled(until):
            answers = self._ask(method, request, max(until - time.monotonic(), 0.001))
            self._state = state_of(answers[0])
            if self._remember:
                self._remember(self._state)
            return merged(answers)

    @contextmanager
    def _settled(self, until: float) -> Iterator[None]:
        """No worker is being started and nothing else changes; raises `RpcError` DEADLINE where that lasts too long."""
        if not self._changing.acquire(timeout=max(until - time.monotonic(), 0.0)):
            raise RpcError(
                Code.DEADLINE, "a worker is still being started", expected="all of them in time", got="not all",
                remedy="Ask again: every change may be repeated.",
            )
        try:
            yield
        finally:
            self._changing.release()

    def status(self) -> admin_pb2.CpuTierStatus:
        return merged(self._ask("Status", admin_pb2.StatusRequest(), STATUS_S))

    def _ask(self, method: str, request: object, timeout_s: float) -> list[admin_pb2.CpuTierStatus]:
        calls = [
            (worker.number, worker.process, getattr(worker.stub, method).future(request, timeout=timeout_s))
            for worker in self._workers if worker.answers
        ]
        answers, refusals = [], []
        for number, process, call in calls:
            try:
                answers.append(call.result())
            except grpc.RpcError as error:
                if error.code() in GONE and CODE_KEY not in dict(error.trailing_metadata() or ()):
                    process.kill()  # gone, or as good as gone: another one will hold what the host holds
                else:
                    refusals.append(rpc_error_from(error, f"worker {number}"))
        if refusals:
            raise refusals[0]
        if not answers:
            raise RpcError(
                Code.LOOKUP_UNAVAILABLE, "no worker of this host answers", expected=f"one of {len(self._workers)}",
                got="none", remedy="They are being started again: ask again in a moment.",
            )
        return answers

    def _watch(self, worker: "_Worker") -> None:
        """Start another process whenever this worker's has ended."""
        pause_s, most_s = PAUSES_S
        while True:
            status = self._end_of(worker)
            worker.answers = False
            if self._stopping.is_set():
                return
            logger.error("worker %d (pid %d) ended with %d: another one starts", worker.number, worker.pid, status)
            with self._changing:
                started = worker.start(self._state, True, self._stopping)
            if started:
                logger.info("worker %d answers again (pid %d)", worker.number, worker.pid)
                pause_s = PAUSES_S[0]
            elif self._stopping.wait(pause_s):
                return
            else:
                pause_s = min(2 * pause_s, most_s)

    def _end_of(self, worker: "_Worker") -> int:
        """Wait for the exit status of a worker's process, which is killed once it hangs: it would keep its callers."""
        missed = 0
        while True:
            try:
                return worker.process.wait(WATCH_S)
            except subprocess.TimeoutExpired:
                there = self._stopping.is_set() or worker.is_there(WATCH_S)
                missed = 0 if there else missed + 1
            if missed == MISSED:
                logger.error("worker %d (pid %d) hangs: killed", worker.number, worker.pid)
                worker.process.kill()


class _Worker:
    """One place among the workers: a process, and after its end another.

    Attributes:
        answers: whether it is known to serve.
    """

    def __init__(self, number: int, command: Sequence[str], socket_path: Path, environment: dict[str, str]) -> None:
        self.number, self.answers, self._environment = number, False, environment
        self.process: subprocess.Popen | None = None
        self.stub: admin_pb2_grpc.CpuTierAdminStub | None = None
        self._command, self._socket = [*command, str(socket_path)], socket_path
        self._channel: grpc.Channel | None = None
        self._spawning = threading.Lock()

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def start(self, state: HostState, whole: bool, stopping: threading.Event) -> bool:
        """Start a process that holds `state` and wait until it answers; False if it ended, or all are to stop."""
        with self._spawning:
            if stopping.is_set():
                return False
            if self.process:
                with suppress(OSError):  # of what could not be written to it
                    self.process.stdin.close()
            self._socket.unlink(missing_ok=True)
            try:
                self.process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=self._environment,
                    process_group=0,  # Ctrl-C is for the parent, which ends its workers itself
                )
            except OSError as error:  # no memory or no descriptor is left, for the moment
                logger.error("worker %d cannot be started: %s", self.number, error)
                return False
        try:
            self.process.stdin.write(json.dumps({"state": asdict(state), "whole": whole}).encode() + b"\n")
            self.process.stdin.flush()  # and stays open: its end tells the worker that this process is gone
        except BrokenPipeError:
            return False
        # The one before is dropped and not closed: somebody may be about to make a call, which then finds nobody there.
        self._channel = grpc.insecure_channel(
            f"unix:{self._socket}",
            options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
                     ("grpc.max_reconnect_backoff_ms", 100)],
        )  # fmt: skip
        self.stub = admin_pb2_grpc.CpuTierAdminStub(self._channel)
        until = time.monotonic() + LONGEST_S
        while self.process.poll() is None and not stopping.is_set():
            if self.is_there(POLL_S, wait_for_ready=True):
                self.answers = True
                return True
            if time.monotonic() > until:
                logger.error("worker %d (pid %d) does not come up: killed", self.number, self.pid)
                self.process.kill()
        return False

    def is_there(self, timeout_s: float, *, wait_for_ready: bool = False) -> bool:
        """Whether it answers, which it does from when it holds what it is to hold, however busy it is with changes."""
        try:
            check = health_pb2_grpc.HealthStub(self._channel).Check
            check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=wait_for_ready)
        except (grpc.RpcError, ValueError):  # ValueError: of a channel that is closed
            return False
        return True

    def end(self) -> None:
        with self._spawning:  # none is started after this
            if self.process:
                self.process.terminate()

    def wait_gone(self, timeout_s: float) -> None:
        if self.process:
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                logger.error("worker %d (pid %d) does not stop: killed", self.number, self.process.pid)
                self.process.kill()
                self.process.wait()
        if self._channel:
            self._channel.close()


def state_of(status: admin_pb2.CpuTierStatus) -> HostState:
    return HostState(
        loaded=tuple(entry.version for entry in status.versions),
        draining=tuple(entry.version for entry in status.versions if entry.draining),
        preferred=status.preferred, canary=status.canary, canary_share=status.canary_share,
    )


def merged(answers: Iterable[admin_pb2.CpuTierStatus]) -> admin_pb2.CpuTierStatus:
    """The host as one: a version answers if any worker answers it; what was counted is added up."""
    total, versions = admin_pb2.CpuTierStatus(), {}
    for answer in answers:
        if not total.workers:
            total.CopyFrom(answer)
            total.ClearField("versions")
            total.workers = 0
        total.workers += 1
        for entry in answer.versions:
            seen = versions.setdefault(entry.version, admin_pb2.HostedVersion(draining=True))
            draining = seen.draining and entry.draining
            in_flight, answered = seen.in_flight + entry.in_flight, seen.answered + entry.answered
            seen.CopyFrom(entry)
            seen.draining, seen.in_flight, seen.answered = draining, in_flight, answered
    total.versions.extend(versions[version] for version in sorted(versions))
    return total


class WorkersAdminService(admin_pb2_grpc.CpuTierAdminServicer):
    """What the rollout controller asks of a CPU host that has workers."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def Load(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._workers.change("Load", request, call.time_remaining())

    def Promote(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._workers.change("Promote", request, call.time_remaining())

    def Drain(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._workers.change("Drain", request, call.time_remaining())

    def Unload(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._workers.change("Unload", request, call.time_remaining())

    def Status(self, request: admin_pb2.StatusRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._workers.status()
