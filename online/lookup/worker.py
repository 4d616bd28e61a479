"""One of several workers of a host, from within: what its parent told it, and how it is directed and watched."""

import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from online.host_state import HostState
from online.rpc.server import STOP_GRACE_S

__all__ = ["FOLDER_PREFIX", "WorkerAdmin", "state_from_parent"]

FOLDER_PREFIX = "facet-workers-"
"""Of the directory in which all workers of a host have their sockets."""


def state_from_parent(socket_path: str) -> tuple[HostState, bool]:
    """What this worker is to hold, and whether it must hold all of it. From now on it ends when its parent does."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(Path(socket_path).parent,), name="parent", daemon=True).start()
    return HostState.from_dict(told["state"]), told["whole"]


def _end_with_parent(folder: Path) -> None:
    sys.stdin.read()  # returns when the last writer is gone, which only the parent is
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)  # at once: whoever starts the host again needs the port


class _Alive(health_pb2_grpc.HealthServicer):
    """Says so, in a thread of its own: changes, which may wait for one another for minutes, may have all others."""

    def Check(self, request: object, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    Check.experimental_thread_pool = ThreadPoolExecutor(1, thread_name_prefix="alive")


class WorkerAdmin:
    """A worker's admin service, on a socket that only its own user can reach; stands in for an `Endpoint`."""

    name, port = "admin", 0

    def __init__(self, socket_path: str) -> None:
        self.server = grpc.server(ThreadPoolExecutor(4, thread_name_prefix=self.name))
        health_pb2_grpc.add_HealthServicer_to_server(_Alive(), self.server)
        self.server.add_insecure_port(f"unix:{socket_path}")

    def start(self) -> None:
        self.server.start()

    def stop(self) -> threading.Event:
        return self.server.stop(STOP_GRACE_S)
