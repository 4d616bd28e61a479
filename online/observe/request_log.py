"""What servers log: nothing for a request that is answered in time; one line, at a bounded rate, for one that is not;
one line for each call of an admin service; of errors that nobody foresaw the trace, a few a minute of each.

Every line that is logged while a request is served carries the request's id, whoever logs it. As JSON (`facet serve …
--log-json`), one object a line:

    {"time": "2026-01-31T12:00:00.123Z", "level": "WARNING", "logger": "online.observe.request_log", "role": "ranker",
     "message": "rank refused: OVERLOADED", "request_id": "7f3a", "code": "OVERLOADED", "ms": 0.2}
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from datetime import UTC, datetime
from traceback import walk_tb
from types import TracebackType
from typing import Any

from online.observe import metrics
from online.printable import printable
from online.rpc_error import Code, RpcError, as_rpc_error
from pipelines.contracts.errors import FacetError

__all__ = [
    "JsonFormatter", "LimitedRate", "ServedRequest", "audit", "configure", "count_refused", "current_request",
    "log_defect",
]

logger = logging.getLogger(__name__)
audit_logger = logging.getLogger(f"{__name__}.audit")

MAX_ID = 64
MAX_TEXT = 4096
MAX_KEYS = 256
LINES_PER_SECOND = 10
TRACES_PER_MINUTE = 3

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""Id of the request that this thread serves; empty outside of one."""


class LimitedRate:
    """At most `limit` events in `window_s` seconds of each key; says how many were left out. Safe from many threads.

    Args:
        clock: seconds, never backwards.

    >>> rate = LimitedRate(1, clock=iter([0.0, 0.5, 1.0]).__next__)
    >>> rate.admit("a"), rate.admit("a"), rate.admit("a")
    (0, None, 1)
    """

    def __init__(
        self, limit: int, *, window_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._window_s, self._clock = limit, window_s, clock
        self._windows, self._changing = {}, threading.Lock()

    def admit(self, key: Hashable) -> int | None:
        """None: leave this one out. Else how many of the key were left out since the last that was not.

        Args:
            key: each is remembered; those beyond `MAX_KEYS` share one limit.
        """
        with self._changing:
            now = self._clock()
            if key not in self._windows and len(self._windows) >= MAX_KEYS:
                key = None
            window = self._windows.setdefault(key, [now, 0, 0])  # its start, admitted in it, left out since
            if now - window[0] >= self._window_s:
                window[:2] = now, 0
            if window[1] >= self._limit:
                window[2] += 1
                return None
            left_out, window[2] = window[2], 0
            window[1] += 1
            return left_out


class ServedRequest:
    """A request while it is served: named in every log line, counted by `metrics`, logged if refused or slow.

    ```
    with errors_to_status(context, request_id), ServedRequest("rank", request_id) as served:
        ...
        served.version = scorer.version
    ```

    Args:
        service: "lookup" or "rank".
        request_id: any text.

    Attributes:
        version: what answered; set it as soon as it is known.
    """

    __slots__ = ("_began", "_service", "_token", "request_id", "version")

    def __init__(self, service: str, request_id: str) -> None:
        self._service, self.request_id, self.version = service, request_id, 0

    def __enter__(self) -> "ServedRequest":
        self._token = current_request.set(self.request_id)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._began
        code = "OK"
        if error is not None:
            code = (as_rpc_error(error).code if isinstance(error, FacetError) else Code.INTERNAL).name
        metrics.observe_request(self._service, code, seconds)
        if error is not None or seconds >= _settings.slow_s:
            _log(self._service, code, seconds, error, self.request_id, self.version)
        current_request.reset(self._token)


def count_refused(service: str, refusal: RpcError, *, peer: str = "") -> None:
    """A request that was refused before it was read: counted by `metrics` and logged, without its id.

    Args:
        service: "lookup", "rank" or "admin".
        peer: where it came from, as gRPC says it.
    """
    metrics.observe_request(service, refusal.code.name, 0.0)
    _log(service, refusal.code.name, 0.0, refusal, peer=peer)


def log_defect(named: str, error: Exception) -> None:
    """Log an error that nobody foresaw, with its trace: of those raised at one place, `TRACES_PER_MINUTE`.

    Whoever finds a request that meets a defect can send it again and again.

    Args:
        named: the request.
    """
    left_out = _settings.traces.admit(_raised_at(error))
    if left_out is not None:
        extra = {"left_out": left_out} if left_out else {}
        logger.error("%s failed%s", named, _left_out(left_out), exc_info=error, extra=extra)


def _raised_at(error: Exception) -> Hashable:
    """What errors of one defect have in common."""
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return type(error), *places[-1:]


def audit(method: str, caller: str, version: int, outcome: str, seconds: float, *, peer: str = "") -> None:
    """Log a call of an admin service: who did what, and how it ended. The logger is `….request_log.audit`.

    What a service answered or refused has a line for every call. Of calls that were refused before a service saw them,
    only a few a second have one.

    Args:
        method: such as "facet.v1.CpuTierAdmin/Promote"; only methods that exist.
        caller: name of the identity; empty: unknown.
        version: that the request named; 0: none.
        outcome: "OK" or the name of an `online.rpc_error.Code`.
        seconds: how long it took.
        peer: where it came from, as gRPC says it.
    """
    left_out = _settings.rate.admit((method, outcome)) if outcome in _NOT_ADMITTED else 0
    if left_out is None:
        return
    fields: dict[str, Any] = {"method": method, "outcome": outcome, "ms": round(seconds * 1e3, 3)}
    if caller:
        fields["caller"] = caller
    if peer:
        fields["peer"] = _bounded(peer, MAX_ID)
    if version:
        fields["version"] = version
    if left_out:
        fields["left_out"] = left_out
    audit_logger.log(
        logging.INFO if outcome == "OK" else logging.WARNING, "%s%s%s: %s%s, %.1f ms%s", method,
        f" by {printable(caller)}" if caller else "", f" from {printable(peer)}" if peer else "", outcome,
        f", version {version}" if version else "", seconds * 1e3, _left_out(left_out), extra=fields,
    )


_NOT_ADMITTED = {
    code.name
    for code in (
        Code.NOT_AUTHENTICATED, Code.NOT_ALLOWED, Code.NO_DEADLINE, Code.MALFORMED_REQUEST, Code.OVERLOADED,
        Code.DEADLINE,
    )
}
"""What a call may be refused for before a service sees it: by these, anybody could fill the log."""


def _log(
    service: str, code: str, seconds: float, error: BaseException | None, request_id: str = "",
    version: int = 0, peer: str = "",
) -> None:
    left_out = _settings.rate.admit((service, code))
    if left_out is None:
        return
    fields: dict[str, Any] = {"service": service, "code": code, "ms": round(seconds * 1e3, 3)}
    if version:
        fields["version"] = version
    if peer:
        fields["peer"] = _bounded(peer, MAX_ID)
    if left_out:
        fields["left_out"] = left_out
    if error is not None:
        fields["reason"] = _bounded(str(error))
    logger.warning(
        "%s %s: %s%s%s, %.1f ms%s", service, "slow" if error is None else "refused", code,
        f", request {printable(request_id)}" if request_id else "", f", from {printable(peer)}" if peer else "",
        seconds * 1e3, _left_out(left_out), extra=fields,
    )


def _left_out(lines: int) -> str:
    return f" ({lines} more like it left out)" if lines else ""


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII: `time` (UTC), `level`, `logger`, `message`, then `fields`, the request's id and
    whatever `extra` has."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            **self._fields,
            "message": _bounded(record.getMessage()),
        }
        if request_id := current_request.get():
            line["request_id"] = _bounded(request_id, MAX_ID)
        line |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_TEXT:]
        return json.dumps(line, default=lambda value: _bounded(str(value)))


_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


def _bounded(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


class _Settings:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.slow_s = float("inf")
        self.rate = LimitedRate(LINES_PER_SECOND, clock=clock)
        self.traces = LimitedRate(TRACES_PER_MINUTE, window_s=60.0, clock=clock)


_settings = _Settings()


def configure(*, role: str, as_json: bool, slow_ms: float | None) -> None:
    """Set up this process's log; the handlers stay those that there are.

    Args:
        role: "cpu-tier" or "ranker", in every JSON line.
        as_json: JSON lines instead of the plain format.
        slow_ms: log answers that took at least so long; None: none.
    """
    _settings.slow_s = float("inf") if slow_ms is None else slow_ms / 1e3
    if as_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter(role=role))
