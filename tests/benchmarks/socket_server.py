"""What a faster transport would give: the CPU tier's own service and the same protobufs over a Unix socket.

`python -m tests.benchmarks.socket_server WORKSPACE SOCKET` prints `ready`. A frame is a message behind four bytes of
length, little-endian; a connection has a thread of its own.
"""

import math
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import NoReturn

import numpy as np

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.service import LookupService
from online.proto import lookup_pb2
from online.rpc.guard import Call
from pipelines.contracts.workspace import Workspace

__all__ = ["NO_CALL", "SocketClient", "lookup_service"]

LENGTH = struct.Struct("<I")


class SocketClient:
    """One connection. Not safe to share between threads."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def lookup(self, version: int, table: str, ids: np.ndarray) -> np.ndarray:
        """Packed rows uint8 (B, row_bytes) of ids int64 (B,)."""
        request = lookup_pb2.LookupRequest(
            accepted_versions=[version], tables=[lookup_pb2.TableIds(name=table, ids=ids.tobytes())]
        )
        _send(self._socket, request.SerializeToString())
        answer = lookup_pb2.LookupResponse.FromString(_receive(self._socket)).tables[0]
        return np.frombuffer(answer.rows, np.uint8).reshape(len(ids), answer.row_bytes)

    def close(self) -> None:
        self._socket.close()


NO_CALL = Call(arrived=0.0, waited_s=0.0, deadline=math.inf)
"""Of a request that came by no gRPC."""


def _serve(connection: socket.socket, service: LookupService) -> None:
    with connection:
        while message := _receive(connection):
            answer = service.Lookup(lookup_pb2.LookupRequest.FromString(message), NO_CALL)
            _send(connection, answer.SerializeToString())


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    """One message; empty when the other side is gone."""
    head = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    return connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL) if head else b""


def lookup_service(workspace: Workspace) -> LookupService:
    """The CPU tier's service, over version 1."""
    hosted = HostedVersions(lambda version: VersionReader.open(workspace, version))
    hosted.load(1)
    return LookupService(hosted)


def main(workspace: Workspace, path: str) -> NoReturn:
    service = lookup_service(workspace)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=_serve, args=(connection, service), daemon=True).start()


if __name__ == "__main__":
    main(Workspace(Path(sys.argv[1])), sys.argv[2])
