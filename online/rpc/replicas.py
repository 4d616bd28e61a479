"""Servers that can answer the same request, and which of them is sent the next one."""

import time
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

import grpc

from online.rpc.channel import open_channel
from online.rpc.throttle import Throttle
from pipelines.contracts.errors import InvalidConfig

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["EJECTION_S", "Replica", "Replicas"]

EJECTION_S = 1.0  # for which a server that did not answer is passed over while there are others


class Replica:
    """One server.

    Attributes:
        methods: the remote method, on each connection.
        throttle: which requests are not sent to it.
        ejected_until: by the clock of its `Replicas`; it is passed over until then.
    """

    def __init__(
        self, target: str, channels: Sequence[grpc.Channel], methods: Sequence[Any], throttle: Throttle
    ) -> None:
        self.target, self.channels, self.methods, self.throttle = target, channels, methods, throttle
        self.ejected_until = 0.0


class Replicas:
    """Servers that can answer the same request, in round robin. Safe to use from several threads.

    Args:
        open_method: channel -> the remote method, such as an `online.rpc.unary.UnaryMethod`.
        connections: to each server. Several workers behind one port share its connections, not its requests.
        retries: whether the caller sends a request again that a server did not take, so that gRPC need not.
        clock: seconds, as `time.monotonic`.
        sleep: waits for seconds.
        random: what is drawn at random: a server, a backoff's jitter, what the throttle rejects.

    Raises:
        InvalidConfig: there is no target, one is no address, or there are no connections.
    """

    def __init__(
        self, targets: Sequence[str], open_method: Callable[[grpc.Channel], Any], *,
        security: "ClientSecurity | None" = None, connections: int = 1, retries: bool = True,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Any] = time.sleep,
        random: Random | None = None,
    ) -> None:
        if not targets:
            raise InvalidConfig("servers", expected="at least one host:port", got="none", remedy="Name one.")
        if connections < 1:
            raise InvalidConfig(
                "connections", expected="at least 1", got=str(connections), remedy="Choose another number."
            )
        self.clock, self.sleep, self.random = clock, sleep, random or Random()

        def opened(target: str) -> Replica:
            channels = [
                open_channel(target, security, own_connection=connections > 1, grpc_retries=not retries)
                for _ in range(connections)
            ]
            return Replica(target, channels, [*map(open_method, channels)], Throttle(clock, self.random.random))

        self._replicas = [opened(target) for target in targets]
        self._connections = connections
        # Clients that start together begin at different servers.
        self._turn = count(self.random.randrange(len(targets)))

    def __len__(self) -> int:
        return len(self._replicas)

    def pick(self, tried: Sequence[Replica]) -> tuple[Replica, Any]:
        """The next server and its method; one that is ejected or was tried only if there is no other."""
        cycle, number = divmod(next(self._turn), len(self._replicas))
        replica = self._replicas[number]
        if len(self._replicas) > 1:
            now = self.clock()
            if replica in tried or replica.ejected_until > now:
                untried = [other for other in self._replicas if other not in tried] or self._replicas
                usable = [other for other in untried if other.ejected_until <= now]
                replica = (
                    self.random.choice(usable) if usable else min(untried, key=lambda other: other.ejected_until)
                )
        return replica, replica.methods[cycle % self._connections]

    def eject(self, replica: Replica) -> None:
        """Pass over a server for a moment."""
        replica.ejected_until = self.clock() + EJECTION_S

    def close(self) -> None:
        for replica in self._replicas:
            for channel in replica.channels:
                channel.close()
