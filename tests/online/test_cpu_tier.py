"""The CPU tier over a real channel: one version per answer, named; refusals typed; reads undisturbed by loads."""

import json
import threading

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.client import LookupClient, open_channel
from online.cpu_tier import HostedVersions, packed_ids
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.reader import VersionReader
from online.refusal import Code, Refusal
from tests.releases import published_rows

TABLES = ("user.contrastive", "user.kge", "item.contrastive", "item.kge")
MAX_IDS = 4096


@pytest.fixture(scope="module")
def tier(workspace_with_versions, host_cpu_tier):
    return host_cpu_tier(workspace_with_versions.workspace, (1, 2), max_ids=MAX_IDS)


@pytest.fixture(scope="module")
def client(tier):
    client = LookupClient([tier.address])
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
        stub.Lookup(request, timeout=5)
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
    assert len(stub.Lookup(request_of(item__kge=one * MAX_IDS)).tables[0].found) == MAX_IDS


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
        answer = stub.Lookup(request, timeout=5)
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
            call(b"\x0a\xff" + raw, timeout=5)  # a field whose length goes past the end
    assert client.lookup([1], {"item.kge": np.array([1])}).version == 1


def test_packed_ids_are_little_endian() -> None:
    assert packed_ids(bytes([1, 0, 0, 0, 0, 0, 0, 0]), "ids").tolist() == [1]


class TestHostedVersions:
    """The state machine itself, without a channel."""

    @pytest.fixture
    def opened(self, workspace_with_versions):
        workspace = workspace_with_versions.workspace
        return {version: VersionReader.open(workspace, version, verify=False) for version in (1, 2)}

    @pytest.fixture
    def hosted(self, opened):
        hosted = HostedVersions(opened.__getitem__, unload_wait_s=0.2)
        hosted.load(1)
        return hosted

    @staticmethod
    def answering(hosted, accepted=(1, 2)) -> int:
        with hosted.answering_from(accepted) as held:
            return held.reader.version

    def test_a_loaded_version_waits_for_its_promotion(self, hosted) -> None:
        hosted.load(2)
        assert self.answering(hosted) == 1
        hosted.promote(2)
        assert self.answering(hosted) == 2
        hosted.promote(1)
        assert self.answering(hosted) == 1

    def test_a_drained_version_answers_nothing_new_and_comes_back_by_loading(self, hosted) -> None:
        hosted.load(2)
        hosted.drain(1)
        with pytest.raises(Refusal) as caught, hosted.answering_from([1]):
            pass
        assert caught.value.code is Code.VERSION_NOT_AVAILABLE and caught.value.versions == (2,)
        with pytest.raises(Refusal, match="draining"):
            hosted.promote(1)
        hosted.load(1)
        assert self.answering(hosted, [1]) == 1

    def test_the_last_version_cannot_be_drained(self, hosted) -> None:
        with pytest.raises(Refusal) as caught:
            hosted.drain(1)
        assert caught.value.code is Code.LAST_VERSION and self.answering(hosted) == 1

    def test_unloading_needs_a_drain_and_waits_for_requests_under_way(self, hosted) -> None:
        hosted.load(2)
        with pytest.raises(Refusal) as caught:
            hosted.unload(1)
        assert caught.value.code is Code.STILL_ANSWERING
        with hosted.answering_from([1]) as held:
            hosted.drain(1)
            with pytest.raises(Refusal) as caught:
                hosted.unload(1)
            assert caught.value.code is Code.IN_FLIGHT
            assert held.reader.lookup("item.kge", np.array([1]))[0].shape == (1, 10)
            unloading = threading.Thread(target=hosted.unload, args=(1,))
            unloading.start()
        unloading.join(5)
        assert [entry.version for entry in hosted.status().versions] == [2]

    def test_every_change_may_be_repeated(self, hosted) -> None:
        for change, version in [("load", 2), ("promote", 2), ("drain", 1), ("unload", 1)]:
            getattr(hosted, change)(version)
            once = hosted.status()
            getattr(hosted, change)(version)
            assert hosted.status() == once

    def test_loading_does_not_hold_up_reads(self, opened) -> None:
        began, go_on = threading.Event(), threading.Event()

        def slowly(version: int) -> VersionReader:
            if version == 2:
                began.set()
                assert go_on.wait(10)
            return opened[version]

        hosted = HostedVersions(slowly)
        hosted.load(1)
        loading = threading.Thread(target=hosted.load, args=(2,))
        loading.start()
        assert began.wait(5)
        assert self.answering(hosted) == 1
        go_on.set()
        loading.join(5)
        assert self.answering(hosted, [2]) == 2


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
            admin.Load(admin_pb2.VersionRequest(version=2), timeout=10)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert dict(caught.value.trailing_metadata())["facet-error"] == "INTEGRITY"
        with pytest.raises(grpc.RpcError) as caught:
            admin.Load(admin_pb2.VersionRequest(version=9), timeout=10)
        assert dict(caught.value.trailing_metadata())["facet-error"] == "VERSION_NOT_PUBLISHED"
        assert [entry.version for entry in admin.Status(admin_pb2.StatusRequest()).versions] == [1]
    client = LookupClient([tier.address])
    assert client.lookup([1, 2], {"item.kge": np.array([1])}).version == 1
    client.close()


def test_the_process_is_healthy_refuses_a_taken_port_and_stops_cleanly(workspace_with_versions, launch) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    workspace = workspace_with_versions.workspace
    tier = launch(workspace, "serve", "cpu-tier", "--versions", "2,1").wait_ready()
    assert tier.ready["versions"] == [2, 1] and tier.ready["pid"] == tier.process.pid
    with open_channel(tier.port("lookup")) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
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
