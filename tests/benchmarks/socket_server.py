"""What a faster transport would give: the CPU tier's own service and the same protobufs over a Unix socket.

`python -m tests.benchmarks.socket_server WORKSPACE SOCKET` prints `ready`. A frame is a message behind four bytes of
length, little-endian; a connection has a thread of its own.
"""

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
from online.lookup.wire import read_answer, read_request, request_bytes
from pipelines.contracts.workspace import Workspace

__all__ = ["NoGrpc", "SocketClient", "lookup_service"]

LENGTH = struct.Struct("<I")


class SocketClient:
    """One connection. Not safe to share between threads."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def lookup(self, version: int, table: str, ids: np.ndarray) -> np.ndarray:
        """Packed rows uint8 (B, row_bytes) of ids int64 (B,)."""
        _send(self._socket, request_bytes("", [version], [(table, ids, ())]))
        _, row_bytes, rows, _ = read_answer(_receive(self._socket)).tables[0]
        return rows.reshape(len(ids), row_bytes)

    def close(self) -> None:
        self._socket.close()


class NoGrpc:
    """What the service asks of gRPC, without gRPC."""

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def abort(self, status: object, details: str) -> NoReturn:
        raise RuntimeError(details)


def _serve(connection: socket.socket, service: LookupService) -> None:
    with connection:
        while message := _receive(connection):
            _send(connection, service.Lookup(read_request(message), NoGrpc()))


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
