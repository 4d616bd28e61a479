"""A gRPC server in this process, for tests of clients."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

__all__ = ["grpc_server"]

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
        server.stop(0).wait()
