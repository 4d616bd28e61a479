"""A lookup's messages: what is written protobuf reads, what protobuf reads is read, of any bytes."""

import numpy as np
import pytest
from google.protobuf.internal import encoder
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from online.lookup import wire
from online.lookup.wire import answer_bytes, read_answer, read_request, request_bytes
from online.proto.lookup_pb2 import LookupRequest, LookupResponse, Shard, TableIds, TableRows
from tests.online.lookup.as_protobuf import answer_differs, request_differs

INT64, UINT32 = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=200)
BYTES = st.binary(max_size=300)
REQUESTS = st.builds(
    LookupRequest, request_id=TEXT, accepted_versions=st.lists(INT64, max_size=5),
    tables=st.lists(st.builds(TableIds, name=TEXT, ids=BYTES, versions=st.lists(INT64, max_size=3)), max_size=3),
    shard=st.none() | st.builds(Shard, index=UINT32, count=UINT32),
)  # fmt: skip
ANSWERS = st.builds(
    LookupResponse, version=INT64, manifest_sha256=TEXT,
    tables=st.lists(st.builds(TableRows, name=TEXT, row_bytes=UINT32, rows=BYTES, found=BYTES), max_size=3),
)  # fmt: skip
FIELDS = st.binary(max_size=40) | st.tuples(
    st.sampled_from([8, 10, 16, 18, 24, 26, 32, 34, 40, 42]), st.integers(0, 2**64 - 1) | st.integers(0, 20), BYTES
).map(lambda field: bytes([field[0]]) + encoder._VarintBytes(field[1]) + field[2][:40])
"""Bytes that look like parts of a message, in any order, or do not."""


@given(REQUESTS)
def test_requests_are_read_as_protobuf_reads_them(request) -> None:
    assert not request_differs(request.SerializeToString())


@given(ANSWERS)
def test_answers_are_read_as_protobuf_reads_them(answer) -> None:
    assert not answer_differs(answer.SerializeToString())


@given(st.lists(FIELDS | REQUESTS.map(LookupRequest.SerializeToString), max_size=4).map(b"".join), st.integers(0, 40))
@example(b"\x1a\x05\x12\x7f", 0)
def test_any_bytes_are_read_as_protobuf_reads_them(raw, cut) -> None:
    for part in (raw, raw[: len(raw) - cut]):
        assert not request_differs(part) and not answer_differs(part)


@given(st.lists(ANSWERS.map(LookupResponse.SerializeToString), max_size=3).map(b"".join), st.integers(0, 40))
def test_answers_one_behind_the_other_or_cut_off_are_read_as_protobuf_reads_them(raw, cut) -> None:
    assert not answer_differs(raw) and not answer_differs(raw[: len(raw) - cut])


@given(
    TEXT, st.lists(INT64, max_size=4), st.lists(st.tuples(TEXT, st.lists(INT64, max_size=400), st.lists(INT64))),
    st.none() | st.tuples(UINT32, UINT32),
)
def test_protobuf_reads_the_requests_that_are_written(request_id, accepted, tables, shard) -> None:
    asked = [(name, np.array(ids, "<i8"), versions) for name, ids, versions in tables]
    read = LookupRequest.FromString(request_bytes(request_id, accepted, asked, shard))
    assert (read.request_id, list(read.accepted_versions)) == (request_id, accepted)
    assert [(t.name, t.ids, list(t.versions)) for t in read.tables] == [(n, i.tobytes(), v) for n, i, v in asked]
    assert ((read.shard.index, read.shard.count) if read.HasField("shard") else None) == shard


@given(INT64, TEXT, st.lists(st.tuples(TEXT, st.integers(0, 300), st.integers(1, 70)), max_size=3))
def test_protobuf_reads_the_answers_that_are_written(version, manifest, tables) -> None:
    random = np.random.default_rng(0)
    given_ = [
        (name, random.integers(0, 256, (size, width), np.uint8), random.random(size) < 0.5)
        for name, size, width in tables
    ]
    read = LookupResponse.FromString(answer_bytes(version, manifest, given_))
    assert (read.version, read.manifest_sha256) == (version, manifest)
    assert [(t.name, t.row_bytes, t.rows, t.found) for t in read.tables] == [
        (name, rows.shape[1], rows.tobytes(), found.tobytes()) for name, rows, found in given_
    ]


def test_what_our_own_peers_write_is_read_without_protobuf(monkeypatch) -> None:
    ids, rows, found = np.arange(512), np.ones((512, 36), np.uint8), np.ones(512, np.bool_)
    request = request_bytes("a-1", [1, 300], [("item.kge", ids, ()), ("user.kge", ids[:0], (2, 3))], (1, 2))
    answer = answer_bytes(300, "f" * 64, [("item.kge", rows, found), ("user.kge", rows[:0], found[:0])])
    monkeypatch.setattr(wire, "lookup_pb2", None)
    assert read_request(request).tables[0] == ("item.kge", ids.tobytes(), [])
    version, _, ((name, row_bytes, read_rows, read_found), _) = read_answer(answer)
    assert (version, name, row_bytes, read_found) == (300, "item.kge", 36, found.tobytes())
    assert np.shares_memory(read_rows, np.frombuffer(answer, np.uint8)), "rows are copied"


@pytest.mark.parametrize(("read", "no_text"), [(read_request, b"\x0a\x02\xff\xfe"), (read_answer, b"\x12\x02\xff\xfe")])
def test_what_is_no_message_is_refused_by_protobufs_own_error(read, no_text) -> None:
    for raw in (no_text, b"\x0a\xff", b"\x12\x05\x80", b"\x1a", b"\x08" + b"\xff" * 11):
        with pytest.raises(DecodeError):
            read(raw)
