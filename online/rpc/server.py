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
from grpc_reflection.v1alpha import reflection

from online.rpc.arrival import Arrivals
from online.rpc.door import Door
from online.rpc.gate import Gate, GuardedServer
from online.rpc.limits import Limits
from online.security.credentials import ServerSecurity
from online.security.roles import ROLES
from pipelines.contracts.errors import InvalidConfig

__all__ = ["Endpoint", "serve_until_stopped"]

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
OPEN_THREADS = 8
"""For what is open to everybody."""


@dataclass
class Endpoint:
    """One listening port with its own threads. The port is taken at once; nothing is answered before `start`.

    Health and reflection have threads of their own: they answer while all others are busy.

    Register services with `server`: every call of theirs passes `online.rpc.gate` first. Health is open to
    everybody, and so is reflection where no roles are asked for.

    Args:
        name: also the role that callers need if `security` has roles, unless `role` names another.
        port: 0 picks a free one; `port` then names it.
        threads: as many calls are answered at a time.
        refuse_more: whether any more calls are refused at once (OVERLOADED); else they wait for a thread.
        security: TLS and roles; None: plaintext, open to everybody who reaches the port.
        limits: see `online.rpc.limits`; narrow them by `for_ids`.
        reuse_port: lets several processes of one host listen on the same port, which divides connections among them.

    Raises:
        InvalidConfig: the port is in use or not allowed, or there is no such role.
    """

    name: str
    host: str
    port: int
    threads: int
    refuse_more: bool = False
    security: ServerSecurity | None = None
    role: str = ""
    limits: Limits = field(default_factory=Limits)
    reuse_port: bool = False
    server: GuardedServer = field(init=False)
    checks: health.HealthServicer = field(init=False)

    def __post_init__(self) -> None:
        arrivals = Arrivals(self.limits.message_s)
        door = Door(self.threads, self.name, arrivals) if self.refuse_more else None
        threads = OPEN_THREADS + (0 if door else self.threads)
        self._inner = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix=self.name),
            # Without so_reuseport=0 a second server would silently share the port and take half of its requests.
            options=[*self.limits.options(), ("grpc.so_reuseport", int(self.reuse_port))],
        )
        self.server = GuardedServer(self._inner, self._gate(), arrivals, door=door, name=self.name)
        self.checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.checks, self._inner)
        self.checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"[{self.host}]:{self.port}" if ":" in self.host.strip("[]") else f"{self.host}:{self.port}"
        try:
            if self.security and self.security.encrypted:
                self.port = self._inner.add_secure_port(address, self.security.credentials())
            else:
                self.port = self._inner.add_insecure_port(address)
        except RuntimeError as error:
            raise self._refused(str(error)) from error
        if self.port == 0:
            raise self._refused("no port")

    def _gate(self) -> Gate | None:
        if not (self.security and self.security.roles):
            return None
        role = self.role or self.name
        if role not in ROLES:
            raise InvalidConfig(
                f"role of {self.name}", expected=f"one of {list(ROLES)}", got=repr(role), remedy="Name one by `role`."
            )
        return Gate(self.security, role)

    def _refused(self, reason: str) -> InvalidConfig:
        return InvalidConfig(
            f"cannot listen on {self.host}:{self.port} for {self.name}", expected="a port that is free on this host",
            got=reason, remedy="Stop what uses it, give another port, or 0 for any free one.",
        )

    def start(self) -> None:
        if self.security is None or self.security.reflection or not self.security.roles:
            names = [*self.server.services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._inner)
        self._inner.start()
        for service in ("", *self.server.services):
            self.checks.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> threading.Event:
        """Refuse what is new, let what is under way finish within the grace; the event is set at the end."""
        self.checks.enter_graceful_shutdown()
        return self._inner.stop(STOP_GRACE_S)


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
