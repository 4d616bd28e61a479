"""What the CPU tier and the ranker have in common as processes: ports, limits, health, one ready line, a clean stop."""

import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from online.observe import metrics
from online.rpc.admission import Admission
from online.rpc.executor import Executor
from online.rpc.gate import Gate
from online.rpc.guard import Guard
from online.rpc.limits import Limits
from online.rpc.loop import in_loop, start_in_loop
from online.rpc.open_guard import OpenGuard
from online.rpc.waiting import WaitingCalls
from online.security.credentials import ServerSecurity
from online.security.roles import ROLES
from pipelines.contracts.errors import InvalidConfig

__all__ = ["Endpoint", "GuardedServer", "serve_until_stopped"]

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
Handlers = dict[str, grpc.RpcMethodHandler]


class GuardedServer:
    """Takes services as `grpc.Server` does, from generated code, and puts a guard before each of their methods.

    Attributes:
        guard: of these methods.
        services: names of those registered.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard, self.services = guard, []
        self.methods: Handlers = {}

    def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
        """What generated code calls with a service's methods."""
        self.services.append(service)
        for method, handler in handlers.items():
            name = f"/{service}/{method}"
            self.methods[name] = self.guard.handler(handler, name)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """What generated code calls, too, with the same methods: nothing is left to do."""


class _Methods(grpc.GenericRpcHandler):
    """All methods of a port by their names.

    gRPC's asyncio server waits for a call of each registered method by itself, at a cost for each at every call. For
    calls of methods that it finds by a handler like this, it waits together.
    """

    def __init__(self, methods: Handlers) -> None:
        self._methods = methods

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(details.method)


@dataclass
class Endpoint:
    """One listening port with its own threads. The port is taken at once; nothing is answered before `start`.

    Register services with `server`: every call of theirs passes `online.rpc.guard`. Health is open to everybody, and so
    is reflection where no roles are asked for; neither needs a thread.

    Args:
        name: also the role that callers need if `security` has roles, unless `role` names another.
        port: 0 picks a free one; `port` then names it.
        slots: as many calls are worked on at a time.
        queue: as many wait for their turn; any more are refused at once (OVERLOADED).
        security: TLS and roles; None: plaintext, open to everybody who reaches the port.
        limits: see `online.rpc.limits`; narrow them by `for_ids`.
        reuse_port: lets several processes of one host listen on the same port, which divides connections among them.
        socket: path of a Unix socket to listen on instead.
        audited: whether every call is logged, with its outcome.

    Attributes:
        admission: which calls are worked on, and which wait for their turn.
        waiting: calls that wait for their clients.

    Raises:
        InvalidConfig: the port is in use or not allowed, or there is no such role.
    """

    name: str
    host: str
    port: int
    slots: int
    queue: int = 64
    security: ServerSecurity | None = None
    role: str = ""
    limits: Limits = field(default_factory=Limits)
    reuse_port: bool = False
    socket: str = ""
    audited: bool = False
    server: GuardedServer = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.slots, self.queue)
        self._executor = Executor(self.admission, self.name)
        self.waiting = WaitingCalls()
        self.server = GuardedServer(
            Guard(
                self.name, self._executor, self.waiting, self.limits, gate=self._gate(), audited=self.audited,
            )
        )
        in_loop(self._listen())

    def start(self) -> None:
        """Answer calls from now on."""
        if not self.audited:
            metrics.watch_queue(self.name, self.admission)
        in_loop(self._start())

    def stop(self) -> threading.Event:
        """Refuse what is new, let what is under way finish within the grace; the event is set at the end."""
        ended = threading.Event()
        start_in_loop(self._stop()).add_done_callback(lambda _: ended.set())
        return ended

    async def _listen(self) -> None:
        self._inner = grpc.aio.server(
            # Without so_reuseport=0 a second server would silently share the port and take half of its requests.
            options=[*self.limits.options(), ("grpc.so_reuseport", int(self.reuse_port))],
        )
        self._checks = health.aio.HealthServicer()
        await self._checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if self.socket:
                self._inner.add_insecure_port(f"unix:{self.socket}")
                return
            address = f"[{self.host}]:{self.port}" if ":" in self.host.strip("[]") else f"{self.host}:{self.port}"
            if self.security and self.security.encrypted:
                self.port = self._inner.add_secure_port(address, self.security.credentials())
            else:
                self.port = self._inner.add_insecure_port(address)
        except RuntimeError as error:
            raise self._refused(str(error)) from error
        if self.port == 0:
            raise self._refused("no port")

    async def _start(self) -> None:
        methods = {**self.server.methods, **self._open_methods()}
        self._inner.add_generic_rpc_handlers((_Methods(methods),))
        await self._inner.start()
        for service in ("", *self.server.services):
            await self._checks.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def _stop(self) -> None:
        await self._checks.enter_graceful_shutdown()
        await self._inner.stop(STOP_GRACE_S)
        self._executor.close()

    def _open_methods(self) -> Handlers:
        guard = OpenGuard(self.waiting, self.limits)
        methods = {
            name: guard.of_message(handler)
            for name, handler in _methods_of(health_pb2_grpc.add_HealthServicer_to_server, self._checks).items()
            if name.endswith("/Check")  # the others would let a client that does not read delay a change of health
        }
        if self.security is None or self.security.reflection or not self.security.roles:
            names = [*self.server.services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            servicer = reflection.aio.ReflectionServicer(names)
            add = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            methods |= {name: guard.of_stream(handler) for name, handler in _methods_of(add, servicer).items()}
        return methods

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


def _methods_of(add: Callable[[object, object], None], servicer: object) -> Handlers:
    """The methods that generated code registers for a servicer, by their full names."""
    found: Handlers = {}

    class Registry:
        def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
            found.update({f"/{service}/{method}": handler for method, handler in handlers.items()})

        def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
            pass

    add(servicer, Registry())
    return found


def serve_until_stopped(endpoints: list[Endpoint], ready: Callable[[], dict]) -> None:
    """Start the endpoints, print one JSON line on stdout when they answer, and wait for SIGTERM or SIGINT.

    The line has `ready`, `pid`, `ports` (name -> number) and what `ready` returns.
    """
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    # What is there now stays: without this, every full collection walks all that was imported, for up to 100 ms.
    gc.collect()
    gc.freeze()
    for endpoint in endpoints:
        endpoint.start()
    line = {"ready": True, "pid": os.getpid(), "ports": {e.name: e.port for e in endpoints}, **ready()}
    print(json.dumps(line), flush=True)
    stopped.wait()
    logger.info("stopping")
    for event in [endpoint.stop() for endpoint in endpoints]:
        event.wait()
    sys.stdout.flush()
