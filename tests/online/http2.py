"""HTTP/2 by hand, for what no client library would send."""

import struct

__all__ = ["call_beginning", "frame"]


def frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    """An HTTP/2 frame, with a length that need not be true."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call_beginning(method: str) -> bytes:
    """A connection's beginning and the headers of a call."""
    fields = {
        b":method": b"POST", b":scheme": b"http", b":path": method.encode(), b":authority": b"a",
        b"content-type": b"application/grpc", b"te": b"trailers",
    }
    block = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items()
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block)
