"""The rows client over real servers: replicas, shards, bounded retries, and answers that do not fit the question."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.service import LookupService
from online.lookup.shards import Shard, shard_of
from online.lookup.wire import Request
from online.proto.lookup_pb2 import LookupResponse, TableRows
from online.rpc.admission import Admission
from online.rpc.channel import open_channel
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig
from tests.online.row_source_cases import RowSourceCases
from tests.releases import FeastRepository, published_rows
from tests.waiting import until

IDS = {"item.kge": np.array([1, 2])}
SPREAD = {"item.kge": np.arange(40), "user.kge": np.arange(3)}  # over two shards


class TestLookupClient(RowSourceCases):
    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[LookupClient, list[HostedVersions]]:
        tier = host_cpu_tier(repository.workspace, (1, 2))
        return LookupClient([tier.address], timeout_s=30.0), [tier.state]


class TestShardedLookupClient(RowSourceCases):
    """Three shards; of one of them there are two replicas."""

    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[LookupClient, list[HostedVersions]]:
        shards = [Shard(index, 3) for index in (0, 1, 2, 0)]
        tiers = [host_cpu_tier(repository.workspace, (1, 2), shard=shard) for shard in shards]
        targets = [f"{shard}={tier.address}" for shard, tier in zip(shards, tiers, strict=True)]
        return LookupClient(targets, timeout_s=30.0), [tier.state for tier in tiers]


@pytest.fixture
def client_of():
    """Call with targets: a client, closed after the test."""
    clients = []

    def client(*targets: str, **options: Any) -> LookupClient:
        clients.append(LookupClient(targets, **{"timeout_s": 30.0, **options}))
        return clients[-1]

    yield client
    for client in clients:
        client.close()


@pytest.fixture
def sharded(workspace_with_versions, host_cpu_tier):
    """Call with the versions of each host, the preferred one first, and how they answer: hosts of a tier of shards."""

    def host(*versions: tuple[int, ...], serve: Callable[..., LookupService] = LookupService) -> list[Any]:
        return [
            host_cpu_tier(workspace_with_versions.workspace, of, shard=Shard(index, len(versions)), serve=serve)
            for index, of in enumerate(versions)
        ]

    return host


def targets_of(tiers: list[Any]) -> list[str]:
    return [f"{index}/{len(tiers)}={tier.address}" for index, tier in enumerate(tiers)]


def answered(tier: Any) -> int:
    return sum(entry.answered for entry in tier.state.status().versions)


def closed_port() -> str:
    endpoint = Endpoint("gone", "127.0.0.1", 0, 1)
    endpoint.stop().wait()
    return f"127.0.0.1:{endpoint.port}"


def refused(client: LookupClient, accepted: list[int], ids: Any = IDS) -> RpcError:
    with pytest.raises(RpcError) as caught:
        client.lookup(accepted, ids)
    return caught.value


class TestReplicas:
    def test_a_dead_one_is_passed_over(self, workspace_with_versions, host_cpu_tier, client_of) -> None:
        tier = host_cpu_tier(workspace_with_versions.workspace, (1,))
        client = client_of(closed_port(), tier.address)
        assert [client.lookup([1], IDS).version for _ in range(6)] == [1] * 6
        assert [client.start([1], IDS).result().version for _ in range(6)] == [1] * 6

    def test_one_that_dies_and_one_that_comes_back(self, workspace_with_versions, host_cpu_tier, client_of) -> None:
        workspace = workspace_with_versions.workspace
        first, second = host_cpu_tier(workspace), host_cpu_tier(workspace)
        client = client_of(first.address, second.address, attempts=50)
        with ThreadPoolExecutor(2) as pool:
            going = threading.Event()
            going.set()

            def ask() -> int:
                requests = 0
                while going.is_set():
                    assert client.lookup([1], IDS).version == 1
                    requests += 1
                return requests

            asking = [pool.submit(ask) for _ in range(2)]
            first.endpoint.stop().wait()
            second.endpoint.stop().wait()  # now there is none
            again = host_cpu_tier(workspace, port=first.endpoint.port)
            before = answered(again)
            while answered(again) < before + 5:
                time.sleep(0.01)
            going.clear()
            assert all(future.result() for future in asking)

    def test_with_none_it_gives_up_within_the_deadline(self, client_of) -> None:
        for attempts in (4, 1000):
            client = client_of(closed_port(), timeout_s=0.3, attempts=attempts)
            began = time.monotonic()
            assert refused(client, [1]).code in (Code.LOOKUP_UNAVAILABLE, Code.DEADLINE)
            assert time.monotonic() - began < 10

    def test_one_that_hangs_leaves_time_to_ask_another(
        self, workspace_with_versions, host_cpu_tier, client_of
    ) -> None:
        tier = host_cpu_tier(workspace_with_versions.workspace, (1,))
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says anything
            hanging = f"127.0.0.1:{silent.getsockname()[1]}"
            client = client_of(hanging, tier.address, timeout_s=4.0)
            assert [client.lookup([1], IDS).version for _ in range(4)] == [1] * 4
            assert [client.start([1], IDS).result().version for _ in range(4)] == [1] * 4
            assert refused(client_of(hanging, timeout_s=0.3), [1]).code in (Code.LOOKUP_UNAVAILABLE, Code.DEADLINE)

    def test_an_overloaded_one_is_passed_over(self, workspace_with_versions, host_cpu_tier, client_of) -> None:
        admissions = Admission(slots=1), Admission(slots=1)
        tiers = [
            host_cpu_tier(workspace_with_versions.workspace, admission=admission, threads=1) for admission in admissions
        ]
        client = client_of(*(tier.address for tier in tiers), attempts=6)
        waiting = []

        def fill(number: int) -> None:
            waiting.append(client_of(tiers[number].address, timeout_s=60).start([1], IDS))
            until(lambda: admissions[number].waiting == 1)

        with admissions[0].admit():
            fill(0)
            assert [client.lookup([1], IDS).version for _ in range(4)] == [1] * 4
            with admissions[1].admit():
                fill(1)
                assert refused(client, [1]).code is Code.OVERLOADED
        assert [pending.result().version for pending in waiting] == [1, 1]
        assert [answered(tier) for tier in tiers] == [1, 5]

    def test_one_without_the_version_is_asked_once(self, workspace_with_versions, host_cpu_tier, client_of) -> None:
        asked = []

        class Counting(LookupService):
            def Lookup(self, request: Request, context: Any) -> bytes:
                asked.append(request.request_id)
                return super().Lookup(request, context)

        workspace = workspace_with_versions.workspace
        tiers = [host_cpu_tier(workspace, versions, serve=Counting) for versions in ((1,), (2,))]
        client = client_of(*(tier.address for tier in tiers), attempts=50)
        assert [client.lookup([version], IDS).version for version in (1, 2, 2, 1)] == [1, 2, 2, 1]
        asked.clear()
        refusal = refused(client, [5])
        assert refusal.code is Code.VERSION_NOT_AVAILABLE and refusal.versions in ((1,), (2,))
        assert len(asked) == 2 and len(set(asked)) == 1

    def test_every_request_has_a_name_of_its_own_and_connections_are_used_in_turn(
        self, workspace_with_versions, host_cpu_tier, client_of
    ) -> None:
        names, peers = set(), set()

        class Noting(LookupService):
            def Lookup(self, request: Request, context: Any) -> bytes:
                names.add(request.request_id)
                peers.add(context.peer())
                return super().Lookup(request, context)

        tier = host_cpu_tier(workspace_with_versions.workspace, serve=Noting)
        for client in (client_of(tier.address, connections=3), client_of(tier.address)):
            for _ in range(6):
                client.lookup([1], IDS)
        assert len(names) == 12 and len(peers) == 4
        with pytest.raises(InvalidConfig, match="connections"):
            client_of(tier.address, connections=0)


class TestShards:
    def test_each_host_is_asked_for_its_own_ids_only(self, sharded, client_of, workspace_with_versions) -> None:
        tiers = sharded((1,), (1,))
        client = client_of(*targets_of(tiers))
        ids, _ = published_rows(workspace_with_versions.workspace, 1, "item.kge")
        client.lookup([1], {"item.kge": ids})
        assert [answered(tier) for tier in tiers] == [1, 1]
        of_one = ids[shard_of(ids, 2) == 1]
        answer = client.lookup([1], {"item.kge": of_one, "user.kge": ids[:0]})
        assert answer.found["item.kge"].all() and answer.rows["user.kge"].shape == (0, 10)
        assert [answered(tier) for tier in tiers] == [1, 2]  # a host without ids of the request is left alone

    def test_a_host_named_as_another_shard_refuses(self, sharded, client_of) -> None:
        first, second = sharded((1,), (1,))
        for targets in ([f"0/2={second.address}", f"1/2={first.address}"], [first.address]):
            assert refused(client_of(*targets), [1], SPREAD).code is Code.WRONG_SHARD

    def test_a_dead_replica_of_a_shard(self, sharded, client_of) -> None:
        client = client_of(f"1/2={closed_port()}", *targets_of(sharded((1,), (1,))))
        for _ in range(4):
            assert client.lookup([1], SPREAD).version == client.start([1], SPREAD).result().version == 1
        dead = client_of(f"1/2={closed_port()}", targets_of(sharded((1,), (1,)))[0], timeout_s=1.0, attempts=2)
        assert refused(dead, [1], SPREAD).code is Code.LOOKUP_UNAVAILABLE

    @pytest.mark.parametrize(
        ("hosts", "version"),
        [
            ([(1, 2), (2, 1)], 2),  # as many for either: it is the older that is on its way out
            ([(1, 2), (2, 1), (1, 2)], 1),  # the one that most answered
            ([(2, 1), (1,)], 1),  # the other has no choice
            ([(1, 2), (2,)], 2),
            ([(2, 1), (1,), (2, 1)], 1),  # the one that most answered is not everywhere
        ],
    )
    def test_during_a_rollout_all_settle_on_one_version(self, hosts, version, sharded, client_of) -> None:
        client = client_of(*targets_of(sharded(*hosts)))
        assert client.lookup([1, 2], SPREAD).version == client.start([1, 2], SPREAD).result().version == version
        assert client.lookup([version], SPREAD).version == version

    def test_without_a_common_version_there_is_no_answer(self, sharded, client_of) -> None:
        refusal = refused(client_of(*targets_of(sharded((1,), (2,)))), [1, 2], SPREAD)
        assert refusal.code is Code.VERSION_NOT_AVAILABLE and refusal.versions == (1, 2)
        assert refused(client_of(*targets_of(sharded((1, 2), (2,)))), [1], SPREAD).code is Code.VERSION_NOT_AVAILABLE

    def test_a_canary_answers_all_shards_of_a_request_at_the_first_try(self, sharded, client_of) -> None:
        tiers = sharded((1, 2), (1, 2))
        for tier in tiers:
            tier.state.promote(2, 0.5)
        client = client_of(*targets_of(tiers))
        assert {client.lookup([1, 2], SPREAD).version for _ in range(50)} == {1, 2}
        assert [answered(tier) for tier in tiers] == [50, 50]  # so none was asked twice

    def test_two_manifests_under_one_number_are_never_merged(self, sharded, client_of) -> None:
        class OtherManifest(LookupService):
            def Lookup(self, request: Request, context: Any) -> bytes:
                answer = LookupResponse.FromString(super().Lookup(request, context))
                answer.manifest_sha256 = str(request.shard[0]) * 64
                return answer.SerializeToString()

        refusal = refused(client_of(*targets_of(sharded((1,), (1,), serve=OtherManifest))), [1], SPREAD)
        assert refusal.code is Code.VERSION_MISMATCH

    def test_rows_of_two_widths_are_never_merged(self, sharded, client_of) -> None:
        class OtherWidth(LookupService):
            def Lookup(self, request: Request, context: Any) -> bytes:
                answer = LookupResponse.FromString(super().Lookup(request, context))
                for table in answer.tables:
                    if request.shard[0]:
                        table.row_bytes, table.rows = 1, bytes(len(table.found))
                return answer.SerializeToString()

        refusal = refused(client_of(*targets_of(sharded((1,), (1,), serve=OtherWidth))), [1], SPREAD)
        assert refusal.code is Code.VERSION_MISMATCH


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:port", ""])
def test_an_address_needs_host_and_port(address) -> None:
    with pytest.raises(InvalidConfig, match="host:port"):
        open_channel(address)


def answer_of(version: int, *tables: TableRows) -> LookupResponse:
    return LookupResponse(version=version, tables=tables)


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(2, TableRows(name="t", row_bytes=1, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="u", row_bytes=1, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="t", row_bytes=2, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="t", row_bytes=0, rows=b"", found=b"\1")),
        answer_of(1, TableRows(name="t", row_bytes=1, rows=b"x", found=b"\2")),
        answer_of(1, TableRows(name="t", row_bytes=1)),
        answer_of(1, *[TableRows(name="t", row_bytes=1, rows=b"x", found=b"\1")] * 2),
        answer_of(1),
    ],
    ids=[
        "version not accepted", "another table", "another width", "no width", "a mask of 2", "fewer rows",
        "more tables", "no table",
    ],
)
def test_an_answer_that_does_not_fit_is_never_used(answer, workspace_with_versions, host_cpu_tier, client_of) -> None:
    class Wrong(LookupService):
        def Lookup(self, request: Request, context: Any) -> bytes:
            return answer.SerializeToString()

    client = client_of(host_cpu_tier(workspace_with_versions.workspace, serve=Wrong).address)
    assert refused(client, [1], {"t": np.array([1])}).code is Code.VERSION_MISMATCH
