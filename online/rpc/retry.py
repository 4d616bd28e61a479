"""Calls that are sent again to other replicas: after which refusals, how often, and after which pause."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import grpc

from online.printable import printable
from online.rpc.limits import MAX_DEADLINE_S
from online.rpc.replicas import Replica, Replicas
from online.rpc.unary import StartedCall
from online.rpc_error import CODE_KEY, Code, rpc_error_from
from pipelines.contracts.errors import InvalidConfig

__all__ = ["RetryPolicy", "RetryingCall", "checked_timeout_s"]

logger = logging.getLogger(__name__)

MIN_TIMEOUT_S = 0.001  # the shortest that gRPC does not take for a deadline that has passed


def checked_timeout_s(timeout_s: float) -> float:
    """The timeout of a client's requests; raises `InvalidConfig` if servers would refuse it."""
    if not 0 < timeout_s <= MAX_DEADLINE_S:
        raise InvalidConfig(
            "timeout of a request", expected=f"seconds above 0, at most {MAX_DEADLINE_S:g}", got=f"{timeout_s:g}",
            remedy="Choose another.",
        )
    return timeout_s


@dataclass(frozen=True)
class RetryPolicy:
    """When a call is sent again, in the terms of gRPC's retry policy: https://grpc.io/docs/guides/retry.

    Unlike there, a call first goes to every replica, at once; a backoff follows when all were tried.

    Attributes:
        max_attempts: how often a call is sent at most, the first time included.
        retryable_codes: refusals after which it is sent again.
        once_per_replica: those of them after which it is not sent to the same replica again, which would say the same.
        initial_backoff_s: before jitter; by the code of the last refusal, and for those not named.
        backoff_multiplier: growth from one backoff to the next.
        max_backoff_s: before jitter.
        jitter: a backoff is drawn between 1 - jitter and 1 + jitter times what it would be, so that clients that were
            refused together do not come back together.

    Raises:
        InvalidConfig: there is no attempt.
    """

    max_attempts: int
    retryable_codes: frozenset[Code]
    once_per_replica: frozenset[Code] = frozenset()
    initial_backoff_s: float = 0.05  # gives a restart a moment
    overload_backoff_s: float = 0.005  # of OVERLOADED in its place
    backoff_multiplier: float = 2.0
    max_backoff_s: float = 1.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidConfig(
                "attempts", expected="at least 1", got=str(self.max_attempts), remedy="Choose another number."
            )

    def backoff_s(self, code: Code, number: int, draw: Callable[[], float]) -> float:
        """The pause after a refusal. `number`: pauses of this call before it. `draw`: numbers in [0, 1)."""
        initial_s = self.overload_backoff_s if code is Code.OVERLOADED else self.initial_backoff_s
        longest = math.ceil(math.log(self.max_backoff_s / initial_s, self.backoff_multiplier))
        backoff_s = min(initial_s * self.backoff_multiplier ** min(number, longest), self.max_backoff_s)
        return backoff_s * (1 + self.jitter * (2 * draw() - 1))


class RetryingCall:
    """One call, sent to one replica after the other until one answers or its policy ends it.

    Args:
        deadline: by the clock of `replicas`; attempts and backoffs included.
    """

    __slots__ = (
        "_attempts",
        "_backoffs",
        "_deadline",
        "_excluded",
        "_policy",
        "_replica",
        "_replicas",
        "_started",
        "_tried",
        "request",
        "request_id",
    )

    def __init__(
        self, replicas: Replicas, request: Any, request_id: str, policy: RetryPolicy, deadline: float
    ) -> None:
        self._replicas, self._policy, self._deadline = replicas, policy, deadline
        self.request, self.request_id = request, request_id
        self.reset()

    def reset(self) -> None:
        """Be as if nothing had been sent."""
        self._attempts = self._backoffs = 0
        self._started: StartedCall | _ThrottledMethod | None = None
        self._tried: Sequence[Replica] = ()  # since the last backoff
        self._excluded: Sequence[Replica] = ()  # for the rest of this call

    def start(self) -> None:
        """Send the first attempt and return at once."""
        self._started = self._next_method().start(self.request, timeout=self._attempt_s())

    def result(self) -> Any:
        """Wait for the answer, in one thread, once; if nothing was started, send it now. Raises `RpcError`."""
        while True:
            started, self._started = self._started, None
            try:
                if started is None:
                    answer = self._next_method()(self.request, timeout=self._attempt_s())
                else:
                    answer = started.result()
            except grpc.RpcError as error:
                self._after_refusal(error)
            else:
                self._replica.throttle.accepted()
                return answer

    @property
    def target(self) -> str:
        """The replica that was sent the last attempt."""
        return self._replica.target

    def _next_method(self) -> Any:
        self._replica, method = self._replicas.pick(self._tried)
        self._attempts += 1
        return _THROTTLED if self._replica.throttle.rejects() else method

    def _attempt_s(self) -> float:
        """Timeout of this attempt: a server that hangs must leave time for another one."""
        remaining_s = max(self._deadline - self._replicas.clock(), MIN_TIMEOUT_S)
        another = len(self._replicas) > 1 and self._attempts < self._policy.max_attempts
        return remaining_s / 2 if another else remaining_s

    def _after_refusal(self, error: grpc.RpcError) -> None:
        """Return when the call is to be sent again, after a backoff if all replicas were tried; else raise."""
        replica, policy = self._replica, self._policy
        refusal = rpc_error_from(error, replica.target)
        if refusal.code in (Code.LOOKUP_UNAVAILABLE, Code.DEADLINE):
            self._replicas.eject(replica)
        if refusal.code is not Code.OVERLOADED:
            replica.throttle.accepted()
        elif not isinstance(error, _Throttled):
            replica.throttle.overloaded()
        if refusal.code not in policy.retryable_codes or self._attempts >= policy.max_attempts:
            raise refusal from error
        self._tried = (*self._tried, replica)
        if refusal.code in policy.once_per_replica:
            self._excluded = (*self._excluded, replica)
        if len(self._excluded) >= len(self._replicas):
            raise refusal from error
        backoff_s = 0.0
        if len(self._tried) >= len(self._replicas):
            self._tried = self._excluded
            backoff_s = policy.backoff_s(refusal.code, self._backoffs, self._replicas.random.random)
            self._backoffs += 1
        if self._replicas.clock() + backoff_s >= self._deadline:
            raise refusal from error
        logger.info("request %s: %s; sent again", printable(self.request_id), refusal)
        if backoff_s:
            self._replicas.sleep(backoff_s)


class _Throttled(grpc.RpcError):
    """Said in place of a server that would very likely say the same."""

    def code(self) -> grpc.StatusCode:
        return Code.OVERLOADED.status

    def details(self) -> str:
        return "throttled by this client: the server refuses others for overload; this request was not sent"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((CODE_KEY, Code.OVERLOADED.name),)


class _ThrottledMethod:
    """Stands in for a remote method, and for its started call."""

    def __call__(self, request: Any, *, timeout: float) -> NoReturn:
        raise _Throttled

    def start(self, request: Any, *, timeout: float) -> Self:
        return self

    def result(self) -> NoReturn:
        raise _Throttled


_THROTTLED = _ThrottledMethod()
