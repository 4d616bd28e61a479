"""The port that answers `GET /metrics`.

One thread has all connections, so that one that is silent keeps no other waiting:

```
accepted ──► TLS handshake ──► head of a request ──► credentials ──► prometheus_client answers ──► closed
         └────────────── each connection by itself, `EXCHANGE_S` in all ──────────────────────┘
```

`prometheus_client.start_http_server` would do less: it makes the TLS handshake in the thread that accepts, starts a
thread for each connection, waits for a client as long as it likes, and asks for no token.
"""

import asyncio
import io
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

from prometheus_client import CollectorRegistry, MetricsHandler

from online.security.credentials import ServerSecurity
from pipelines.contracts.errors import InvalidConfig

__all__ = ["MetricsEndpoint"]

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 64
EXCHANGE_S = 5.0
"""How long a connection may take from its start to its end."""
ACCEPT_AGAIN_S = 0.1


class MetricsEndpoint:
    """Listens from the first moment; answers from `start` on.

    When there are `MAX_CONNECTIONS`, a new one ends the oldest of the address that has most. So a scrape is let in
    whatever others do, and no host's connections end another's.

    Args:
        port: 0 picks a free one; `port` then names it.
        registry: what a scrape has.
        security: as for the gRPC servers: its certificate makes this HTTPS, its client CA asks for a certificate, its
            roles file for the role `metrics`, by bearer token or certificate. None: HTTP, open to everybody.
        exchange_s: seconds that a connection may last.

    Raises:
        InvalidConfig: the port is in use or not allowed, or `security` has unusable files.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, security: ServerSecurity | None = None, *,
        exchange_s: float = EXCHANGE_S,
    ) -> None:
        self._registry, self._exchange_s = registry, exchange_s
        self._tls = security.watch_tls() if security and security.encrypted else None
        self._roles = security.watch_roles() if security and security.roles else None
        self._open: dict[asyncio.Task, str] = {}  # the oldest first, with the addresses of their peers
        try:
            self._listening = socket.create_server(
                (host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except (OSError, OverflowError) as error:
            raise InvalidConfig(
                f"cannot listen on {host}:{port} for metrics", expected="a port that is free on this host",
                got=str(error), remedy="Stop what uses it, give another port, or 0 for any free one.",
            ) from error
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]

    def start(self) -> None:
        """Answer, in a thread of this object's own, until `stop` or the end of the process."""
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all connections and give the port back."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        with self._listening, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._accepting

    async def _accept(self) -> None:
        while True:
            try:
                connection, address = await self._loop.sock_accept(self._listening)
            except OSError as error:  # such as no file descriptor left
                logger.debug("metrics: cannot accept a connection: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if len(self._open) >= MAX_CONNECTIONS:
                self._end_one()
            exchange = self._loop.create_task(self._exchange(connection))
            self._open[exchange] = address[0]
            exchange.add_done_callback(lambda ended: self._open.pop(ended, None))
            await asyncio.sleep(0)  # however many connect, those that are here go on

    def _end_one(self) -> None:
        [(busiest, _)] = Counter(self._open.values()).most_common(1)
        oldest = next(exchange for exchange, address in self._open.items() if address == busiest)
        del self._open[oldest]
        oldest.cancel()

    async def _exchange(self, connection: socket.socket) -> None:
        """All of a connection's life."""
        try:
            async with asyncio.timeout(self._exchange_s):
                transport, protocol = await self._loop.connect_accepted_socket(
                    lambda: _Connection(self._answer), connection, ssl=self._tls and self._tls.value(),
                    ssl_handshake_timeout=self._exchange_s if self._tls else None,
                )
                try:
                    await protocol.ended
                finally:
                    transport.abort()
        except OSError as error:  # a failed handshake and the timeout are such
            logger.debug("metrics: a connection failed: %r", error)

    def _answer(self, head: bytes, certificate: dict | None) -> bytes:
        return _Scrape(head, self._registry, lambda token: self._refusal(token, certificate)).answer

    def _refusal(self, authorization: str, certificate: dict | None) -> HTTPStatus | None:
        """Why a caller may not read the metrics; None: it may."""
        if self._roles is None:
            return None
        roles = self._roles.value()
        scheme, _, token = authorization.partition(" ")
        callers = roles.of_certificate(_names(certificate or {}))
        if authorization:
            named = roles.of_token(token.strip()) if scheme.lower() == "bearer" else None
            if named is None:
                return HTTPStatus.UNAUTHORIZED
            callers = [*callers, named]
        if not callers:
            return HTTPStatus.UNAUTHORIZED
        allowed = any("metrics" in roles.identities[caller].roles for caller in callers)
        return None if allowed else HTTPStatus.FORBIDDEN


class _Connection(asyncio.Protocol):
    """Takes the head of one request, sends the answer and closes.

    Args:
        answer: given a head and the client's verified certificate.

    Attributes:
        ended: done when the connection is closed.
    """

    def __init__(self, answer: Callable[[bytes, dict | None], bytes]) -> None:
        self._answer, self._head = answer, bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._head += data
        if len(self._head) > MAX_HEAD_BYTES:
            self._transport.close()
        elif b"\r\n\r\n" in self._head:
            self._transport.write(self._answer(bytes(self._head), self._transport.get_extra_info("peercert")))
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():  # it is, if the wait for it was cancelled
            self.ended.set_result(None)


class _Scrape(MetricsHandler):
    """prometheus_client's handler of a request, between bytes instead of at a socket.

    Args:
        refusal: given the header `Authorization`.

    Attributes:
        answer: what to send.
    """

    def __init__(
        self, head: bytes, registry: CollectorRegistry, refusal: Callable[[str], HTTPStatus | None]
    ) -> None:
        self.registry, self._refusal = registry, refusal
        super().__init__(head, ("", 0), None)

    def setup(self) -> None:
        self.rfile, self.wfile = io.BytesIO(self.request), io.BytesIO()

    def finish(self) -> None:
        self.answer = self.wfile.getvalue()

    def do_GET(self) -> None:
        self.path = self.path.partition("?")[0]  # all metrics or none: a selection by name would know no workers'
        if refused := self._refusal(self.headers.get("Authorization", "")):
            self.send_error(refused)
        elif self.path != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        logger.debug("metrics: " + format, *arguments)


def _names(certificate: dict) -> list[str]:
    """Common and alternative names of a certificate as the `ssl` module shows it."""
    common = [value for parts in certificate.get("subject", ()) for key, value in parts if key == "commonName"]
    return [*common, *(value for _, value in certificate.get("subjectAltName", ()))]
