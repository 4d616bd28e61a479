"""A gRPC server in this process, for tests of clients."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

import grpc

from online.rpc_error import CODE_KEY, VERSIONS_KEY, RpcError
from tests.waiting import PATIENCE_S

__all__ = ["end_by", "grpc_server"]

THREADS = 8


@contextmanager
def grpc_server(add: Callable[[grpc.Server], None], *, threads: int = THREADS) -> Iterator[str]:
    """The address of a server with the services that `add` adds; stopped at the end.

    `stop` of gRPC waits for servicers: one that holds a call looks at its context, or is let go before.
    """
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="server"), options=[("grpc.max_receive_message_length", -1)]
    )
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        assert server.stop(0).wait(PATIENCE_S)


def end_by(context: grpc.ServicerContext, error: RpcError) -> NoReturn:
    """End a call as our servers do, by an error's status and trailing metadata."""
    context.set_trailing_metadata(
        ((CODE_KEY, error.code.name), (VERSIONS_KEY, ",".join(map(str, error.versions))))
    )
    context.abort(error.status, str(error))
