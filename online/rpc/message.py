"""Messages of callers, which are counted before they are parsed: to parse millions of empty fields takes seconds."""

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from online.rpc_error import Code, RpcError

__all__ = ["MAX_FIELDS", "parsed"]

MAX_FIELDS = 256
"""Of a message, those within its fields not counted."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf's encoding


def parsed(raw: bytes | None, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a message.

    Args:
        raw: None: the call ended without one.
        parse: `FromString` of a protobuf message.

    Raises:
        RpcError: MALFORMED_REQUEST if it is none; BATCH_TOO_LARGE if it has more than `MAX_FIELDS` fields.
    """
    if raw is None:
        raise _malformed("no message")
    try:
        if _has_more_fields(raw, MAX_FIELDS):
            raise RpcError(
                Code.BATCH_TOO_LARGE, "request", expected=f"a message of at most {MAX_FIELDS} fields",
                got=f"more, in {len(raw)} bytes", remedy="Split it into several requests.",
            )
        return parse(raw)
    except (DecodeError, IndexError) as error:
        raise _malformed(f"{len(raw)} bytes that are none") from error


def _malformed(got: str) -> RpcError:
    return RpcError(
        Code.MALFORMED_REQUEST, "request", expected="a message as its .proto file says", got=got,
        remedy="Generate the client from the .proto files.",
    )


def _has_more_fields(raw: bytes, most: int) -> bool:
    """Whether a message has more than `most` fields, found without looking at more of them, nor into them.

    Raises:
        IndexError: it ends within a number, or has a field of a kind that no message of ours has.
    """
    at, fields = 0, 0
    while at < len(raw):
        fields += 1
        if fields > most:
            return True
        key, at = _number(raw, at)
        kind = key & 7
        if kind == _BYTES:
            size, at = _number(raw, at)
            at += size
        elif kind == _VARINT:
            _, at = _number(raw, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:  # a group, which no message of ours has: it could hide what follows; or no kind of field at all
            raise IndexError(f"wire type {kind}")
    return False


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    byte = raw[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = 0, 0
    while True:
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
