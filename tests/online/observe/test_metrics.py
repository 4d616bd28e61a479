"""What servers count, as a Prometheus server would read it: over HTTP, from one process or from workers."""

import os
import platform
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from online.lookup.client import LookupClient
from online.observe import metrics
from online.observe.collectors import sources
from pipelines.contracts.errors import InvalidConfig
from tests.online.observe.scrapes import read, samples
from tests.waiting import PATIENCE_S, PROGRAM_S, joined, until

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


def run(script: str, directory: Path | None = None, *, wait: bool = True) -> subprocess.Popen:
    """A process that runs the script and, unless waited for, then waits to be killed; it says when it got there."""
    environment = dict(os.environ) | ({metrics.WORKERS_DIRECTORY: str(directory)} if directory else {})
    script += "\nprint('done', flush=True)\n" + ("" if wait else "import sys; sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if wait:
        out, _ = process.communicate(timeout=PROGRAM_S)
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


COUNT_BY_HAND = """
from types import SimpleNamespace
import numpy as np
from online.observe import metrics
metrics.count_found("mask", np.array([True, False, False, False, True, False, False]))
metrics.count_found("mask", np.array([False, False, False]))
metrics.count_found("mask", np.zeros(0, bool))
metrics.count_found("all", np.array([True, True]))
metrics.count_rows("rows", 7, 2)
metrics.count_rows("rows", 4, 1)
for size in (1, 4, 5, 300_000):
    metrics.observe_batch("score", size)
metrics.observe_batch("context", 2)
for code, seconds in (("OK", 0.002), ("OK", 0.0021), ("OK", 7.0), ("OVERLOADED", 0.004), ("DEADLINE", 0.5)):
    metrics.observe_request("rank", code, seconds)
metrics.observe_request("lookup", "OVERLOADED", 0.0)
metrics.observe_stage("model", 0.25)
metrics.observe_stage("model", 0.5)
metrics.observe_stage("context", 0.1)
for version in (3, 3, 4):
    metrics.count_answer("ranker", version)
metrics.count_answer("cpu-tier", 3)
queue, other = SimpleNamespace(in_flight=9, waiting=9), SimpleNamespace(in_flight=0, waiting=5)
metrics.watch_queue("rank", queue)
metrics.watch_queue("lookup", other)
metrics.flush()
queue.in_flight, queue.waiting = 3, 0
metrics.set_versions("cpu-tier", {1: "answering", 2: "draining"})
metrics.set_versions("ranker", {2: "runnable"})
metrics.set_versions("cpu-tier", {2: "answering", 5: "answering"})
"""


def test_everything_is_counted_as_worked_out_by_hand() -> None:
    found = printed(COUNT_BY_HAND)

    def by(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Of one metric: values of these labels -> value."""
        keys = [key for key in found if key[0] == name]
        return {tuple(dict(key[1:])[label] for label in labels): found[key] for key in keys}

    def up_to(name: str, label: str, value: str) -> dict[float, float]:
        """Of a histogram, the buckets at which its count rises: upper bound -> count."""
        counts = {float(le): n for (of, le), n in by(f"{name}_bucket", label, "le").items() if of == value}
        before, rises = 0.0, {}
        for bound in sorted(counts):
            if counts[bound] != before:
                before = rises[bound] = counts[bound]
        return rises

    assert by("facet_rows_asked_total", "table") == {("mask",): 10, ("all",): 2, ("rows",): 11}
    assert by("facet_rows_found_total", "table") == {("mask",): 2, ("all",): 2, ("rows",): 3}
    assert up_to("facet_batch_size", "what", "score") == {1: 1, 4: 2, 8: 3, float("inf"): 4}
    assert up_to("facet_batch_size", "what", "context") == {2: 1}
    assert by("facet_batch_size_sum", "what") == {("score",): 300_010, ("context",): 2}
    assert by("facet_requests_total", "service", "code") == {
        ("rank", "OK"): 3, ("rank", "OVERLOADED"): 1, ("rank", "DEADLINE"): 1, ("lookup", "OVERLOADED"): 1,
    }  # fmt: skip
    assert up_to("facet_request_seconds", "service", "rank") == {0.002: 1, 0.003: 2, float("inf"): 3}
    assert by("facet_request_seconds_count", "service") == {("rank",): 3}, "of what was answered, and of nothing else"
    assert by("facet_stage_seconds_sum", "stage") == {("model",): 0.75, ("context",): 0.1}
    assert by("facet_stage_seconds_count", "stage") == {("model",): 2, ("context",): 1}
    assert by("facet_answers_total", "role", "version") == {
        ("ranker", "3"): 2, ("ranker", "4"): 1, ("cpu-tier", "3"): 1,
    }  # fmt: skip
    assert by("facet_in_flight", "service") == {("rank",): 3, ("lookup",): 0}
    assert by("facet_waiting", "service") == {("rank",): 0, ("lookup",): 5}
    assert by("facet_version_state", "role", "version", "state") == {
        ("cpu-tier", "2", "answering"): 1, ("cpu-tier", "5", "answering"): 1, ("ranker", "2", "runnable"): 1,
    }  # fmt: skip
    assert by("facet_version_mismatches_refused_total") == {(): 0}
    assert by("facet_build_info", "version", "python") == {(version("facet"), platform.python_version()): 1}


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
    port = endpoint(sources(metrics.registry, tmp_path))
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
    client = LookupClient([host.port("lookup")], timeout_s=PATIENCE_S, connections=4)
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


def test_workers_need_a_directory(tmp_path) -> None:
    with pytest.raises(InvalidConfig, match="directory"):
        metrics.export("127.0.0.1", 0, workers=tmp_path / "none")
