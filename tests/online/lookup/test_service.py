"""The CPU tier over a real channel: one version per answer, named; refusals typed; reads undisturbed by loads."""

import json
import zlib

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.lookup import shards
from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.service import QUICK_BYTES, LookupService, packed_ids
from online.lookup.shards import Shard, shard_of
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.rpc.channel import open_channel
from online.rpc_error import Code
from tests.holding import holding
from tests.online.observe.scrapes import rows_counted
from tests.releases import entity_ids, published_rows
from tests.waiting import PATIENCE_S, until

TABLES = ("user.contrastive", "user.kge", "item.contrastive", "item.kge")
MAX_IDS = 4096


@pytest.fixture(scope="module")
def tier(workspace_with_versions, host_cpu_tier):
    return host_cpu_tier(workspace_with_versions.workspace, (1, 2), max_ids=MAX_IDS)


@pytest.fixture(scope="module")
def client(tier):
    client = LookupClient([tier.address], timeout_s=PATIENCE_S)
    yield client
    client.close()


@pytest.fixture(scope="module")
def stub(tier):
    with open_channel(tier.address) as channel:
        yield lookup_pb2_grpc.LookupStub(channel)


def request_of(accepted=(1,), **tables) -> lookup_pb2.LookupRequest:
    return lookup_pb2.LookupRequest(
        accepted_versions=accepted,
        tables=[lookup_pb2.TableIds(name=name.replace("__", "."), ids=raw) for name, raw in tables.items()],
    )


def refused(stub, request) -> tuple[grpc.StatusCode, str, str]:
    """Status, facet-error and facet-versions of a refused request."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Lookup(request, timeout=PATIENCE_S)
    metadata = dict(caught.value.trailing_metadata())
    return caught.value.code(), metadata["facet-error"], metadata["facet-versions"]


@pytest.mark.parametrize("version", [1, 2])
def test_every_published_row_is_answered(version, client, workspace_with_versions) -> None:
    truth = {table: published_rows(workspace_with_versions.workspace, version, table) for table in TABLES}
    answer = client.lookup([version], {table: ids for table, (ids, _) in truth.items()})
    assert answer.version == version
    assert answer.manifest_sha256 == workspace_with_versions.workspace.versions.manifest(version).sha256
    for table, (_, rows) in truth.items():
        assert answer.found[table].all()
        np.testing.assert_array_equal(answer.rows[table], rows)


def test_unknown_repeated_and_no_ids(client, workspace_with_versions) -> None:
    ids, rows = published_rows(workspace_with_versions.workspace, 1, "item.kge")
    spec = workspace_with_versions.workspace.versions.manifest(1).table("item.kge")
    asked = np.array([ids[3], -7, ids[0], ids[3], np.iinfo(np.int64).max])
    answer = client.lookup([1], {"item.kge": asked, "user.kge": np.empty(0, np.int64)})
    assert answer.found["item.kge"].tolist() == [True, False, True, True, False]
    np.testing.assert_array_equal(answer.rows["item.kge"][[0, 2, 3]], rows[[3, 0, 3]])
    assert answer.rows["item.kge"][1].tobytes() == answer.rows["item.kge"][4].tobytes() == spec.default_row_bytes
    assert len(answer.rows["user.kge"]) == 0


def test_rows_are_counted_as_asked_for_and_found(client) -> None:
    items, users = entity_ids("item", 200)[:5], entity_ids("user", 200)[:1]
    before = rows_counted()
    client.lookup([1], {"item.kge": np.append(items, [-5, -6]), "user.kge": np.append([-7, -8, -9], users)})
    client.lookup([1], {"item.kge": np.append(items[:1], [items[0], -5])})
    assert rows_counted() - before == {
        ("asked", "item.kge"): 7 + 3, ("found", "item.kge"): 5 + 2, ("asked", "user.kge"): 4, ("found", "user.kge"): 1,
    }


def test_the_preferred_version_answers_if_accepted(client) -> None:
    ids = {"item.kge": np.array([1])}
    assert client.lookup([1, 2], ids).version == 1  # the first of --versions
    assert client.lookup([2], ids).version == 2
    assert client.lookup([2, 77], ids).version == 2


def test_typed_refusals(stub) -> None:
    one = b"\1" + bytes(7)
    assert refused(stub, request_of((3, 9), item__kge=one)) == (
        grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_AVAILABLE", "1,2"
    )
    assert refused(stub, request_of(item__nothing=one))[:2] == (grpc.StatusCode.NOT_FOUND, "TABLE_UNKNOWN")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert refused(stub, request_of((), item__kge=one))[:2] == (invalid, "NO_ACCEPTED_VERSIONS")
    assert refused(stub, request_of())[:2] == (invalid, "NO_TABLES")
    assert refused(stub, request_of(item__kge=one + b"x"))[:2] == (invalid, "MALFORMED_IDS")
    assert refused(stub, request_of(item__kge=one * (MAX_IDS + 1)))[:2] == (invalid, "BATCH_TOO_LARGE")
    assert refused(stub, request_of(range(1, 1000), item__kge=one))[:2] == (invalid, "BATCH_TOO_LARGE")
    assert len(stub.Lookup(request_of(item__kge=one * MAX_IDS), timeout=PATIENCE_S).tables[0].found) == MAX_IDS


def test_a_million_ids_get_a_typed_refusal(stub) -> None:
    assert refused(stub, request_of(item__kge=bytes(8_000_000)))[1] == "BATCH_TOO_LARGE"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accepted=st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([1, 2]), max_size=4),
    tables=st.lists(
        st.tuples(st.sampled_from(TABLES) | st.text(max_size=20), st.binary(max_size=64)), max_size=4
    ),
)
def test_any_request_is_answered_whole_or_refused_with_a_code(stub, accepted, tables) -> None:
    request = lookup_pb2.LookupRequest(
        accepted_versions=accepted, tables=[lookup_pb2.TableIds(name=name, ids=ids) for name, ids in tables]
    )
    try:
        answer = stub.Lookup(request, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        code = Code[dict(error.trailing_metadata())["facet-error"]]
        assert code is not Code.INTERNAL and error.code() is code.status
    else:
        assert answer.version in accepted
        assert [(t.name, len(t.found) * 8) for t in answer.tables] == [(name, len(ids)) for name, ids in tables]
        assert all(len(t.rows) == len(t.found) * t.row_bytes for t in answer.tables)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_bytes_that_are_no_message_do_no_harm(tier, client, raw) -> None:
    with open_channel(tier.address) as channel:
        call = channel.unary_unary("/facet.v1.Lookup/Lookup")
        with pytest.raises(grpc.RpcError):
            call(b"\x0a\xff" + raw, timeout=PATIENCE_S)  # a field whose length goes past the end
    assert client.lookup([1], {"item.kge": np.array([1])}).version == 1


def test_a_host_answers_only_ids_of_its_shard_that_were_cut_for_it(workspace_with_versions, host_cpu_tier) -> None:
    ids, rows = published_rows(workspace_with_versions.workspace, 1, "item.kge")
    mine = shard_of(ids, 2) == 0
    host = host_cpu_tier(workspace_with_versions.workspace, shard=Shard.parse("0/2"))
    with open_channel(host.address) as channel:
        half = lookup_pb2_grpc.LookupStub(channel)
        request = request_of(item__kge=ids[mine].tobytes())
        assert refused(half, request)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_SHARD")  # of all ids
        for index, count in ((1, 2), (0, 4), (0, 1), (7, 0), (2**32 - 1, 2**32 - 1)):
            request.shard.index, request.shard.count = index, count
            assert refused(half, request)[1] == "WRONG_SHARD"
        request.shard.index, request.shard.count = 0, 2
        assert half.Lookup(request, timeout=PATIENCE_S).tables[0].rows == rows[mine].tobytes()
        request.tables[0].ids = ids.tobytes()  # one stray id is enough
        assert refused(half, request)[1] == "WRONG_SHARD"
    with open_channel(host.admin_address) as channel:
        status = admin_pb2_grpc.CpuTierAdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=PATIENCE_S)
        assert (status.shard, status.shards, status.workers) == (0, 2, 1)


def test_a_host_of_all_ids_refuses_a_request_of_a_shard(stub) -> None:
    request = request_of(item__kge=bytes(8))
    request.shard.index, request.shard.count = 1, 2
    assert refused(stub, request)[1] == "WRONG_SHARD"
    request.shard.index, request.shard.count = 0, 1
    assert stub.Lookup(request, timeout=PATIENCE_S).version == 1


def test_what_is_too_much_is_refused_at_once_and_the_rest_is_answered(workspace_with_versions, host_cpu_tier) -> None:
    host = host_cpu_tier(workspace_with_versions.workspace, slots=1, queue=2)
    with open_channel(host.address) as channel:
        busy = lookup_pb2_grpc.LookupStub(channel)
        with holding(host.endpoint):
            waiting = [busy.Lookup.future(request_of(item__kge=bytes(8)), timeout=PATIENCE_S) for _ in range(2)]
            until(lambda: host.endpoint.admission.waiting == 2)
            for _ in range(20):
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                assert refused(busy, request_of(item__kge=bytes(8)))[:2] == (code, "OVERLOADED")
        assert [answer.result().version for answer in waiting] == [1, 1]
        assert busy.Lookup(request_of(item__kge=bytes(8)), timeout=PATIENCE_S).version == 1


def test_a_canary_of_whole_requests_by_their_id(workspace_with_versions, host_cpu_tier) -> None:
    host = host_cpu_tier(workspace_with_versions.workspace, (1, 2))
    with open_channel(host.admin_address) as channel, open_channel(host.address) as lookups:
        admin, stub = admin_pb2_grpc.CpuTierAdminStub(channel), lookup_pb2_grpc.LookupStub(lookups)
        for share in (-0.5, 1.5, float("nan"), float("inf")):
            with pytest.raises(grpc.RpcError) as caught:
                admin.Promote(admin_pb2.VersionRequest(version=2, share=share), timeout=PATIENCE_S)
            assert dict(caught.value.trailing_metadata())["facet-error"] == "INVALID_SHARE"
        status = admin.Promote(admin_pb2.VersionRequest(version=2, share=0.25), timeout=PATIENCE_S)
        assert (status.preferred, status.canary, status.canary_share) == (1, 2, 0.25)
        for name in (f"request {number}" for number in range(40)):
            request = request_of((1, 2), item__kge=bytes(8))
            request.request_id = name
            assert stub.Lookup(request, timeout=PATIENCE_S).version == (2 if zlib.crc32(name.encode()) < 2**30 else 1)
        status = admin.Promote(admin_pb2.VersionRequest(version=2), timeout=PATIENCE_S)
        assert (status.preferred, status.canary, status.canary_share) == (2, 0, 0)


def test_a_small_lookup_of_rows_at_hand_is_quick(workspace_with_versions, host_cpu_tier) -> None:
    tier = host_cpu_tier(workspace_with_versions.workspace)

    def quick(size: int) -> bool:
        request = request_of(item__kge=bytes(8 * size))
        return tier.endpoint.server.guard.is_quick(request.SerializeToString())

    assert quick(100)
    assert not quick(QUICK_BYTES // 8)  # and what is around them
    tier.state.at_hand = False  # it might have to wait for Redis
    assert not quick(100)


def test_versions_of_a_table_and_accepted_ones_are_bounded(stub) -> None:
    many = lookup_pb2.LookupRequest(
        accepted_versions=[1], tables=[lookup_pb2.TableIds(name="item.kge", ids=bytes(8), versions=range(1, 66))]
    )
    assert refused(stub, many)[1] == "BATCH_TOO_LARGE"
    del many.tables[0].versions[64:]
    assert stub.Lookup(many, timeout=PATIENCE_S).version == 1


def test_a_repeated_field_may_come_in_several_pieces(tier) -> None:
    """As any protobuf writer may send it: versions 3 and 9, then 2; and as single numbers."""
    rest = request_of((), item__kge=bytes(8)).SerializeToString()
    with open_channel(tier.address) as channel:
        read = lookup_pb2.LookupResponse.FromString
        call = channel.unary_unary("/facet.v1.Lookup/Lookup", response_deserializer=read)
        assert call(b"\x12\x02\x03\x09" + rest + b"\x12\x01\x02", timeout=PATIENCE_S).version == 2
        assert call(b"\x10\x03" + rest + b"\x10\x02", timeout=PATIENCE_S).version == 2


def test_what_a_shard_needs_is_compiled_before_the_first_request(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(shards, "_strays", lambda ids, index, count: asked.append((index, count)) or 0)
    LookupService(HostedVersions(lambda version: None), shard=Shard(1, 2))
    assert asked == [(1, 2)]


def test_packed_ids_are_little_endian() -> None:
    assert packed_ids(bytes([1, 0, 0, 0, 0, 0, 0, 0]), "ids").tolist() == [1]


def test_a_corrupted_segment_is_refused_and_the_last_good_version_serves_on(own_workspace, host_cpu_tier) -> None:
    workspace = own_workspace.workspace
    tier = host_cpu_tier(workspace, (1,))
    rows = workspace.segment(2, "item.kge") / "rows.npy"
    damaged = bytearray(rows.read_bytes())
    damaged[-1] ^= 1
    rows.write_bytes(damaged)
    with open_channel(tier.admin_address) as channel:
        admin = admin_pb2_grpc.CpuTierAdminStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            admin.Load(admin_pb2.VersionRequest(version=2), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert dict(caught.value.trailing_metadata())["facet-error"] == "INTEGRITY"
        with pytest.raises(grpc.RpcError) as caught:
            admin.Load(admin_pb2.VersionRequest(version=9), timeout=PATIENCE_S)
        assert dict(caught.value.trailing_metadata())["facet-error"] == "VERSION_NOT_PUBLISHED"
        assert [entry.version for entry in admin.Status(admin_pb2.StatusRequest(), timeout=PATIENCE_S).versions] == [1]
    client = LookupClient([tier.address], timeout_s=PATIENCE_S)
    assert client.lookup([1, 2], {"item.kge": np.array([1])}).version == 1
    client.close()


def test_the_process_is_healthy_refuses_a_taken_port_and_stops_cleanly(workspace_with_versions, launch) -> None:
    workspace = workspace_with_versions.workspace
    tier = launch(workspace, "serve", "cpu-tier", "--versions", "2,1").wait_ready()
    assert tier.ready["versions"] == [2, 1] and tier.ready["pid"] == tier.process.pid
    with open_channel(tier.port("lookup")) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    port = tier.ready["ports"]["lookup"]
    taken = launch(workspace, "serve", "cpu-tier", "--versions", "1", "--port", str(port))
    unknown = launch(workspace, "serve", "cpu-tier", "--versions", "9")
    status, out, errors = taken.finish()
    assert (status, out) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}" in errors and "Traceback" not in errors and errors.count("\n") == 1
    status, out, errors = unknown.finish()
    assert (status, out) == (2, "") and "version 9" in errors and "Traceback" not in errors
    assert tier.stop() == 0
    assert json.loads(json.dumps(tier.ready))["ready"] is True
