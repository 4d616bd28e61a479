"""The messages of `lookup.proto` as bytes, written from arrays and read into arrays.

protobuf's own objects copy every field of bytes twice on its way in or out, by code that is in no cache where a process
has just woken up. Here rows are copied once, to where they are sent from, and are read where they arrived.

A reader knows the fields in the form in which protobuf's own writers write them. Whatever else a message has, such as
fields that were added later, protobuf reads; and only protobuf says what is no message.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from google.protobuf.message import Message

from online.proto import lookup_pb2

__all__ = ["LOOKUP", "Answer", "Request", "answer_bytes", "read_answer", "read_request", "request_bytes"]

LOOKUP = lookup_pb2.DESCRIPTOR.services_by_name["Lookup"].full_name
"""The service's name; its method has the same."""


class Request(NamedTuple):
    """A `LookupRequest`.

    Attributes:
        tables: name, packed ids, and the versions that the table is asked for of, of each.
        shard: index and count; None: the request was not cut.
    """

    request_id: str
    accepted_versions: Sequence[int]
    tables: list[tuple[str, bytes, Sequence[int]]]
    shard: tuple[int, int] | None


class Answer(NamedTuple):
    """A `LookupResponse`.

    Attributes:
        tables: name, bytes of a row, all rows uint8 (B * row_bytes,), and the found mask of each.
    """

    version: int
    manifest_sha256: str
    tables: list[tuple[str, int, np.ndarray, bytes]]


# ---- writing: small parts by protobuf, and kept, since they are few; between them what is large


def request_bytes(
    request_id: str, accepted: Sequence[int], tables: Iterable[tuple[str, np.ndarray, Sequence[int]]],
    shard: tuple[int, int] | None = None,
) -> bytes:
    """A `LookupRequest`.

    Args:
        tables: name, ids int64 (B,), contiguous, and the versions that it is asked for of, none for all, of each.
        shard: index and count.
    """
    name = request_id.encode()
    parts = [_tag(_REQUEST_ID, len(name)), name, _about_request(tuple(accepted), shard)]
    for table, ids, versions in tables:
        about, tag = _about_ids(table, tuple(versions)), _tag(_IDS, ids.nbytes)
        parts += (_tag(_ASKED, len(about) + len(tag) + ids.nbytes), about, tag, ids)
    return b"".join(parts)


def answer_bytes(
    version: int, manifest_sha256: str, tables: Iterable[tuple[str, np.ndarray, np.ndarray]]
) -> bytes:
    """A `LookupResponse`.

    Args:
        tables: name, rows uint8 (B, row_bytes), found bool (B,) of each; contiguous.
    """
    parts = [_about_answer(version, manifest_sha256)]
    for name, rows, found in tables:
        about, rows_tag, found_tag = _about_rows(name, rows.shape[1]), _tag(_ROWS, rows.size), _tag(_FOUND, found.size)
        size = len(about) + len(rows_tag) + rows.size + len(found_tag) + found.size
        parts += (_tag(_ANSWERED, size), about, rows_tag, rows, found_tag, found)
    return b"".join(parts)


@lru_cache(1024)
def _about_request(accepted: tuple[int, ...], shard: tuple[int, int] | None) -> bytes:
    part = shard and lookup_pb2.Shard(index=shard[0], count=shard[1])
    return lookup_pb2.LookupRequest(accepted_versions=accepted, shard=part).SerializeToString()


@lru_cache(1024)
def _about_ids(table: str, versions: tuple[int, ...]) -> bytes:
    return lookup_pb2.TableIds(name=table, versions=versions).SerializeToString()


@lru_cache(1024)
def _about_answer(version: int, manifest_sha256: str) -> bytes:
    return lookup_pb2.LookupResponse(version=version, manifest_sha256=manifest_sha256).SerializeToString()


@lru_cache(1024)
def _about_rows(table: str, row_bytes: int) -> bytes:
    return lookup_pb2.TableRows(name=table, row_bytes=row_bytes).SerializeToString()


@lru_cache(8192)
def _tag(key: int, size: int) -> bytes:
    """What stands before a field of `size` bytes: its key, and the size, seven bits to a byte, lowest first."""
    tag = bytearray([key])
    while size > 0x7F:
        tag.append(size & 0x7F | 0x80)
        size >>= 7
    tag.append(size)
    return bytes(tag)


# ---- reading


def read_request(raw: bytes) -> Request:
    """What the bytes of a `LookupRequest` say; raises `google.protobuf.message.DecodeError` if they are none."""
    try:
        return _read_request(raw)
    except (IndexError, ValueError):
        request = lookup_pb2.LookupRequest.FromString(raw)
    return Request(
        request.request_id, request.accepted_versions,
        [(table.name, table.ids, table.versions) for table in request.tables],
        (request.shard.index, request.shard.count) if request.HasField("shard") else None,
    )


def read_answer(raw: bytes) -> Answer:
    """What the bytes of a `LookupResponse` say; raises `google.protobuf.message.DecodeError` if they are none."""
    try:
        return _read_answer(raw)
    except (IndexError, ValueError):
        answer = lookup_pb2.LookupResponse.FromString(raw)
    return Answer(
        answer.version, answer.manifest_sha256,
        [(table.name, table.row_bytes, np.frombuffer(table.rows, _BYTE), table.found) for table in answer.tables],
    )


def _read_request(raw: bytes) -> Request:
    request_id, accepted, tables, shard = "", [], [], None
    for key, size, at in _fields(raw, 0, len(raw)):
        if key == _REQUEST_ID:
            request_id = raw[at : at + size].decode()
        elif key == _ACCEPTED:
            accepted += _numbers(raw, at, at + size)
        elif key == _ASKED:
            tables.append(_read_ids(raw, at, at + size))
        elif key == _SHARD:
            shard = _read_shard(raw, at, at + size, shard or (0, 0))
        else:
            raise _Unknown
    return Request(request_id, accepted, tables, shard)


def _read_ids(raw: bytes, start: int, end: int) -> tuple[str, bytes, Sequence[int]]:
    name, ids, versions = "", b"", []
    for key, size, at in _fields(raw, start, end):
        if key == _ASKED_NAME:
            name = raw[at : at + size].decode()
        elif key == _IDS:
            ids = raw[at : at + size]
        elif key == _ASKED_OF:
            versions += _numbers(raw, at, at + size)
        else:
            raise _Unknown
    return name, ids, versions


def _read_shard(raw: bytes, start: int, end: int, before: tuple[int, int]) -> tuple[int, int]:
    index, count = before
    for key, number, _ in _fields(raw, start, end):
        if key == _INDEX and number <= _UINT32:
            index = number
        elif key == _COUNT and number <= _UINT32:
            count = number
        else:
            raise _Unknown
    return index, count


def _read_answer(raw: bytes) -> Answer:
    version, manifest, tables = 0, "", []
    for key, number, at in _fields(raw, 0, len(raw)):
        if key == _VERSION:
            version = number
        elif key == _MANIFEST:
            manifest = raw[at : at + number].decode()
        elif key == _ANSWERED:
            tables.append(_read_rows(raw, at, at + number))
        else:
            raise _Unknown
    return Answer(version, manifest, tables)


def _read_rows(raw: bytes, start: int, end: int) -> tuple[str, int, np.ndarray, bytes]:
    name, row_bytes, rows, found = "", 0, _NO_ROWS, b""
    for key, number, at in _fields(raw, start, end):
        if key == _ANSWERED_NAME:
            name = raw[at : at + number].decode()
        elif key == _ROW_BYTES and number <= _UINT32:
            row_bytes = number
        elif key == _ROWS:
            rows = np.frombuffer(raw, _BYTE, number, at)
        elif key == _FOUND:
            found = raw[at : at + number]
        else:
            raise _Unknown
    return name, row_bytes, rows, found


def _fields(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Of every field its key, its number or size, and where that ends; a last one that is cut off is given, too."""
    while at < end:
        key, number, at = raw[at], raw[at + 1], at + 2
        if number > 0x7F:
            number, at = _rest_of_number(raw, at, number)
        yield key, number, at
        if key & 7 == _LENGTH:
            at += number
    if at != end:
        raise _Unknown


def _numbers(raw: bytes, at: int, end: int) -> list[int]:
    numbers = []
    while at < end:
        number, at = raw[at], at + 1
        if number > 0x7F:
            number, at = _rest_of_number(raw, at, number)
        numbers.append(number)
    if at != end:
        raise _Unknown
    return numbers


def _rest_of_number(raw: bytes, at: int, number: int) -> tuple[int, int]:
    """A number of several bytes, of which the first is known, and where it ends; negative ones are left to protobuf."""
    number, shift = number & 0x7F, 7
    while shift < 63:
        more = raw[at]
        number, at, shift = number | (more & 0x7F) << shift, at + 1, shift + 7
        if more < 0x80:
            return number, at
    raise _Unknown


class _Unknown(ValueError):
    """There is more to this message than is known here."""


def _key(message: type[Message], field: str) -> int:
    described = message.DESCRIPTOR.fields_by_name[field]
    number = described.type in (described.TYPE_INT64, described.TYPE_UINT32) and not described.is_packed
    return described.number << 3 | (_NUMBER if number else _LENGTH)


_NUMBER, _LENGTH = 0, 2  # what stands behind a key, by its last three bits
_REQUEST_ID, _ACCEPTED, _ASKED, _SHARD = (
    _key(lookup_pb2.LookupRequest, name) for name in ("request_id", "accepted_versions", "tables", "shard")
)
_ASKED_NAME, _IDS, _ASKED_OF = (_key(lookup_pb2.TableIds, name) for name in ("name", "ids", "versions"))
_INDEX, _COUNT = (_key(lookup_pb2.Shard, name) for name in ("index", "count"))
_VERSION, _MANIFEST, _ANSWERED = (
    _key(lookup_pb2.LookupResponse, name) for name in ("version", "manifest_sha256", "tables")
)
_ANSWERED_NAME, _ROW_BYTES, _ROWS, _FOUND = (
    _key(lookup_pb2.TableRows, name) for name in ("name", "row_bytes", "rows", "found")
)
_UINT32, _BYTE = 2**32 - 1, np.dtype(np.uint8)
_NO_ROWS = np.empty(0, np.uint8)
