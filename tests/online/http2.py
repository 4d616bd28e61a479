"""HTTP/2 by hand, for what no client library would send."""

import socket
import struct
import threading
from contextlib import suppress

__all__ = ["PREFACE", "Connection", "call_beginning", "frame"]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """An HTTP/2 frame, with a length that need not be true."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(method: str, timeout: str = "") -> bytes:
    """The block of headers of a call."""
    fields = {
        b":method": b"POST", b":scheme": b"http", b":path": method.encode(), b":authority": b"a",
        b"content-type": b"application/grpc", b"te": b"trailers",
    }
    if timeout:
        fields[b"grpc-timeout"] = timeout.encode()
    return b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items()
    )


def call_beginning(method: str, *, timeout: str = "50S") -> bytes:
    """A connection's beginning and the headers of a call."""
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 4, 1, headers(method, timeout))


class Connection:
    """A client that reads frames and answers none of them, but for settings.

    Args:
        window: bytes that the server may send of each answer before it is allowed more, which never happens.

    Attributes:
        pongs: payloads of the pings that were answered.
        resets: streams that the server ended without an answer.
        ended: whether the server ended the connection, or said that it will.
    """

    def __init__(self, port: int, *, window: int = 65_535) -> None:
        self.pongs: set[bytes] = set()
        self.resets, self.ended, self._blocks, self._stream = 0, False, [], 1
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, method: str, message: bytes | None, *, timeout: str = "50S") -> None:
        """Begin a call; with its message, unless that is None."""
        beginning = frame(HEADERS, 4, self._stream, headers(method, timeout))
        if message is not None:
            beginning += frame(DATA, 1, self._stream, b"\0" + struct.pack(">I", len(message)) + message)
        self._stream += 2
        self._socket.sendall(beginning)

    def ping(self, payload: bytes) -> None:
        try:
            self._socket.sendall(frame(PING, 0, 0, payload))
        except OSError:
            self.ended = True

    def statuses(self, code: str) -> int:
        """How many calls ended with a text in their trailing metadata, such as a code."""
        return sum(code.encode() in block for block in self._blocks)

    def close(self) -> None:
        with suppress(OSError):  # ended by the server
            self._socket.shutdown(socket.SHUT_RDWR)  # the thread that reads keeps it open
        self._socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as stream:
                while head := stream.read(9):
                    length, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                    self._note(kind, flags, stream.read(length))
        except (OSError, ValueError):
            pass
        self.ended = True

    def _note(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & 1:
            self._socket.sendall(frame(SETTINGS, 1, 0, b""))
        elif kind == PING and flags & 1:
            self.pongs.add(payload)
        elif kind == HEADERS:
            self._blocks.append(payload)
        elif kind == RST_STREAM:
            self.resets += 1
        elif kind == GOAWAY:
            self.ended = True
