"""The client of the rankers."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from online.printable import printable, shortened
from online.proto import rank_pb2
from online.rpc.replicas import Replicas
from online.rpc.retry import RetryingCall, RetryPolicy, checked_timeout_s
from online.rpc.unary import UnaryMethod
from online.rpc_error import Code, RpcError

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["RankClient", "RankedScores"]

_RETRYABLE = frozenset(
    {Code.LOOKUP_UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE, Code.VERSION_MISMATCH}
)
_ONCE_PER_REPLICA = frozenset({Code.DEADLINE})
_METHOD = rank_pb2.DESCRIPTOR.services_by_name["Rank"].methods_by_name["Rank"]
_SHA256_CHARACTERS = 64
_LONGEST_MS = 1e9


@dataclass(frozen=True)
class RankedScores:
    """Scores of candidates.

    Attributes:
        tasks: T names.
        scores: float32 (C, T), probabilities.
        found: table -> share of the asked ids that have a row.
        timing_ms: stage -> milliseconds.
    """

    version: int
    manifest_sha256: str
    tasks: tuple[str, ...]
    scores: np.ndarray
    found: dict[str, float]
    timing_ms: dict[str, float]


class RankClient:
    """Scores from any of several rankers. Safe to use from several threads.

    Ranking changes nothing, so a request may be sent again: with more than one attempt, a ranker that is away or
    overloaded, or got no rows that fit its models, is followed by the next, never past the deadline. By default there
    is one attempt, so that whoever measures sees every failure.

    >>> client = RankClient(["127.0.0.1:50061", "127.0.0.1:50062"], attempts=4)           # doctest: +SKIP
    >>> client.rank(17, np.array([42, 43])).scores                                        # doctest: +SKIP

    Args:
        targets: `host:port`, one or several.
        timeout_s: for a request, attempts included; at most the five minutes that servers allow.
        attempts: how often a request is sent at most.

    Raises:
        InvalidConfig: there is no target, one is no address, or a number is out of its range.
    """

    def __init__(
        self, targets: str | Sequence[str], *, timeout_s: float = 5.0, attempts: int = 1,
        security: "ClientSecurity | None" = None,
    ) -> None:
        self._timeout_s = checked_timeout_s(timeout_s)
        self._retry_policy = RetryPolicy(attempts, _RETRYABLE, _ONCE_PER_REPLICA)
        self._rankers = Replicas(
            [targets] if isinstance(targets, str) else targets, partial(UnaryMethod, method=_METHOD),
            security=security, retries=attempts > 1,
        )
        self._name, self._number = os.urandom(8).hex(), count()

    def rank(
        self, user: int, candidates: np.ndarray, *, now_seconds: float = 0.0, request_id: str = ""
    ) -> RankedScores:
        """Score `candidates` (int64 (C,)) for a user at a moment (seconds since 1970; 0: now).

        Raises:
            RpcError: what a ranker refused; INTERNAL when an answer does not fit the request.
        """
        request = rank_pb2.RankRequest(
            request_id=request_id or f"{self._name}-{next(self._number):x}", user=user,
            candidates=np.asarray(candidates, "<i8").tobytes(), now_seconds=now_seconds,
        )
        deadline = time.monotonic() + self._timeout_s
        call = RetryingCall(self._rankers, request, request.request_id, self._retry_policy, deadline)
        response = call.result()
        if misfit := _misfit(response, len(candidates)):
            raise RpcError(
                Code.INTERNAL, f"answer of {call.target} to request {printable(request.request_id)}",
                expected=misfit.expected, got=misfit.got, remedy="Check what listens at that address.",
            )
        return RankedScores(
            version=response.version,
            manifest_sha256=response.manifest_sha256,
            tasks=tuple(response.tasks),
            scores=np.frombuffer(response.scores, "<f4").reshape(-1, len(response.tasks)),
            found={entry.table: entry.found / entry.ids if entry.ids else 0.0 for entry in response.found},
            timing_ms={field.name: value for field, value in response.timing.ListFields()},
        )

    def close(self) -> None:
        self._rankers.close()


class _Misfit(NamedTuple):
    expected: str
    got: str


def _misfit(answer: rank_pb2.RankResponse, candidates: int) -> _Misfit | None:
    """What does not fit in an answer for so many candidates; None: it fits."""
    if not (answer.version > 0 and len(answer.manifest_sha256) <= _SHA256_CHARACTERS):
        return _Misfit("a version and its manifest", f"{answer.version} of {printable(answer.manifest_sha256)}")
    tasks = list(answer.tasks)
    if not tasks or len(set(tasks)) < len(tasks):
        return _Misfit("tasks, each once", f"{len(tasks)}: {shortened(str(tasks[:8]), 200)}")
    if len(answer.scores) != 4 * candidates * len(tasks):
        return _Misfit(f"{candidates} x {len(tasks)} scores of 4 bytes", f"{len(answer.scores)} bytes")
    scores = np.frombuffer(answer.scores, "<f4")
    if not ((scores >= 0) & (scores <= 1)).all():  # false of nan
        return _Misfit("probabilities", f"scores from {scores.min()} to {scores.max()}")
    tables = [entry.table for entry in answer.found]
    if len(set(tables)) < len(tables) or any(entry.found > entry.ids for entry in answer.found):
        counts = [(printable(entry.table), entry.ids, entry.found) for entry in answer.found[:8]]
        return _Misfit("tables, each once, with no more rows than ids", shortened(str(counts), 400))
    for field, value in answer.timing.ListFields():
        if not abs(value) < _LONGEST_MS:
            return _Misfit(f"milliseconds as {field.name}", str(value))
    return None
