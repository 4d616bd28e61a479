"""What the CPU tier and the ranker have in common as processes: ports, limits, health, one ready line, a clean stop."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pipelines.contracts.errors import InvalidConfig

__all__ = ["CHANNEL_OPTIONS", "Endpoint", "serve_until_stopped"]

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
STOP_GRACE_S = 5.0

_LIMITS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
CHANNEL_OPTIONS = [
    *_LIMITS,
    # A host that was restarted is found again within a second, not after gRPC's growing pauses of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass
class Endpoint:
    """One listening port with its own threads. The port is taken at once; nothing is answered before `start`.

    Args:
        port: 0 picks a free one; `port` then names it.

    Raises:
        InvalidConfig: the port is in use or not allowed.
    """

    name: str
    host: str
    port: int
    threads: int
    server: grpc.Server = field(init=False)
    checks: health.HealthServicer = field(init=False)

    def __post_init__(self) -> None:
        self.server = grpc.server(
            ThreadPoolExecutor(self.threads, thread_name_prefix=self.name),
            # Without this a second server would silently share the port and take half of its requests.
            options=[*_LIMITS, ("grpc.so_reuseport", 0)],
        )
        self.checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.checks, self.server)
        self.checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.port = self.server.add_insecure_port(f"{self.host}:{self.port}")
        except RuntimeError as error:
            raise self._refused(str(error)) from error
        if self.port == 0:
            raise self._refused("no port")

    def _refused(self, reason: str) -> InvalidConfig:
        return InvalidConfig(
            f"cannot listen on {self.host}:{self.port} for {self.name}", expected="a port that is free on this host",
            got=reason, remedy="Stop what uses it, give another port, or 0 for any free one.",
        )

    def start(self) -> None:
        self.server.start()
        self.checks.set("", health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> threading.Event:
        """Refuse what is new, let what is under way finish within the grace; the event is set at the end."""
        self.checks.enter_graceful_shutdown()
        return self.server.stop(STOP_GRACE_S)


def serve_until_stopped(endpoints: list[Endpoint], ready: Callable[[], dict]) -> None:
    """Start the endpoints, print one JSON line on stdout when they answer, and wait for SIGTERM or SIGINT.

    The line has `ready`, `pid`, `ports` (name -> number) and what `ready` returns.
    """
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    for endpoint in endpoints:
        endpoint.start()
    line = {"ready": True, "pid": os.getpid(), "ports": {e.name: e.port for e in endpoints}, **ready()}
    print(json.dumps(line), flush=True)
    stopped.wait()
    logger.info("stopping")
    for event in [endpoint.stop() for endpoint in endpoints]:
        event.wait()
    sys.stdout.flush()
