"""What servers count, for Prometheus. Any code may call these functions, on the path of a request, too.

```
a request's thread   count_rows(…) ── noted ──► another thread, every 20 ms ── counted ──► registry ──► a scrape
```

To count takes a microsecond or two each time, and several times that in a thread that has just woken up; no answer
waits for it. A scrape has all that was noted before it; of workers, all but the last 20 ms.

Several workers of one host count in files that they share: start them with `PROMETHEUS_MULTIPROC_DIR` naming one empty
directory, before they import this module, and call `export` in one process with that directory as `workers`.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import Metric

from online.security.credentials import ServerSecurity

__all__ = [
    "WORKERS_DIRECTORY", "count_answer", "count_found", "count_mismatch", "count_rows", "export", "flush",
    "observe_batch", "observe_request", "observe_stage", "registry", "set_versions", "watch_queue",
]

logger = logging.getLogger(__name__)

WORKERS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client that makes a process count in files, for others to add up."""

MAX_SERIES = 256
"""Label values a metric takes before new ones are counted as `other`: no defect fills the monitoring's disk."""

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 5.0,
)
SIZES = tuple(float(1 << power) for power in range(0, 18))

EVERY_S = 0.02  # between two times that what was noted is counted

disable_created_metrics()  # a second series for each, which nobody draws


class _UpToDate(CollectorRegistry):
    """Everything that was noted is counted before it is read."""

    def collect(self) -> Iterable[Metric]:
        flush()
        return super().collect()


registry = _UpToDate()
"""All metrics of this process, without those of its operating system process."""

_REQUESTS = Counter("facet_requests", "Requests by how they ended.", ["service", "code"], registry=registry)
_REQUEST_SECONDS = Histogram(
    "facet_request_seconds", "Time in the server of answered requests.", ["service"], buckets=SECONDS, registry=registry
)
_STAGE_SECONDS = Histogram(
    "facet_stage_seconds", "Time of the stages of answered requests.", ["stage"], buckets=SECONDS, registry=registry
)
_ROWS_ASKED = Counter("facet_rows_asked", "Ids that rows were asked for.", ["table"], registry=registry)
_ROWS_FOUND = Counter("facet_rows_found", "Ids that had a row of their own.", ["table"], registry=registry)
_ANSWERS = Counter("facet_answers", "Answers by the version they name.", ["role", "version"], registry=registry)
_VERSION_STATE = Gauge(
    "facet_version_state", "Processes that hold a version in a state.", ["role", "version", "state"],
    multiprocess_mode="livesum", registry=registry,
)
_MISMATCHES = Counter(
    "facet_version_mismatches_refused", "Rows of another version than the model's: refused, never scored.",
    registry=registry,
)
_IN_FLIGHT = Gauge(
    "facet_in_flight", "Requests that are being worked on.", ["service"], multiprocess_mode="livesum", registry=registry
)
_WAITING = Gauge(
    "facet_waiting", "Requests admitted to wait.", ["service"], multiprocess_mode="livesum", registry=registry
)
_BATCH_SIZE = Histogram("facet_batch_size", "How much was done at once.", ["what"], buckets=SIZES, registry=registry)


class _Series(dict):
    """Label values -> the method that counts there; what is beyond `MAX_SERIES` counts as `other`.

    `labels()` takes as long as the counting itself, hence the dictionary.
    """

    def __init__(self, metric: Any, method: str) -> None:
        super().__init__()
        self._metric, self._method = metric, method

    def __missing__(self, key: Any) -> Callable[[float], None]:
        values = key if isinstance(key, tuple) else (key,)
        if len(self) >= MAX_SERIES:
            return getattr(self._metric.labels(*("other" for _ in values)), self._method)
        count = getattr(self._metric.labels(*values), self._method)
        self[key] = count
        return count


_requests = _Series(_REQUESTS, "inc")
_request_seconds = _Series(_REQUEST_SECONDS, "observe")
_stage_seconds = _Series(_STAGE_SECONDS, "observe")
_rows_asked = _Series(_ROWS_ASKED, "inc")
_rows_found = _Series(_ROWS_FOUND, "inc")
_answers = _Series(_ANSWERS, "inc")
_in_flight = _Series(_IN_FLIGHT, "set")
_waiting = _Series(_WAITING, "set")
_batch_size = _Series(_BATCH_SIZE, "observe")


class Queue(Protocol):
    """Requests that are being worked on, and that wait."""

    in_flight: int

    @property
    def waiting(self) -> int: ...


_noted: deque[tuple[Callable[..., None], tuple]] = deque()
_queues: dict[str, Queue] = {}
_counting, _thread_runs = threading.Lock(), threading.Event()


def _noting(count: Callable[..., None]) -> Callable[..., None]:
    """Makes of a function that counts one that notes what to count, and returns."""

    @wraps(count)
    def note(*values: Any) -> None:
        _noted.append((count, values))
        if not _thread_runs.is_set():
            _count_soon()

    return note


def _count_soon() -> None:
    """See to it that there is a thread that counts."""
    with _counting:
        if not _thread_runs.is_set():
            threading.Thread(target=_keep_counting, name="counting", daemon=True).start()
            atexit.register(flush)
            _thread_runs.set()


def _keep_counting() -> None:
    while True:
        time.sleep(EVERY_S)
        flush()


def flush() -> None:
    """Count what was noted until now."""
    with _counting:  # one thread at a time, so that what was noted last is set last
        while _noted:
            count, values = _noted.popleft()
            try:
                count(*values)
            except Exception:
                logger.exception("%s%s is not counted", count.__name__, values)
        for service, queue in _queues.items():
            _in_flight[service](queue.in_flight)
            _waiting[service](queue.waiting)


_states: dict[str, set[tuple[str, str, str]]] = {}  # role -> series that are not zero
_changing_states = threading.Lock()


@_noting
def observe_request(service: str, code: str, seconds: float) -> None:
    """A request ended.

    Args:
        service: "lookup" or "rank".
        code: "OK" or the name of an `online.rpc_error.Code`; the latency histogram has only those that are OK, so that
            refusals, which are quick, do not make an overloaded server look fast.
        seconds: from its arrival in the server's thread until its answer was ready.
    """
    _requests[service, code]()
    if code == "OK":
        _request_seconds[service](seconds)


@_noting
def observe_stage(stage: str, seconds: float) -> None:
    """A part of an answered request, such as "lookup", "context", "model"."""
    _stage_seconds[stage](seconds)


@_noting
def count_rows(table: str, ids: int, found: int) -> None:
    """Ids looked up and how many had a row. Only for tables that exist: what a request calls a table is not one."""
    _rows_asked[table](ids)
    _rows_found[table](found)


@_noting
def count_found(table: str, found: np.ndarray) -> None:
    """`count_rows` of a mask, bool (B,), of the ids that had a row."""
    _rows_asked[table](len(found))
    _rows_found[table](int(np.count_nonzero(found)))


@_noting
def count_answer(role: str, version: int) -> None:
    """An answer that names `version`, by "cpu-tier" or "ranker"."""
    _answers[role, version]()


@_noting
def count_mismatch() -> None:
    """Rows of another version than any pinned model's were refused. Never happens while the invariant holds."""
    _MISMATCHES.inc()


def set_versions(role: str, versions: Mapping[int, str]) -> None:
    """All versions that this process holds now, each "answering", "draining" or "runnable"; others are forgotten."""
    now = {(role, str(version), state) for version, state in versions.items()}
    with _changing_states:
        gone = _states.get(role, set()) - now
        for series in now:
            _VERSION_STATE.labels(*series).set(1)
        for series in gone:  # workers' files have no way to forget; `export` leaves zeros out
            _VERSION_STATE.labels(*series).set(0)
        _states[role] = now


def watch_queue(service: str, queue: Queue) -> None:
    """From now on, whenever something is counted, look how many requests of "lookup" or "rank" are in `queue`."""
    with _counting:  # which goes through them
        _queues[service] = queue
    _count_soon()


@_noting
def observe_batch(what: str, size: int) -> None:
    """How much was done at once, such as ids of a lookup or requests of one run of a model."""
    _batch_size[what](size)


def export(host: str, port: int, security: ServerSecurity | None = None, *, workers: str | Path | None = None) -> int:
    """Answer `GET /metrics` from one thread of this process until it ends.

    Args:
        port: 0 picks a free one.
        security: its certificate makes this HTTPS, its client CA asks for certificates; None: HTTP.
        workers: directory that workers count in; None: what this process counts. The environment does not decide:
            Feast sets `PROMETHEUS_MULTIPROC_DIR` in every process that imports it.

    Returns:
        The port.

    Raises:
        InvalidConfig: the port is in use or not allowed.
    """
    from online.observe.collectors import sources
    from online.observe.exporter import MetricsEndpoint

    endpoint = MetricsEndpoint(host, port, sources(registry, workers), security)
    endpoint.start()
    return endpoint.port
