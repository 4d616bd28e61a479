"""What servers count, as a Prometheus server would read it: over HTTP, from one process or from workers."""

import os
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from online.lookup.client import LookupClient
from online.observe import exporter, metrics
from online.security.credentials import ServerSecurity
from online.security.roles import token_sha256
from pipelines.contracts.errors import InvalidConfig
from tests.online.certificates import Authority, Pair
from tests.waiting import PATIENCE_S, joined, until

LABELS = {
    "facet_requests_total": {"service", "code"},
    "facet_request_seconds": {"service"},
    "facet_stage_seconds": {"stage"},
    "facet_rows_asked_total": {"table"},
    "facet_rows_found_total": {"table"},
    "facet_answers_total": {"role", "version"},
    "facet_version_state": {"role", "version", "state"},
    "facet_version_mismatches_refused_total": set(),
    "facet_in_flight": {"service"},
    "facet_waiting": {"service"},
    "facet_batch_size": {"what"},
    "facet_build_info": {"version", "python"},
    "process_virtual_memory_bytes": {"pid"},  # with workers only
    "process_resident_memory_bytes": {"pid"},
    "process_start_time_seconds": {"pid"},
    "process_cpu_seconds_total": {"pid"},
    "process_open_fds": {"pid"},
    "process_max_fds": {"pid"},
}
"""Every metric and its labels: what dashboards and alerts of others build on."""

COUNT_EACH = """
from types import SimpleNamespace
from online.observe import metrics
metrics.observe_request("rank", "OK", 0.002)
metrics.observe_request("rank", "OVERLOADED", 0.0001)
metrics.observe_stage("model", 0.001)
metrics.count_rows("item.kge", 512, 500)
metrics.count_answer("ranker", 3)
metrics.count_mismatch()
metrics.set_versions("ranker", {2: "runnable", 3: "runnable"})
metrics.set_versions("ranker", {3: "runnable"})
metrics.watch_queue("rank", SimpleNamespace(in_flight=2, waiting=1))
metrics.observe_batch("score", 4)
metrics.flush()
"""


def read(port: int, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[tuple, float]:
    """(name, labels as sorted pairs) -> value."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    by_key = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found}
    assert len(by_key) == len(found), "a series stands there twice"
    return by_key


def run(script: str, directory: Path | None = None, *, wait: bool = True) -> subprocess.Popen:
    """A process that runs the script and, unless waited for, then waits to be killed; it says when it got there."""
    environment = dict(os.environ) | ({metrics.WORKERS_DIRECTORY: str(directory)} if directory else {})
    script += "\nprint('done', flush=True)\n" + ("" if wait else "import sys; sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if wait:
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 and out.endswith("done\n")
        process.out = out.removesuffix("done\n")
    else:
        assert process.stdout.readline() == "done\n"
    return process


def printed(script: str) -> dict[tuple, float]:
    """What /metrics of a process says after the script."""
    read_itself = """
import urllib.request
port = metrics.export("127.0.0.1", 0)
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
"""
    return samples(run(script + read_itself).out)


@pytest.fixture
def endpoint() -> Iterator:
    """Call with what `MetricsEndpoint` takes after the port: one that answers, as its port."""
    started = []

    def start(collectors=None, security=None) -> int:
        sources = collectors or exporter.sources(metrics.registry, None)
        started.append(exporter.MetricsEndpoint("127.0.0.1", 0, sources, security))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return started[-1].server_port

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def test_a_scrape_has_every_metric_with_its_labels_and_what_was_counted() -> None:
    found = printed(COUNT_EACH)
    names = {}
    for name, *labels in found:
        name = name if name in LABELS else name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        names[name] = names.get(name, set()) | {label for label, _ in labels} - {"le"}
    assert names == {name: labels - {"pid"} for name, labels in LABELS.items()}
    assert found["facet_requests_total", ("code", "OVERLOADED"), ("service", "rank")] == 1
    assert found["facet_request_seconds_count", ("service", "rank")] == 1, "refusals have no place in the latency"
    assert found["facet_rows_asked_total", ("table", "item.kge")] == 512
    assert found["facet_rows_found_total", ("table", "item.kge")] == 500
    assert found["facet_answers_total", ("role", "ranker"), ("version", "3")] == 1
    assert found["facet_version_mismatches_refused_total",] == 1
    assert (found["facet_in_flight", ("service", "rank")], found["facet_waiting", ("service", "rank")]) == (2, 1)
    states = {key[2:]: value for key, value in found.items() if key[0] == "facet_version_state"}
    assert states == {(("state", "runnable"), ("version", "3")): 1.0}
    assert found["process_resident_memory_bytes",] > 1e6


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_directory_that_feast_names_does_not_hide_what_this_process_counts(tmp_path, before) -> None:
    named = f"import os; os.environ[{metrics.WORKERS_DIRECTORY!r}] = {str(tmp_path)!r}\n"
    found = printed(named + COUNT_EACH if before else COUNT_EACH + named)
    assert found["facet_requests_total", ("code", "OK"), ("service", "rank")] == 1
    assert found["facet_stage_seconds_count", ("stage", "model")] == 1
    assert ("facet_version_state", ("role", "ranker"), ("state", "runnable"), ("version", "2")) not in found


def test_labels_are_bounded_whatever_is_counted() -> None:
    found = printed("""
from online.observe import metrics
for number in range(2000):
    metrics.count_rows(f"table{number}", 1, 1)
    metrics.observe_request("lookup", f"CODE{number}", 0.1)
""")
    asked = [value for key, value in found.items() if key[0] == "facet_rows_asked_total"]
    assert len(asked) == metrics.MAX_SERIES + 1 and sum(asked) == 2000
    assert found["facet_requests_total", ("code", "other"), ("service", "other")] == 2000 - metrics.MAX_SERIES


def test_what_cannot_be_counted_keeps_nothing_else_from_it(endpoint) -> None:
    metrics.count_rows("odd.test", "many", 1)
    metrics.count_rows("odd.test", 5, 4)
    until(lambda: not metrics._noted)  # by the thread, which must not have ended
    assert samples(read(endpoint()))["facet_rows_asked_total", ("table", "odd.test")] == 5


def test_many_threads_lose_no_count(endpoint) -> None:
    def count() -> None:
        for _ in range(2000):
            metrics.count_rows("threads.test", 3, 1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    joined(*threads)
    found = samples(read(endpoint()))
    assert found["facet_rows_asked_total", ("table", "threads.test")] == 8 * 2000 * 3


def test_workers_are_added_up_and_the_dead_keep_their_counts_but_not_their_gauges(endpoint, tmp_path) -> None:
    port = endpoint(exporter.sources(metrics.registry, tmp_path))
    requests, seconds = ("facet_requests_total", ("code", "OK"), ("service", "rank")), "facet_request_seconds_count"
    in_flight = "facet_in_flight", ("service", "rank")
    state = "facet_version_state", ("role", "ranker"), ("state", "runnable"), ("version", "3")
    first, second = run(COUNT_EACH, tmp_path, wait=False), run(COUNT_EACH, tmp_path, wait=False)
    try:
        found = samples(read(port))
        assert (found[requests], found[in_flight], found[state]) == (2, 4, 2)
        assert found[seconds, ("service", "rank")] == 2
        assert not [key for key in found if key[0] == "facet_version_state" and ("version", "2") in key]
        pids = {dict(key[1:])["pid"] for key in found if key[0] == "process_open_fds"}
        assert pids == {str(os.getpid()), str(first.pid), str(second.pid)}
        second.kill()
        second.wait(PATIENCE_S)
        for restart in range(3):
            found = samples(read(port))
            assert (found[requests], found[in_flight], found[state]) == (2 + restart, 2, 1)
            assert found["facet_batch_size_bucket", ("le", "4.0"), ("what", "score")] == 2 + restart
            assert found["facet_version_mismatches_refused_total",] == 2 + restart
            run(COUNT_EACH, tmp_path)
        read(port)
        assert len(list(tmp_path.iterdir())) <= 3 + 2, "files of the dead pile up"
    finally:
        for process in (first, second):
            process.kill()
            process.wait(PATIENCE_S)


def test_a_real_host_with_workers_exports_their_sum(workspace_with_versions, launch) -> None:
    host = launch(
        workspace_with_versions.workspace, "serve", "cpu-tier", "--versions", "1", "--workers", "2",
        "--metrics-port", "0",
    ).wait_ready()
    client = LookupClient([host.port("lookup")], connections=4)
    ids = np.arange(64)
    for _ in range(40):
        client.lookup([1], {"item.kge": ids})
    client.close()
    found = {}

    def counted() -> float:
        found.update(samples(read(host.ready["ports"]["metrics"])))
        return found.get(("facet_requests_total", ("code", "OK"), ("service", "lookup")), 0.0)

    until(lambda: counted() == 40 and not found["facet_in_flight", ("service", "lookup")])
    assert found["facet_rows_asked_total", ("table", "item.kge")] == 40 * 64
    assert found["facet_answers_total", ("role", "cpu-tier"), ("version", "1")] == 40
    assert found["facet_version_state", ("role", "cpu-tier"), ("state", "answering"), ("version", "1")] == 2


# ---- the endpoint


def test_only_metrics_are_to_be_had(endpoint) -> None:
    port = endpoint()
    assert "facet_build_info" in read(port, "/metrics?x=1")
    assert "# EOF" in read(port, Accept="application/openmetrics-text; version=1.0.0")
    for path, method, status in (("/", "GET", 404), ("/metrics", "POST", 501), ("/../metrics", "GET", 404)):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=PATIENCE_S)
        assert refused.value.code == status
        refused.value.close()


def exchange(port: int, sent: bytes) -> bytes:
    """What is answered until the connection ends; `TimeoutError` if it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        answer = b""
        with suppress(ConnectionError):  # it may close without having read all
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        return answer


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda raw: b"GET /metrics" + raw)))
def test_no_bytes_keep_the_endpoint_from_answering_the_next(endpoint_of_all, sent) -> None:
    exchange(endpoint_of_all, sent)
    exchange(endpoint_of_all, b"GET /" + b"x" * 100_000 + b"\r\n\r\n")
    assert exchange(endpoint_of_all, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")


@pytest.fixture
def endpoint_of_all(endpoint) -> int:
    return endpoint()


def test_a_client_that_dawdles_is_left(endpoint, monkeypatch) -> None:
    monkeypatch.setattr(exporter, "EXCHANGE_S", 0.2)
    port = endpoint()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as dawdler:
        dawdler.sendall(b"GET /metr")
        assert "facet_build_info" in read(port)
        with suppress(ConnectionError):
            while dawdler.recv(65536):  # until it is ended
                pass


def test_with_roles_only_the_role_metrics_reads_them(endpoint, tmp_path) -> None:
    token, other, ca = "t" * 40, "o" * 40, Authority(tmp_path / "ca")
    server, monitor, stranger = (ca.issue(name) for name in ("server", "monitor", "stranger"))
    roles = tmp_path / "roles.yaml"
    roles.write_text(
        f"prometheus: {{token_sha256: {token_sha256(token)}, roles: [metrics]}}\n"
        f"ranker: {{token_sha256: {token_sha256(other)}, roles: [lookup]}}\n"
        "monitor: {certificate: monitor, roles: [metrics]}\n"
    )
    roles.chmod(0o600)
    port = endpoint(security=ServerSecurity(server.certificate, server.key, ca.certificate, roles))

    def status(shown: Pair | None, **headers: str) -> int:
        tls = ssl.create_default_context(cafile=ca.certificate)
        if shown:
            tls.load_cert_chain(shown.certificate, shown.key)
        request = urllib.request.Request(f"https://127.0.0.1:{port}/metrics", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S, context=tls) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            refused.close()
            return refused.code

    assert status(monitor) == status(stranger, Authorization=f"Bearer {token}") == 200
    assert status(stranger) == status(monitor, Authorization="Bearer wrong") == 401
    assert status(stranger, Authorization=f"Bearer {other}") == 403
    with pytest.raises(OSError):  # by no certificate at all
        status(None, Authorization=f"Bearer {token}")
    with pytest.raises(OSError):  # nor without TLS
        read(port)
    assert status(monitor) == 200


def test_a_port_in_use_is_refused(endpoint) -> None:
    with pytest.raises(InvalidConfig, match="cannot listen"):
        metrics.export("127.0.0.1", endpoint())
    with pytest.raises(InvalidConfig, match="cannot listen"):
        metrics.export("127.0.0.1", 70_000)


def test_workers_need_a_directory(tmp_path) -> None:
    with pytest.raises(InvalidConfig, match="directory"):
        metrics.export("127.0.0.1", 0, workers=tmp_path / "none")
