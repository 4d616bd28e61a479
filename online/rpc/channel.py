"""Channels to servers: addresses, reconnection, and the credentials that go with every call."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc.experimental import ChannelOptions

from online.security.credentials import ClientSecurity, is_loopback
from pipelines.contracts.errors import InvalidConfig

__all__ = ["open_channel"]

MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that was restarted is found again within a second, not after gRPC's growing pauses of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # What gRPC calls this is the time that a connection has to come up, TLS included: not to be cut short.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A call that waits long, such as for a version to load, ends when its host is gone. Not more often than
    # `online.rpc.limits` allows, and only while a call is under way.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # What `online.rpc.unary` starts is read by the thread that waits for it.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
]


def open_channel(
    target: str, security: ClientSecurity | None = None, *, own_connection: bool = False,
    grpc_retries: bool = True,
) -> grpc.Channel:
    """A channel to `host:port`; nothing is connected before the first call.

    Args:
        own_connection: shares its connection with no other channel to the same address.
        grpc_retries: whether gRPC itself sends a call again that met the end of a connection (by idleness, say) and
            was not begun. Leave it on unless the caller retries: it costs every call some microseconds.

    Raises:
        InvalidConfig: no such address, or a token would be sent to another machine for everybody to read.
    """
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit()):
        raise InvalidConfig(
            "address of a server", expected="host:port", got=repr(target), remedy="Give both, as in 127.0.0.1:50051."
        )
    options = [
        *CHANNEL_OPTIONS,
        ("grpc.use_local_subchannel_pool", int(own_connection)),
        ("grpc.enable_retries", int(grpc_retries)),
    ]
    if security is None:
        return grpc.insecure_channel(target, options=options)
    token = security.token()
    if credentials := security.credentials():
        name = [("grpc.ssl_target_name_override", security.server_name)] if security.server_name else []
        channel = grpc.secure_channel(target, credentials, options=[*options, *name])
    else:
        if token and not is_loopback(host):
            raise InvalidConfig(
                f"token for {target}", expected="TLS, since it is not on this machine", got="plaintext",
                remedy="Give the CA of its certificate by --tls-ca.",
            )
        channel = grpc.insecure_channel(target, options=options)
    return _WithToken(channel, token.value) if token else channel


class _WithToken(grpc.Channel):
    """Sends a bearer token with every call.

    gRPC's own call credentials take a thread for each call, and are refused on plaintext even within a machine.
    """

    def __init__(self, channel: grpc.Channel, token: Callable[[], str]) -> None:
        self._channel, self._token = channel, token

    def unary_unary(self, method, *arguments, **options) -> "_WithTokenCall":
        return _WithTokenCall(self._channel.unary_unary(method, *arguments, **options), self._token)

    def unary_stream(self, method, *arguments, **options) -> "_WithTokenCall":
        return _WithTokenCall(self._channel.unary_stream(method, *arguments, **options), self._token)

    def stream_unary(self, method, *arguments, **options) -> "_WithTokenCall":
        return _WithTokenCall(self._channel.stream_unary(method, *arguments, **options), self._token)

    def stream_stream(self, method, *arguments, **options) -> "_WithTokenCall":
        return _WithTokenCall(self._channel.stream_stream(method, *arguments, **options), self._token)

    def subscribe(self, callback, try_to_connect=False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "_WithToken":
        return self

    def __exit__(self, *_) -> bool:
        self.close()
        return False


class _WithTokenCall:
    """A method of a channel, of any of the four kinds."""

    def __init__(self, call: Any, token: Callable[[], str]) -> None:
        self._call, self._token = call, token

    def __call__(self, request, timeout=None, metadata=None, **options) -> Any:
        return self._call(request, timeout=timeout, metadata=self._with_token(metadata), **options)

    def future(self, request, timeout=None, metadata=None, **options) -> Any:
        return self._call.future(request, timeout=timeout, metadata=self._with_token(metadata), **options)

    def with_call(self, request, timeout=None, metadata=None, **options) -> Any:
        return self._call.with_call(request, timeout=timeout, metadata=self._with_token(metadata), **options)

    def _with_token(self, metadata) -> tuple:
        return (*(metadata or ()), ("authorization", f"Bearer {self._token()}"))
