"""What a call passes before a service sees it: whether there is a thread for it, who calls, whether it may, and whether
its bytes are a message."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from online.observe import metrics, request_log
from online.rpc.arrival import Arrivals
from online.rpc.door import Door
from online.rpc.first_message import Received
from online.rpc_error import Code, RpcError, abort, errors_to_status
from online.security.credentials import ServerSecurity

__all__ = ["Gate", "GuardedServer"]

logger = logging.getLogger(__name__)


class Gate:
    """Admits callers that have a role.

    A caller has the roles of its token and of its certificate. A token that nobody has is refused even from somebody
    who shows a good certificate.

    Args:
        security: has a roles file.
        role: what a caller needs here.
    """

    def __init__(self, security: ServerSecurity, role: str) -> None:
        self._roles, self._role = security.watch_roles(), role

    def admit(self, context: grpc.ServicerContext) -> str:
        """Name of the caller; raises `RpcError`: NOT_AUTHENTICATED or NOT_ALLOWED."""
        roles = self._roles.value()
        callers = roles.of_certificate(_certificate_names(context)) if roles.by_certificate else []
        for key, value in context.invocation_metadata():
            if key == "authorization":
                scheme, _, token = str(value).partition(" ")
                caller = roles.of_token(token.strip()) if scheme.lower() == "bearer" else None
                if caller is None:
                    raise _not_authenticated("one that is unknown here")
                callers.append(caller)
        if not callers:
            raise _not_authenticated("none")
        for caller in callers:
            if self._role in roles.identities[caller].roles:
                return caller
        raise RpcError(
            Code.NOT_ALLOWED, f"caller {', '.join(callers)}", expected=f"the role {self._role}",
            got=", ".join(sorted({role for caller in callers for role in roles.identities[caller].roles})),
            remedy="Use credentials that have it, or add it to the roles file.",
        )


def _not_authenticated(got: str) -> RpcError:
    return RpcError(
        Code.NOT_AUTHENTICATED, "credentials", expected="a bearer token or a client certificate of the roles file",
        got=got, remedy="Give the client --token-file, or a certificate and key.",
    )


def _certificate_names(context: grpc.ServicerContext) -> list[str]:
    # gRPC gives these only of a certificate that it has verified.
    verified = context.auth_context()
    names = [*verified.get("x509_common_name", ()), *verified.get("x509_subject_alternative_name", ())]
    return [name.decode(errors="replace") for name in names]


class GuardedServer:
    """Takes services as `grpc.Server` does, and puts the gate before each of their methods.

    It is done when they are registered: where no roles are asked for, a call passes one function more and nothing
    else. What is registered with the inner server, such as health, is open to everybody.

    Args:
        gate: None: everybody may call.
        arrivals: waits for the messages.
        door: answers the calls, or refuses them where all its threads are busy; None: they wait for the server's own.
        name: what the metrics call the server.

    Attributes:
        services: names of those registered.
    """

    def __init__(
        self, server: grpc.Server, gate: Gate | None, arrivals: Arrivals, *, door: Door | None = None, name: str = ""
    ) -> None:
        self._server, self._gate, self._arrivals, self._door, self._name = server, gate, arrivals, door, name
        self.services: list[str] = []

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self.services.append(service)
        guarded = {method: self._guarded(handler, f"{service}/{method}") for method, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, guarded)

    def refuse_late(self, late: Callable[[Callable[[], float]], RpcError | None]) -> None:
        """Let calls that could not be answered in time be refused as `online.rpc.door` says, if there is a door."""
        if self._door:
            self._door.late = late

    def answer_at_once(self, is_quick: Callable[[bytes], bool]) -> None:
        """Let calls with such messages be answered as `online.rpc.door` says, if there is a door."""
        if self._door:
            self._door.is_quick = is_quick

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        self._server.add_generic_rpc_handlers(tuple(_GuardedHandlers(each, self._guarded) for each in handlers))

    def _guarded(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        if handler.unary_unary is None:
            raise TypeError(f"{method} streams; only calls of one request and one answer are guarded")
        behavior, parse = handler.unary_unary, handler.request_deserializer
        arrivals, gate, door, name = self._arrivals, self._gate, self._door, self._name

        def answer(messages: Iterator[bytes] | Received, context: grpc.ServicerContext) -> Any:
            received = type(messages) is Received  # then it was let in
            if not received and door and (refusal := door.refusal):
                _turn_away(refusal, name, context)
            if gate:
                _admit(gate, method, name, context)
            raw = messages.message if received else arrivals.message(messages, context)
            try:
                request = parse(raw) if parse and raw is not None else raw
            except DecodeError:
                request = None
            if request is None:
                _refuse_bytes(raw, name, context)
            return behavior(request, context)

        if door:
            answer.experimental_thread_pool = door
        # As a stream of one message, which is the same to a client: a service that takes a single message would be
        # called with it, and nobody could ask who sends it, or give up waiting, before it is there. As bytes: so that
        # what cannot be parsed is told apart from a defect.
        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)


class _GuardedHandlers(grpc.GenericRpcHandler):
    def __init__(self, inner: grpc.GenericRpcHandler, guarded: Callable) -> None:
        self._inner, self._guarded = inner, guarded

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler = self._inner.service(details)
        return handler and self._guarded(handler, details.method)


def _turn_away(refusal: RpcError, name: str, context: grpc.ServicerContext) -> NoReturn:
    request_log.count_refused(name, refusal)
    abort(context, refusal)


def _admit(gate: Gate, method: str, name: str, context: grpc.ServicerContext) -> None:
    audit = logging.INFO if method.rpartition("/")[0].endswith("Admin") else logging.DEBUG
    with errors_to_status(context):
        try:
            caller = gate.admit(context)
        except RpcError as refusal:
            logger.log(audit, "%s refused to %s: %s", method, context.peer(), refusal)
            metrics.observe_request(name, refusal.code.name, 0.0)
            raise
    logger.log(audit, "%s by %s", method, caller)


def _refuse_bytes(raw: bytes | None, name: str, context: grpc.ServicerContext) -> None:
    metrics.observe_request(name, Code.MALFORMED_REQUEST.name, 0.0)
    with errors_to_status(context):
        raise RpcError(
            Code.MALFORMED_REQUEST, "request", expected="a message as its .proto file says",
            got="no message" if raw is None else f"{len(raw)} bytes that are none",
            remedy="Generate the client from the .proto files.",
        )
