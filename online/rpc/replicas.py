"""Servers that can answer the same question: which is asked next, and which refusals are worth another try."""

import logging
import random
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

import grpc

from online.printable import printable
from online.rpc.channel import open_channel
from online.rpc.sent_call import Pending, send
from online.rpc.throttle import Throttle
from online.rpc_error import CODE_KEY, Code, rpc_error_from
from pipelines.contracts.errors import InvalidConfig

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["Asking", "Replicas", "RetryPolicy"]

logger = logging.getLogger(__name__)

REST_S = 1.0  # for which a server that could not be reached is passed over while there are others
PAUSE_S = {Code.OVERLOADED: 0.005}  # after every server was tried; doubled each time
OTHER_PAUSE_S = 0.05  # gives a restart a moment
MAX_PAUSE_S = 1.0
SHORTEST_S = 0.001  # a timeout that gRPC still takes for one


class _Replica:
    """One server.

    Attributes:
        throttle: what is not sent to it.
        rests_until: of `time.monotonic()`; it is passed over until then.
    """

    def __init__(self, target: str, channels: list[grpc.Channel], open_method: Callable[[grpc.Channel], Any]) -> None:
        self.target, self.channels = target, channels
        self.methods = [open_method(channel) for channel in channels]
        self.rests_until, self.throttle = 0.0, Throttle()


class Replicas:
    """Servers that can answer the same question, asked in turn. Safe to use from several threads.

    Args:
        open_method: channel -> the remote method, to be called as `method(request, timeout=…)`.
        connections: to each server. Several workers behind one port share its connections, not its requests.
        asks_again: whether a call that was not begun is asked again anyway, by `Asking`.
    """

    def __init__(
        self, targets: Sequence[str], open_method: Callable[[grpc.Channel], Any], *,
        security: "ClientSecurity | None" = None, connections: int = 1, asks_again: bool = True,
    ) -> None:
        if not targets:
            raise InvalidConfig("servers", expected="at least one host:port", got="none", remedy="Name one.")
        if connections < 1:
            raise InvalidConfig(
                "connections", expected="at least 1", got=str(connections), remedy="Choose another number."
            )
        own = connections > 1

        def opened(target: str) -> grpc.Channel:
            return open_channel(target, security, own_connection=own, sent_again_by_grpc=not asks_again)

        self._replicas = [
            _Replica(target, [opened(target) for _ in range(connections)], open_method) for target in targets
        ]
        self._connections = connections
        self._turn = count(random.randrange(len(targets)))  # clients that start together begin at different servers

    def __len__(self) -> int:
        return len(self._replicas)

    def next(self, passed_over: Sequence[_Replica]) -> tuple[_Replica, Any]:
        """The server whose turn it is, and its method; one that rests, or is passed over, only if there is no other."""
        turn = next(self._turn)
        round_, number = divmod(turn, len(self._replicas))
        replica = self._replicas[number]
        if len(self._replicas) > 1:
            now = time.monotonic()
            if replica in passed_over or replica.rests_until > now:
                rest = [other for other in self._replicas if other not in passed_over] or self._replicas
                awake = [other for other in rest if other.rests_until <= now]
                replica = random.choice(awake) if awake else min(rest, key=lambda other: other.rests_until)
        return replica, replica.methods[round_ % self._connections]

    def close(self) -> None:
        for replica in self._replicas:
            for channel in replica.channels:
                channel.close()


class RetryPolicy(NamedTuple):
    """How often a client asks.

    Attributes:
        attempts: how often one question is sent at most.
        again: refusals after which another server is asked.
        once: those of them after which a server is not asked a second time: it would say the same, or hangs.
    """

    attempts: int
    again: frozenset[Code]
    once: frozenset[Code] = frozenset()


class Asking:
    """One question on its way over the replicas: answered by one of them, or refused for good.

    Args:
        deadline: of `time.monotonic()`, attempts and pauses included.
    """

    __slots__ = (
        "_asked",
        "_deadline",
        "_final",
        "_pauses",
        "_pending",
        "_replica",
        "_replicas",
        "_retry_policy",
        "_sent",
        "request",
        "request_id",
    )

    def __init__(
        self, replicas: Replicas, request: Any, request_id: str, patience: RetryPolicy, deadline: float
    ) -> None:
        self._replicas, self._retry_policy, self._deadline = replicas, patience, deadline
        self.request, self.request_id = request, request_id
        self.start_over()

    def start_over(self) -> None:
        """Be as if nothing had been sent."""
        self._sent = self._pauses = 0
        self._pending: Pending | None = None
        self._asked: Sequence[_Replica] = ()  # since the last pause
        self._final: Sequence[_Replica] = ()  # will not answer this question

    def call(self) -> Any:
        """Ask and wait in this thread; raises `RpcError`."""
        while True:
            method = self._method()
            try:
                answer = method(self.request, timeout=self._try_s())
            except grpc.RpcError as error:
                self._refused(error)
            else:
                self._replica.throttle.taken()
                return answer

    def send(self) -> None:
        """Ask and return at once."""
        self._pending = send(self._method(), self.request, self._try_s())

    def result(self) -> Any:
        """Wait for the answer to what was sent; if nothing was, ask and wait in this thread. Raises `RpcError`."""
        if self._pending is None:
            return self.call()
        try:
            answer = self._pending.result()
        except grpc.RpcError as error:
            self._refused(error)
        else:
            self._replica.throttle.taken()
            return answer
        return self.call()

    def cancel(self) -> None:
        """Wait no longer for what was sent, if anything was."""
        if self._pending is not None:
            self._pending.cancel()

    @property
    def target(self) -> str:
        """The server asked last."""
        return self._replica.target

    def _method(self) -> Any:
        self._replica, method = self._replicas.next(self._asked)
        self._sent += 1
        return _HELD_BACK if self._replica.throttle.holds_back() else method

    def _try_s(self) -> float:
        """Until when this try is waited for: a server that hangs must leave time to ask another."""
        remaining_s = max(self._deadline - time.monotonic(), SHORTEST_S)
        another = len(self._replicas) > 1 and self._sent < self._retry_policy.attempts
        return remaining_s / 2 if another else remaining_s

    def _refused(self, error: grpc.RpcError) -> None:
        """Return when another try is worth it, after a pause if every server has been asked; else raise."""
        refusal, replica = rpc_error_from(error, self._replica.target), self._replica
        if refusal.code in (Code.LOOKUP_UNAVAILABLE, Code.DEADLINE):
            replica.rests_until = time.monotonic() + REST_S
        if refusal.code is not Code.OVERLOADED:
            replica.throttle.taken()
        elif not isinstance(error, _HeldBack):
            replica.throttle.refused()
        if refusal.code not in self._retry_policy.again or self._sent >= self._retry_policy.attempts:
            raise refusal from error
        self._asked = (*self._asked, replica)
        if refusal.code in self._retry_policy.once:
            self._final = (*self._final, replica)
        if len(self._final) >= len(self._replicas):
            raise refusal from error
        pause_s = 0.0
        if len(self._asked) >= len(self._replicas):
            self._asked = self._final
            pause_s = min(PAUSE_S.get(refusal.code, OTHER_PAUSE_S) * 2**self._pauses, MAX_PAUSE_S)
            pause_s *= random.uniform(0.5, 1.5)  # so that those refused together do not come back together
            self._pauses = min(self._pauses + 1, 16)
        if time.monotonic() + pause_s >= self._deadline:
            raise refusal from error
        logger.info("request %s: %s; trying again", printable(self.request_id), refusal)
        time.sleep(pause_s)


class _HeldBack(grpc.RpcError):
    """Said in place of a server that would very likely say the same."""

    def code(self) -> grpc.StatusCode:
        return Code.OVERLOADED.status

    def details(self) -> str:
        return "it refuses others for overload; this request was not sent"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((CODE_KEY, Code.OVERLOADED.name),)


class _HeldBackMethod:
    """Stands in for a remote method, and for its call."""

    def __call__(self, request: Any, timeout: float) -> NoReturn:
        raise _HeldBack

    def send(self, request: Any, timeout: float) -> Self:
        return self

    def result(self) -> NoReturn:
        raise _HeldBack

    def cancel(self) -> None:
        pass


_HELD_BACK = _HeldBackMethod()
