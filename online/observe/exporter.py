"""The /metrics endpoint: one thread, bounded requests, and the sum of all workers where a host has several."""

import io
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import InfoMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from online.security.watched import Watched
from pipelines.contracts.errors import InvalidConfig

if TYPE_CHECKING:
    from online.security.credentials import ServerSecurity

__all__ = ["MetricsEndpoint", "sources"]

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
EXCHANGE_S = 5.0
"""How long one scrape may take, and hold up the next: reading, handshake and writing together."""


def sources(own: CollectorRegistry, workers: str | Path | None) -> list[Collector]:
    """This process's metrics, or those that workers count in a directory; and of processes and build."""
    if workers is None:
        return [own, ProcessCollector(registry=None), Build()]
    shared = Workers(Path(workers))
    return [shared, Processes(shared), Build()]


class Build(Collector):
    """`facet_build_info`."""

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "facet_build", "What runs.", value={"version": version("facet"), "python": python_version()}
        )


class Workers(Collector):
    """Sum of what worker processes count in files of one directory.

    The counts of a worker that ended are kept, since counters may never fall: they move into one file for all dead
    workers, so that a thousand restarts leave no thousand files. Its gauges go.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise InvalidConfig(
                "directory of the workers' metrics", expected="a directory", got=repr(str(directory)),
                remedy="Create it, empty, before the workers start.",
            )
        self._directory = directory

    def pids(self) -> list[int]:
        """Workers that have counted something and run."""
        found = {int(match[1]) for path in self._directory.glob("*.db") if (match := _WORKER_FILE.search(path.name))}
        return sorted(pid for pid in found if _runs(pid))

    def collect(self) -> Iterable[Metric]:
        self._bury()
        return MultiProcessCollector(None, self._directory).collect()

    def _bury(self) -> None:
        for path in sorted(self._directory.glob("*.db")):
            match = _WORKER_FILE.search(path.name)
            if match is None or _runs(int(match[1])):
                continue
            if not path.name.startswith("gauge"):
                self._add_to_dead(path)
            path.unlink(missing_ok=True)

    def _add_to_dead(self, path: Path) -> None:
        """Written beside and renamed, but a crash before the worker's file is gone counts it twice: then the host, too,
        starts anew and with it all counters."""
        dead = path.with_name(path.name.split("_")[0] + "_dead.db")
        staging = dead.with_suffix(".new")
        staging.unlink(missing_ok=True)
        total = MmapedDict(str(staging))
        for metric in MultiProcessCollector.merge([str(p) for p in (dead, path) if p.exists()], accumulate=False):
            for sample in metric.samples:
                key = mmap_key(
                    metric.name, sample.name, tuple(sample.labels), tuple(sample.labels.values()), metric.documentation
                )
                total.write_value(key, sample.value, 0.0)
        total.close()
        os.replace(staging, dead)


_WORKER_FILE = re.compile(r"_(\d+)\.db$")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # ended before, or while it was read
        return False
    return state not in "ZX"


class Processes(Collector):
    """Memory, descriptors and processor time of this process and of its workers, by `pid`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for pid in sorted({os.getpid(), *self._workers.pids()}):
            for family in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():
                into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    into.add_sample(sample.name, {**sample.labels, "pid": str(pid)}, sample.value)
        yield from families.values()


class _Scrape(BaseHTTPRequestHandler):
    """`GET /metrics`, once per connection."""

    server: "MetricsEndpoint"

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(_head(self.connection, self.server.deadline))

    def do_GET(self) -> None:
        if refused := self.server.refusal_of(self.headers.get("Authorization", ""), self.connection):
            self.send_error(refused)
            return
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.sources)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        logger.debug("metrics: " + format, *arguments)


def _head(connection: socket.socket, deadline: float) -> bytes:
    """What the client sends up to the empty line. Read here, since the base class waits for ever for a slow client."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(MAX_HEAD_BYTES)
        if not part:
            break
        head += part
    return head[:MAX_HEAD_BYTES]


class _Sources(CollectorRegistry):
    """Collectors and registries as one registry, without asking each of them first for the names it has."""

    def __init__(self, collectors: list[Collector]) -> None:
        super().__init__(auto_describe=False)
        self._sources = collectors

    def collect(self) -> Iterable[Metric]:
        for source in self._sources:
            for metric in source.collect():
                if metric.name == "facet_version_state":  # zero: held no longer
                    metric.samples = [sample for sample in metric.samples if sample.value]
                yield metric


class MetricsEndpoint(HTTPServer):
    """Listens; one scrape after the other, each with a deadline.

    Args:
        security: as for the gRPC servers: its certificate makes this HTTPS, its client CA asks for a certificate, its
            roles file for the role `metrics`, by bearer token or certificate.

    Raises:
        InvalidConfig: the port is in use or not allowed.
    """

    request_queue_size = 16

    def __init__(self, host: str, port: int, collectors: list[Collector], security: "ServerSecurity | None") -> None:
        self.sources = _Sources(collectors)
        self.deadline = 0.0
        self._tls: Watched[ssl.SSLContext] | None = None
        if security and security.encrypted:
            files = [path for path in (security.certificate, security.key, security.client_ca) if path]
            self._tls = Watched(files, lambda: _tls(security))
        self._roles = security.watch_roles() if security and security.roles else None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host.strip("[]"), port), _Scrape)
        except (OSError, OverflowError) as error:
            raise InvalidConfig(
                f"cannot listen on {host}:{port} for metrics", expected="a port that is free on this host",
                got=str(error), remedy="Stop what uses it, give another port, or 0 for any free one.",
            ) from error

    def get_request(self) -> tuple[socket.socket, tuple]:
        connection, address = super().get_request()
        self.deadline = time.monotonic() + EXCHANGE_S
        connection.settimeout(EXCHANGE_S)
        if self._tls:  # the handshake happens at the first read, where its failure ends one connection and no more
            connection = self._tls.value().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def refusal_of(self, authorization: str, connection: socket.socket) -> HTTPStatus | None:
        """Why a caller may not read the metrics; None: it may."""
        if self._roles is None:
            return None
        roles = self._roles.value()
        scheme, _, token = authorization.partition(" ")
        callers = roles.of_certificate(_certificate_names(connection))
        if authorization:
            named = roles.of_token(token.strip()) if scheme.lower() == "bearer" else None
            if named is None:
                return HTTPStatus.UNAUTHORIZED
            callers = [*callers, named]
        if not callers:
            return HTTPStatus.UNAUTHORIZED
        allowed = any("metrics" in roles.identities[caller].roles for caller in callers)
        return None if allowed else HTTPStatus.FORBIDDEN

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        logger.debug("metrics: connection from %s failed", client_address, exc_info=True)


def _tls(security: "ServerSecurity") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(security.certificate, security.key)
        if security.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(security.client_ca)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(
            "TLS of /metrics", expected="a certificate, its key and a CA", got=str(error),
            remedy="Correct the files that --tls-… name.",
        ) from error
    return context


def _certificate_names(connection: socket.socket) -> list[str]:
    """Common and alternative names of the certificate that the TLS handshake verified, if any."""
    shown = (connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None) or {}
    common = [value for parts in shown.get("subject", ()) for key, value in parts if key == "commonName"]
    return [*common, *(value for _, value in shown.get("subjectAltName", ()))]
