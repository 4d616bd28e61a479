"""Messages are counted before they are parsed: right for what protobuf writes, and never by more than is allowed."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from online.proto import lookup_pb2, rank_pb2
from online.rpc import message
from online.rpc.message import MAX_FIELDS, parsed
from online.rpc_error import Code, RpcError


def code_of(raw: bytes | None, parse=lookup_pb2.LookupRequest.FromString) -> Code:
    with pytest.raises(RpcError) as caught:
        parsed(raw, parse)
    return caught.value.code


def never(raw: bytes) -> None:
    raise AssertionError("parsed")


@given(
    request_id=st.text(max_size=300), accepted=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50),
    tables=st.lists(st.tuples(st.text(max_size=200), st.binary(max_size=300)), max_size=20),
)
def test_what_protobuf_writes_is_read(request_id, accepted, tables) -> None:
    request = lookup_pb2.LookupRequest(
        request_id=request_id, accepted_versions=accepted,
        tables=[lookup_pb2.TableIds(name=name, ids=ids) for name, ids in tables],
        shard=lookup_pb2.Shard(index=1, count=2),
    )
    assert parsed(request.SerializeToString(), lookup_pb2.LookupRequest.FromString) == request


def test_fields_of_every_kind_are_passed_over() -> None:
    """Bytes, a negative number, a double: then a field that is unknown, of 32 bits."""
    request = rank_pb2.RankRequest(user=-5, candidates=bytes(1000), now_seconds=1e9)
    raw = request.SerializeToString() + b"\x7d\1\2\3\4"
    assert parsed(raw, rank_pb2.RankRequest.FromString).user == -5


def test_as_many_fields_as_are_allowed_and_not_one_more() -> None:
    request = lookup_pb2.LookupRequest(tables=[lookup_pb2.TableIds()] * MAX_FIELDS)
    assert len(parsed(request.SerializeToString(), lookup_pb2.LookupRequest.FromString).tables) == MAX_FIELDS
    request.tables.add()
    assert code_of(request.SerializeToString(), never) is Code.BATCH_TOO_LARGE


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"\x0a",  # no length
        b"\x0a\xff\xff",  # a length that does not end
        b"\xff" * 11,  # a key of more than 64 bits
        b"\x0b\x0c" + b"\x1a\x00" * 10 * MAX_FIELDS,  # a group, which could hide how many fields follow
        b"\x0f",  # no kind of field
    ],
)
def test_what_is_no_message_is_refused_without_being_parsed(raw) -> None:
    assert code_of(raw, never) is Code.MALFORMED_REQUEST


@pytest.mark.parametrize("raw", [b"\x0a\x05a", b"\x12\x01\x80", b"\x0a\x01\xff"])
def test_what_only_the_parser_can_tell_is_refused_by_it(raw) -> None:
    """A field that goes past the end, a number within a field that does not end, text that is not UTF-8."""
    with pytest.raises(DecodeError):
        lookup_pb2.LookupRequest.FromString(raw)
    assert code_of(raw) is Code.MALFORMED_REQUEST


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(raw) -> None:
    try:
        parsed(raw, lookup_pb2.LookupRequest.FromString)
    except RpcError as error:
        assert error.code in (Code.MALFORMED_REQUEST, Code.BATCH_TOO_LARGE)


def test_a_number_of_more_than_64_bits_is_not_read_to_its_end() -> None:
    """It could be as long as the message, and each step would take as long as it is."""
    assert message._number(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)
    with pytest.raises(IndexError, match="64 bits"):
        message._number(b"\xff" * 10 + b"\x01", 0)
