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

import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from online.clock import CLOCK, Clock
from online.host_state import HostState
from online.lookup.worker import FOLDER_PREFIX
from online.lookup.worker_process import DEFAULT_WATCH, Watch, WorkerProcess
from online.observe.metrics import WORKERS_DIRECTORY
from online.proto import admin_pb2, admin_pb2_grpc
from online.rpc.guard import Call
from online.rpc.server import STOP_GRACE_S
from online.rpc_error import CODE_KEY, Code, RpcError, rpc_error_from
from pipelines.contracts.errors import InvalidConfig, Unavailable

__all__ = ["Workers", "WorkersAdminService", "merged", "reserve_port"]

logger = logging.getLogger(__name__)

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # what a call to a worker that ends comes to
STATUS_S = 5.0


def reserve_port(host: str, port: int, *, patience_s: float = 2.0, clock: Clock = CLOCK) -> socket.socket:
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
            f"cannot listen on {host} for lookup", expected="an address of this machine", got=str(error),
            remedy="Correct --host.",
        ) from error
    until = clock.now() + patience_s
    while True:
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(address)
        except OSError as error:
            held.close()
            if clock.now() < until:
                clock.sleep(0.05)
                continue
            raise InvalidConfig(
                f"cannot listen on {host}:{port} for lookup", expected="a port that is free on this machine",
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
        watch: how their ends and their silence are noticed.

    Attributes:
        metrics_folder: where they do, else None.
    """

    def __init__(
        self, command: Sequence[str], count: int, *, state: HostState, whole: bool,
        remember: Callable[[HostState], None] | None = None, count_in_files: bool = False, watch: Watch = DEFAULT_WATCH,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # 0700: other users cannot direct the workers
        self.metrics_folder = self._folder / "metrics" if count_in_files else None
        environment = dict(os.environ)
        if self.metrics_folder:
            self.metrics_folder.mkdir()
            environment[WORKERS_DIRECTORY] = str(self.metrics_folder)
        self._workers = [
            WorkerProcess(number, command, self._folder / f"{number}.sock", environment, watch)
            for number in range(count)
        ]
        self._state, self._whole, self._remember, self._watch = state, whole, remember, watch
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
            threading.Thread(target=self._keep_up, args=(worker,), name=f"watch-{worker.number}", daemon=True).start()

    def stop(self) -> None:
        """Have all end as after SIGTERM: what is under way is answered; returns when they are gone."""
        self._stopping.set()
        for worker in self._workers:
            worker.end()
        until = CLOCK.now() + 2 * STOP_GRACE_S
        for worker in self._workers:
            worker.wait_gone(max(until - CLOCK.now(), 0.0))
        shutil.rmtree(self._folder, ignore_errors=True)

    def change(
        self, method: str, request: admin_pb2.VersionRequest, timeout_s: float
    ) -> admin_pb2.CpuTierStatus:
        """Ask all workers for the same; raises the first one's refusal."""
        # Twice, as every change may be repeated. The first takes its time without delaying a worker's restart; the
        # second reaches those that were restarted meanwhile, and is at once done by all others.
        until = CLOCK.now() + timeout_s
        self._ask(method, request, timeout_s)
        with self._settled(until):
            answers = self._ask(method, request, max(until - CLOCK.now(), 0.001))
            self._state = state_of(answers[0])
            if self._remember:
                self._remember(self._state)
            return merged(answers)

    @contextmanager
    def _settled(self, until: float) -> Iterator[None]:
        """No worker is being started and nothing else changes; raises `RpcError` DEADLINE where that lasts too long."""
        if not self._changing.acquire(timeout=max(until - CLOCK.now(), 0.0)):
            raise RpcError(
                Code.DEADLINE, "a worker is still being started", expected="all of them in time", got="not all",
                remedy="Ask again: every change may be repeated.",
            )
        try:
            yield
        finally:
            self._changing.release()

    def status(self, timeout_s: float = STATUS_S) -> admin_pb2.CpuTierStatus:
        return merged(self._ask("Status", admin_pb2.StatusRequest(), timeout_s))

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

    def _keep_up(self, worker: WorkerProcess) -> None:
        """Start another process whenever this worker's has ended."""
        pause_s = self._watch.first_pause_s
        while True:
            status = worker.ended(self._stopping)
            worker.answers = False
            if self._stopping.is_set():
                return
            logger.error("worker %d (pid %d) ended with %d: another one starts", worker.number, worker.pid, status)
            with self._changing:
                started = worker.start(self._state, True, self._stopping)
            if started:
                logger.info("worker %d answers again (pid %d)", worker.number, worker.pid)
                pause_s = self._watch.first_pause_s
            elif self._watch.pause(self._stopping, pause_s):
                return
            else:
                pause_s = min(2 * pause_s, self._watch.longest_pause_s)


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
