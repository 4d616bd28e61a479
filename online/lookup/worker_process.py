"""One of several workers of a host, from without: its process is started, watched and ended."""

import json
import logging
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from online.clock import CLOCK, Clock
from online.host_state import HostState
from online.proto import admin_pb2_grpc

__all__ = ["DEFAULT_WATCH", "LONGEST_S", "Watch", "WorkerProcess", "exit_status"]

logger = logging.getLogger(__name__)

LONGEST_S = 3600.0
"""That a load may take, and a start."""

POLL_S = 0.25


def exit_status(process: subprocess.Popen, within_s: float) -> int | None:
    """Wait for a process to end; None if it did not in time."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        return None


@dataclass(frozen=True)
class Watch:
    """When a worker is taken to hang, and how soon another one is started in its place.

    Attributes:
        every_s: a worker is asked so often whether it is there.
        answer_s: and has so long to say so.
        missed: after so many times in a row that it did not, it is taken to hang. Once alone may be a pause of the
            whole machine.
        first_pause_s, longest_pause_s: before a worker that did not start is started again; doubled every time.
        start_s: a worker that does not come up within it is killed.
        clock: for the length of a start.
        exit_status, pause: wait for a process to end, and for the host to be stopped, for so many seconds at most.
    """

    every_s: float = 5.0
    answer_s: float = 5.0
    missed: int = 3
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    start_s: float = LONGEST_S
    clock: Clock = CLOCK
    exit_status: Callable[[subprocess.Popen, float], int | None] = exit_status
    pause: Callable[[threading.Event, float], bool] = threading.Event.wait


DEFAULT_WATCH = Watch()


class WorkerProcess:
    """One place among the workers: a process, and after its end another.

    Attributes:
        answers: whether it is known to serve.
    """

    def __init__(
        self, number: int, command: Sequence[str], socket_path: Path, environment: dict[str, str], watch: Watch
    ) -> None:
        self.number, self.answers, self._environment, self._watch = number, False, environment, watch
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
        until = self._watch.clock.now() + self._watch.start_s
        while self.process.poll() is None and not stopping.is_set():
            if self.is_there(POLL_S, wait_for_ready=True):
                self.answers = True
                return True
            if self._watch.clock.now() > until:
                logger.error("worker %d (pid %d) does not come up: killed", self.number, self.pid)
                self.process.kill()
        return False

    def ended(self, stopping: threading.Event) -> int:
        """Wait for the process's exit status; it is killed once it hangs: it would keep its callers."""
        missed = 0
        while (status := self._watch.exit_status(self.process, self._watch.every_s)) is None:
            there = stopping.is_set() or self.is_there(self._watch.answer_s)
            missed = 0 if there else missed + 1
            if missed == self._watch.missed:
                logger.error("worker %d (pid %d) hangs: killed", self.number, self.pid)
                self.process.kill()
        return status

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
