"""What became of many requests, kept in few bytes each, and the figures that are drawn from it."""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["NOT_SENT", "Failures", "Growing", "histogram", "percentiles"]

NOT_SENT = "NOT_SENT"
"""Code of a request that no thread was free to send before its client would have given up."""

BLOCK_ROWS = 8192
FIRST_FAILURES = 5
PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99_9": 99.9}


class Growing:
    """Rows of named columns that are appended by many threads, without a Python object for each.

    Args:
        columns: name -> dtype, and the shape of one row's value.

    >>> rows = Growing({"ms": (np.float32, ()), "pair": (np.int64, (2,))})
    >>> rows.append(ms=0.5, pair=[1, 2])
    >>> rows.column("pair").tolist(), len(rows)
    ([[1, 2]], 1)
    """

    def __init__(self, columns: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self._columns = dict(columns)
        self._blocks: list[dict[str, np.ndarray]] = []
        self._rows, self._growing = 0, threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def append(self, **values: Any) -> None:
        with self._growing:
            place = self._rows % BLOCK_ROWS
            if place == 0:
                self._blocks.append({
                    name: np.zeros((BLOCK_ROWS, *shape), dtype) for name, (dtype, shape) in self._columns.items()
                })
            block = self._blocks[-1]
            for name, value in values.items():
                block[name][place] = value
            self._rows += 1

    def column(self, name: str) -> np.ndarray:
        """Values of all rows, (N, *shape), in the order of appending."""
        dtype, shape = self._columns[name]
        if not self._blocks:
            return np.empty((0, *shape), dtype)
        return np.concatenate([block[name] for block in self._blocks])[: self._rows]


class Failures:
    """Every failure by code and moment; the first few with what was said."""

    def __init__(self) -> None:
        self._rows = Growing({"code": (np.int16, ()), "since_s": (np.float32, ())})
        self._codes: dict[str, int] = {}
        self._noting = threading.Lock()
        self.first: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, code: str, since_s: float, message: str) -> None:
        """`since_s`: when the request was sent or due, after the start."""
        with self._noting:
            number = self._codes.setdefault(code, len(self._codes))
            if len(self.first) < FIRST_FAILURES:
                self.first.append({"code": code, "sent_s": round(since_s, 3), "message": message})
        self._rows.append(code=number, since_s=since_s)

    def by_code(self) -> dict[str, int]:
        counts = Counter(self._rows.column("code").tolist())
        return {code: counts[number] for code, number in self._codes.items()}

    def since_s(self) -> np.ndarray:
        return self._rows.column("since_s")


def percentiles(latency_ms: Iterable[float]) -> dict[str, float]:
    """p50, p90, p95, p99, p99_9, max and mean in milliseconds; zeros when there is nothing."""
    values = np.asarray(latency_ms, np.float64)
    values = values if len(values) else np.zeros(1)
    figures = dict(zip(PERCENTILES, np.percentile(values, list(PERCENTILES.values())), strict=True))
    figures |= {"max": values.max(), "mean": values.mean()}
    return {name: round(float(value), 3) for name, value in figures.items()}


def histogram(latency_ms: np.ndarray, *, longest_ms: float = 1000.0) -> dict[str, list]:
    """Counts between 201 logarithmic edges from 0.05 ms; what is outside counts at the ends.

    The last edge is `longest_ms`, or beyond every value.
    """
    last = max(longest_ms, float(latency_ms.max())) if len(latency_ms) else longest_ms
    edges = np.geomspace(0.05, last, 201)
    counts, _ = np.histogram(np.clip(latency_ms, edges[0], edges[-1]), edges)
    return {"edges_ms": [round(float(edge), 4) for edge in edges], "counts": counts.tolist()}
