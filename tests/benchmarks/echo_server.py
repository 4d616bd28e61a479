"""The rival of a lookup: a plain synchronous gRPC server, raw bytes in, so many raw bytes out, nothing done in between.

`python -m tests.benchmarks.echo_server BYTES` prints its port when it answers.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

__all__ = ["METHOD"]

METHOD = "/facet.benchmark/Echo"
THREADS = 8


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, reply: bytes) -> None:
        self._handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handler


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers((_Echo(os.urandom(int(sys.argv[1]))),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()
