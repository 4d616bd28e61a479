"""The client of the rankers."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from online.proto import rank_pb2, rank_pb2_grpc
from online.rpc.replicas import Asking, Replicas, RetryPolicy
from online.rpc_error import Code

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["RankClient", "RankedScores"]

_AGAIN = frozenset(
    {Code.LOOKUP_UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE, Code.VERSION_MISMATCH}
)
_ONCE = frozenset({Code.DEADLINE})


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
        timeout_s: for a request, attempts included.

    Raises:
        InvalidConfig: there is no target, or one is no address.
    """

    def __init__(
        self, targets: str | Sequence[str], *, timeout_s: float = 5.0, attempts: int = 1,
        security: "ClientSecurity | None" = None,
    ) -> None:
        self._rankers = Replicas(
            [targets] if isinstance(targets, str) else targets, _rank_method, security=security,
            asks_again=attempts > 1,
        )
        self._timeout_s, self._retry_policy = timeout_s, RetryPolicy(attempts, _AGAIN, _ONCE)
        self._name, self._number = os.urandom(8).hex(), count()

    def rank(
        self, user: int, candidates: np.ndarray, *, now_seconds: float = 0.0, request_id: str = ""
    ) -> RankedScores:
        """Score `candidates` (int64 (C,)) for a user at a moment (seconds since 1970; 0: now). Raises `RpcError`."""
        request = rank_pb2.RankRequest(
            request_id=request_id or f"{self._name}-{next(self._number):x}", user=user,
            candidates=np.ascontiguousarray(candidates, "<i8").tobytes(), now_seconds=now_seconds,
        )
        deadline = time.monotonic() + self._timeout_s
        response = Asking(self._rankers, request, request.request_id, self._retry_policy, deadline).call()
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


def _rank_method(channel: grpc.Channel) -> Any:
    return rank_pb2_grpc.RankStub(channel).Rank
