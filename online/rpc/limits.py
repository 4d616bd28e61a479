"""What a port takes from its callers: the sizes, counts and times past which gRPC itself turns them away."""

from dataclasses import dataclass, replace

import grpc.aio

from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig

__all__ = ["MAX_DEADLINE_S", "Limits"]

ENVELOPE_BYTES = 64 << 10
"""Of a request beside its ids: names of tables, accepted versions, a request id."""

SPACIOUS = 2

ROUNDED_UP = 1.05
"""On its way gRPC rounds a timeout up, by some percent at most."""
MAX_DEADLINE_S = 300.0
"""Of a lookup or a rank request: clients keep to what servers allow."""
MAX_ADMIN_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Limits:
    """Limits of one listening port.

    A request larger than `request_bytes` is refused by its header, before it is read: RESOURCE_EXHAUSTED, without
    `facet-error`.

    Attributes:
        request_bytes: largest request; `for_ids` says what a batch needs.
        response_bytes: largest answer.
        metadata_bytes: headers of one call, a bearer token among them.
        connections: at once; more are closed before their handshake.
        streams: calls under way on one connection; a client's further calls wait on its side.
        handshake_s: until a new connection has finished TLS and HTTP/2.
        message_s: until the message of a call that was opened is there.
        call_s: the longest deadline that a call may have, and it has to have one: it is gRPC that ends a call then,
            also one whose client does not read the answer. Streams of health and reflection end after as long.
        unread_bytes, all_unread_bytes: of answers that their clients have not read, of one connection and of all.
        idle_s: a connection without calls is closed after so long; its client opens another when it needs one.
        age_s, grace_s: after `age_s` a connection takes no new calls, and those under way have `grace_s` to finish.
            Clients move to a new one without failing; certificates that expired or were renewed come into effect.
        ping_interval_s: a client that pings more often than this without sending anything is disconnected, whether it
            has calls under way or not.
        keepalive_s: the server asks a silent connection after so long whether anybody is there.
    """

    request_bytes: int = 16 << 20
    response_bytes: int = 64 << 20
    metadata_bytes: int = 8 << 10
    connections: int = 1024
    streams: int = 256
    handshake_s: float = 10.0
    message_s: float = 10.0
    call_s: float = MAX_DEADLINE_S
    unread_bytes: int = 32 << 20
    all_unread_bytes: int = 256 << 20
    idle_s: float = 600.0
    age_s: float = 3600.0
    grace_s: float = 60.0
    ping_interval_s: float = 10.0
    keepalive_s: float = 60.0

    def __post_init__(self) -> None:
        if bad := [name for name, value in vars(self).items() if not value > 0]:
            raise InvalidConfig(
                "limits", expected="positive numbers", got=", ".join(f"{name}={getattr(self, name)}" for name in bad),
                remedy="Correct them; a limit cannot be switched off, only set high.",
            )

    def for_ids(self, count: int) -> "Limits":
        """These limits for requests of up to `count` ids of 8 bytes.

        With more room than they need, so that the service itself tells most callers who exceed it (BATCH_TOO_LARGE).
        """
        return replace(self, request_bytes=SPACIOUS * 8 * count + ENVELOPE_BYTES)

    def for_admin(self) -> "Limits":
        """These limits for what a rollout asks, which may take as long as a version takes to load."""
        return replace(self.for_ids(0), call_s=MAX_ADMIN_DEADLINE_S)

    def remaining_s(self, context: grpc.aio.ServicerContext) -> float:
        """Seconds until a call's deadline; raises `RpcError` NO_DEADLINE if it has none within `call_s`."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > self.call_s * ROUNDED_UP:
            raise RpcError(
                Code.NO_DEADLINE, "the call's deadline", expected=f"one within {self.call_s:g} s",
                got="none" if remaining_s is None else f"one in {remaining_s:.0f} s",
                remedy="Give the call a timeout, as in `stub.Method(request, timeout=1.0)`.",
            )
        return remaining_s

    def options(self) -> list[tuple[str, int]]:
        """As gRPC's server options."""
        return [
            ("grpc.max_receive_message_length", self.request_bytes),
            ("grpc.max_send_message_length", self.response_bytes),
            # Where the second is larger, gRPC refuses calls between the two at random.
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.server_handshake_timeout_ms", _ms(self.handshake_s)),
            ("grpc.max_connection_idle_ms", _ms(self.idle_s)),
            ("grpc.max_connection_age_ms", _ms(self.age_s)),
            ("grpc.max_connection_age_grace_ms", _ms(self.grace_s)),
            ("grpc.http2.min_ping_interval_without_data_ms", _ms(self.ping_interval_s)),
            ("grpc.http2.max_ping_strikes", 2),
            # Without it, gRPC allows a client that has no call under way one ping in two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", _ms(self.keepalive_s)),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]


def _ms(seconds: float) -> int:
    return max(int(seconds * 1e3), 1)
