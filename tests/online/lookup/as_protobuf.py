"""The messages of a lookup as protobuf reads them: the independent reference of `online.lookup.wire`."""

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from online.lookup.wire import Answer, Request, read_answer, read_request
from online.proto.lookup_pb2 import LookupRequest, LookupResponse

__all__ = ["answer_differs", "request_differs"]


def request_differs(raw: bytes) -> str:
    """How `read_request` reads bytes otherwise than protobuf does; empty if it does not."""
    return _difference(_outcome(_plain_request, read_request, raw), _outcome(_request, LookupRequest.FromString, raw))


def answer_differs(raw: bytes) -> str:
    """The same of `read_answer`."""
    return _difference(_outcome(_plain_answer, read_answer, raw), _outcome(_answer, LookupResponse.FromString, raw))


def _difference(ours: Any, protobufs: Any) -> str:
    return "" if ours == protobufs else f"{ours} is not {protobufs}"


def _outcome(plain: Callable[[Any], Any], read: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        message = read(raw)
    except DecodeError:
        return "no message"
    return plain(message)


def _plain_request(request: Request) -> Any:
    tables = [(name, ids, list(versions)) for name, ids, versions in request.tables]
    return request.request_id, list(request.accepted_versions), tables, request.shard


def _request(message: LookupRequest) -> Any:
    tables = [(table.name, table.ids, list(table.versions)) for table in message.tables]
    shard = (message.shard.index, message.shard.count) if message.HasField("shard") else None
    return message.request_id, list(message.accepted_versions), tables, shard


def _plain_answer(answer: Answer) -> Any:
    tables = [(name, row_bytes, rows.tobytes(), found) for name, row_bytes, rows, found in answer.tables]
    return answer.version, answer.manifest_sha256, tables


def _answer(message: LookupResponse) -> Any:
    tables = [(table.name, table.row_bytes, table.rows, table.found) for table in message.tables]
    return message.version, message.manifest_sha256, tables
