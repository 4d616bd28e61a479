"""The port of /metrics: who is answered, and that nobody keeps it from answering."""

import logging
import os
import resource
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily

from online.observe import exporter, metrics
from online.security import watched
from online.security.credentials import ServerSecurity
from online.security.roles import token_sha256
from pipelines.contracts.errors import InvalidConfig
from tests.online import raw_bytes
from tests.online.certificates import Authority, Pair
from tests.online.observe.scrapes import read
from tests.online.raw_bytes import until_ended
from tests.waiting import until

HOURS_S = 10_000.0
SCRAPE = b"GET /metrics HTTP/1.0\r\n\r\n"


def connected(port: int, *, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=120, source_address=(source, 0))


def exchange(port: int, sent: bytes) -> bytes:
    return raw_bytes.exchange("127.0.0.1", port, sent, timeout_s=120)


@pytest.fixture(scope="module")
def ca(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ca")


@pytest.fixture(scope="module")
def server(ca) -> Pair:
    return ca.issue("server")


def over_tls(ca: Authority, shown: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca.certificate)
    if shown:
        context.load_cert_chain(shown.certificate, shown.key)
    return context


def status(port: int, tls: ssl.SSLContext, **headers: str) -> int:
    request = urllib.request.Request(f"https://127.0.0.1:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120, context=tls) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code


def test_only_metrics_are_to_be_had(endpoint) -> None:
    port = endpoint()
    assert "facet_build_info" in read(port, "/metrics?name[]=none")
    assert "# EOF" in read(port, Accept="application/openmetrics-text; version=1.0.0")
    for path, method, code in (("/", "GET", 404), ("/metrics", "POST", 501), ("/../metrics", "GET", 404)):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=120)
        assert refused.value.code == code
        refused.value.close()


def test_a_request_may_come_in_pieces(endpoint) -> None:
    with connected(endpoint()) as connection:
        for byte in SCRAPE:
            connection.send(bytes([byte]))
        assert until_ended(connection).startswith(b"HTTP/1.0 200")


def test_a_head_that_never_ends_is_not_read_on(endpoint) -> None:
    port = endpoint(exchange_s=HOURS_S)
    at_the_limit = b"GET /metrics HTTP/1.0\r\nX: ".ljust(exporter.MAX_HEAD_BYTES - 4, b"x") + b"\r\n\r\n"
    assert exchange(port, at_the_limit).startswith(b"HTTP/1.0 200")
    with connected(port) as connection:
        connection.sendall(b"x" * (exporter.MAX_HEAD_BYTES + 1))
        assert until_ended(connection) == b""


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda raw: b"GET /metrics" + raw)))
def test_no_bytes_keep_the_endpoint_from_answering_the_next(endpoint_of_all, sent) -> None:
    exchange(endpoint_of_all, sent)
    exchange(endpoint_of_all, b"GET /" + b"x" * 100_000 + b"\r\n\r\n")
    assert exchange(endpoint_of_all, SCRAPE).startswith(b"HTTP/1.0 200")


@pytest.fixture
def endpoint_of_all(endpoint) -> int:
    return endpoint()


# ---- connections that are slow, silent or junk


def send_nothing(connection: socket.socket) -> None:
    pass


def send_half_a_request(connection: socket.socket) -> None:
    connection.sendall(b"GET /metr")


def send_junk(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        connection.sendall(bytes(range(256)) * 3)


def send_half_a_handshake(connection: socket.socket) -> None:
    """The head of a TLS record of 512 bytes with a ClientHello, and little of it."""
    connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


@pytest.mark.parametrize("begin", [send_nothing, send_half_a_request, send_junk])
def test_a_scrape_waits_for_no_other_connection(endpoint, begin) -> None:
    port = endpoint(exchange_s=HOURS_S)
    with ExitStack() as opened:
        for _ in range(100):
            begin(opened.enter_context(connected(port)))
        assert "facet_build_info" in read(port)


@pytest.mark.parametrize("begin", [send_nothing, send_half_a_handshake, send_junk])
def test_a_scrape_waits_for_no_handshake(endpoint, ca, server, begin) -> None:
    port = endpoint(security=ServerSecurity(server.certificate, server.key), exchange_s=HOURS_S)
    with ExitStack() as opened:
        for _ in range(100):
            begin(opened.enter_context(connected(port)))
        assert status(port, over_tls(ca)) == 200


def test_a_scrape_waits_for_no_connection_that_shook_hands_and_then_is_silent(endpoint, ca, server) -> None:
    port = endpoint(security=ServerSecurity(server.certificate, server.key), exchange_s=HOURS_S)
    tls = over_tls(ca)
    with ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(tls.wrap_socket(connected(port), server_hostname="127.0.0.1"))
        assert status(port, tls) == 200


def test_a_scrape_waits_for_no_answer_that_nobody_reads(endpoint) -> None:
    port = endpoint(_Long(), exchange_s=HOURS_S)
    with ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(connected(port)).sendall(SCRAPE)
        assert len(read(port)) > _Long.BYTES


class _Long(CollectorRegistry):
    """More than the buffers of a connection take."""

    BYTES = 16 << 20

    def collect(self):
        yield GaugeMetricFamily("long", "x" * self.BYTES, value=1.0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_connections_are_bounded_and_the_oldest_of_the_busiest_address_goes(
    endpoint, server, monkeypatch, encrypted
) -> None:
    monkeypatch.setattr(exporter, "MAX_CONNECTIONS", 4)
    port = endpoint(security=ServerSecurity(server.certificate, server.key) if encrypted else None, exchange_s=HOURS_S)
    with ExitStack() as opened:
        other = opened.enter_context(connected(port, source="127.0.0.2"))
        first, second, *_ = [opened.enter_context(connected(port)) for _ in range(3)]
        until(lambda: open_sockets(port) == 4)
        opened.enter_context(connected(port))
        assert first.recv(1) == b"", "the oldest of 127.0.0.1 is ended"
        opened.enter_context(connected(port))
        assert second.recv(1) == b""
        assert open_sockets(port) == 4
        other.setblocking(False)
        with pytest.raises(BlockingIOError):  # older than all, and still there
            other.recv(1)


def open_sockets(port: int) -> int:
    """Connections of this process's that `port` accepted and did not close."""
    inodes = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(fields[1].endswith(f":{port:04X}") and fields[3] == "01" and f"socket:[{fields[9]}]" in inodes
               for fields in lines)


def test_a_client_that_dawdles_is_left(endpoint, ca, server) -> None:
    plain = endpoint(exchange_s=0.2)
    with connected(plain) as connection:
        connection.sendall(b"GET /metr")
        assert until_ended(connection) == b""
    encrypted = endpoint(security=ServerSecurity(server.certificate, server.key), exchange_s=0.2)
    with connected(encrypted) as connection:
        send_half_a_handshake(connection)
        assert until_ended(connection) == b""
    until(lambda: open_sockets(plain) == open_sockets(encrypted) == 0)


def test_a_process_without_free_descriptors_answers_once_it_has_some(endpoint, caplog) -> None:
    port, limits = endpoint(), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with caplog.at_level(logging.DEBUG, logger="online.observe.exporter"):
            connection = connected(port)  # takes the last one
            until(lambda: "Too many open files" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with connection:
        connection.sendall(SCRAPE)
        assert until_ended(connection).startswith(b"HTTP/1.0 200")


def test_a_defect_of_one_scrape_is_not_the_next_ones(endpoint) -> None:
    class Failing(CollectorRegistry):
        fails = True

        def collect(self):
            if self.fails:
                raise ZeroDivisionError
            return []

    registry = Failing()
    port = endpoint(registry)
    assert exchange(port, SCRAPE) == b""
    registry.fails = False
    assert exchange(port, SCRAPE).startswith(b"HTTP/1.0 200")


# ---- who may


def write_roles(path: Path, *entries: str) -> Path:
    path.write_text("\n".join(entries) + "\n")
    path.chmod(0o600)
    return path


def test_with_roles_only_the_role_metrics_reads_them(endpoint, ca, server, tmp_path) -> None:
    token, other = "t" * 40, "o" * 40
    monitor, stranger = (ca.issue(name) for name in ("monitor", "stranger"))
    roles = write_roles(
        tmp_path / "roles.yaml",
        f"prometheus: {{token_sha256: {token_sha256(token)}, roles: [metrics]}}",
        f"ranker: {{token_sha256: {token_sha256(other)}, roles: [lookup, rank, admin]}}",
        "monitor: {certificate: monitor, roles: [metrics]}",
    )
    port = endpoint(security=ServerSecurity(server.certificate, server.key, ca.certificate, roles))
    known, unknown = over_tls(ca, monitor), over_tls(ca, stranger)
    assert status(port, known) == 200
    assert status(port, unknown, Authorization=f"Bearer {token}") == 200
    assert status(port, unknown, Authorization=f"bearer {token}") == 200
    assert status(port, unknown) == 401
    assert status(port, unknown, Authorization=f"Basic {token}") == 401
    assert status(port, known, Authorization="Bearer wrong") == 401, "a wrong token is refused from whomever"
    assert status(port, unknown, Authorization=f"Bearer {other}") == 403
    assert status(port, known, Authorization=f"Bearer {other}") == 200, "the roles of both"
    with pytest.raises(OSError):  # by no certificate at all
        status(port, over_tls(ca), Authorization=f"Bearer {token}")
    with pytest.raises(OSError):  # nor without TLS
        read(port)
    assert status(port, known) == 200


def test_without_credentials_nothing_is_said_of_what_there_is(endpoint, tmp_path) -> None:
    roles = write_roles(tmp_path / "roles.yaml", f"a: {{token_sha256: {token_sha256('t' * 40)}, roles: [metrics]}}")
    port = endpoint(security=ServerSecurity(roles=roles))
    for path in (b"/metrics", b"/", b"/none"):
        answer = exchange(port, b"GET " + path + b" HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 401") and b"facet" not in answer


def replaced(target: Path, source: Path) -> None:
    beside = target.with_suffix(".new")
    beside.write_bytes(source.read_bytes())
    beside.chmod(0o600)
    beside.rename(target)


def test_renewed_certificates_and_changed_roles_hold_from_the_next_connection_on(
    endpoint, ca, server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(watched, "CHECK_S", 0.0)
    later, token = Authority(tmp_path / "later"), "t" * 40
    renewed, monitor, later_monitor = later.issue("server"), ca.issue("monitor2"), later.issue("monitor2")
    files = [tmp_path / name for name in ("server.pem", "server.key", "ca.pem")]
    for target, source in zip(files, (server.certificate, server.key, ca.certificate), strict=True):
        replaced(target, source)
    entry = f"a: {{token_sha256: {token_sha256(token)}, roles: [metrics]}}"
    roles = write_roles(tmp_path / "roles.yaml", entry)
    port = endpoint(security=ServerSecurity(*files, roles))

    def scraped(tls: ssl.SSLContext) -> int:
        return status(port, tls, Authorization=f"Bearer {token}")

    assert scraped(over_tls(ca, monitor)) == 200
    replaced(files[0], renewed.certificate)  # its key not yet
    assert scraped(over_tls(ca, monitor)) == 200, "what is half replaced does not count"
    replaced(files[1], renewed.key)
    replaced(files[2], later.certificate)
    assert scraped(over_tls(later, later_monitor)) == 200
    refuses_connection(lambda: scraped(over_tls(later, monitor)))  # of the CA that was taken out
    roles.chmod(0o666)
    assert scraped(over_tls(later, later_monitor)) == 401
    roles.chmod(0o600)
    assert scraped(over_tls(later, later_monitor)) == 200


def refuses_connection(call: Callable[[], object]) -> None:
    with pytest.raises(OSError):
        call()


def test_a_port_in_use_is_refused(endpoint) -> None:
    with pytest.raises(InvalidConfig, match="cannot listen"):
        metrics.export("127.0.0.1", endpoint())
    with pytest.raises(InvalidConfig, match="cannot listen"):
        metrics.export("127.0.0.1", 70_000)
