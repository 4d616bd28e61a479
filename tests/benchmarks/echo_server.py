"""The rival of a lookup: gRPC as we configure it, raw bytes in, so many raw bytes out, nothing done in between.

`python -m tests.benchmarks.echo_server BYTES` prints its port when it answers.
"""

import os
import sys

import grpc

from online.server import Endpoint

__all__ = ["METHOD"]

METHOD = "/facet.benchmark/Echo"


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, reply: bytes) -> None:
        self._handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handler


if __name__ == "__main__":
    endpoint = Endpoint("echo", "127.0.0.1", 0, 8)
    endpoint.server.add_generic_rpc_handlers((_Echo(os.urandom(int(sys.argv[1]))),))
    endpoint.start()
    print(endpoint.port, flush=True)
    endpoint.server.wait_for_termination()
