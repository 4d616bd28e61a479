"""The rows client over real servers: replicas, shards, bounded retries, and answers that do not fit the question."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from online.lookup.client import LookupClient
from online.lookup.hosted import HostedVersions
from online.lookup.shards import Shard, shard_of
from online.proto import lookup_pb2_grpc
from online.proto.lookup_pb2 import LookupRequest, LookupResponse, TableRows
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig
from tests.grpc_server import end_by, grpc_server
from tests.online.row_source_cases import RowSourceCases
from tests.releases import FeastRepository, published_rows
from tests.waiting import PATIENCE_S, until

IDS = {"item.kge": np.array([1, 2])}
SPREAD = {"item.kge": np.arange(40), "user.kge": np.arange(3)}  # over two shards


class TestLookupClient(RowSourceCases):
    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[LookupClient, list[HostedVersions]]:
        tier = host_cpu_tier(repository.workspace, (1, 2))
        return LookupClient([tier.address], timeout_s=PATIENCE_S), [tier.state]


class TestShardedLookupClient(RowSourceCases):
    """Three shards; of one of them there are two replicas."""

    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[LookupClient, list[HostedVersions]]:
        shards = [Shard(index, 3) for index in (0, 1, 2, 0)]
        tiers = [host_cpu_tier(repository.workspace, (1, 2), shard=shard) for shard in shards]
        targets = [f"{shard}={tier.address}" for shard, tier in zip(shards, tiers, strict=True)]
        return LookupClient(targets, timeout_s=PATIENCE_S), [tier.state for tier in tiers]


@pytest.fixture
def client_of():
    """Call with targets: a client, closed after the test."""
    clients = []

    def client(*targets: str, **options: Any) -> LookupClient:
        clients.append(LookupClient(targets, **{"timeout_s": PATIENCE_S, **options}))
        return clients[-1]

    yield client
    for client in clients:
        client.close()


@pytest.fixture
def sharded(workspace_with_versions, host_cpu_tier):
    """Call with the versions of each host, the preferred one first, and how they answer: hosts of a tier of shards."""

    def host(*versions: tuple[int, ...]) -> list[Any]:
        return [
            host_cpu_tier(workspace_with_versions.workspace, of, shard=Shard(index, len(versions)))
            for index, of in enumerate(versions)
        ]

    return host


def targets_of(tiers: list[Any]) -> list[str]:
    return [f"{index}/{len(tiers)}={tier.address}" for index, tier in enumerate(tiers)]


def answered(tier: Any) -> int:
    return sum(entry.answered for entry in tier.state.status().versions)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


class Host(lookup_pb2_grpc.LookupServicer):
    """Answers each id by one byte, as an altered answer where `alter` says so.

    Args:
        refuses: with this code, always.
    """

    def __init__(self, *, refuses: Code | None = None, alter: Callable[[LookupResponse], Any] = lambda _: None) -> None:
        self.refuses, self.alter = refuses, alter
        self.names: list[str] = []
        self.peers: set[str] = set()
        self.shards: list[tuple[int, int]] = []

    def Lookup(self, request: LookupRequest, context: grpc.ServicerContext) -> LookupResponse:
        self.names.append(request.request_id)
        self.peers.add(context.peer())
        self.shards.append((request.shard.index, request.shard.count))
        if self.refuses:
            refusal = RpcError(self.refuses, "no", expected="-", got="-", remedy="-", versions=(2,))
            end_by(context, refusal)
        sizes = {table.name: len(table.ids) // 8 for table in request.tables}
        answer = LookupResponse(
            version=request.accepted_versions[0], manifest_sha256="ab" * 32,
            tables=[TableRows(name=n, row_bytes=1, rows=b"r" * size, found=b"\1" * size) for n, size in sizes.items()],
        )
        self.alter(answer)
        return answer


@pytest.fixture
def serve() -> Iterator[Callable[[Host], str]]:
    """Call with a host: its address."""
    with ExitStack() as stack:

        def start(host: Host) -> str:
            return stack.enter_context(
                grpc_server(lambda server: lookup_pb2_grpc.add_LookupServicer_to_server(host, server))
            )

        yield start


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
            assert first.endpoint.stop().wait(PATIENCE_S)
            assert second.endpoint.stop().wait(PATIENCE_S)  # now there is none
            again = host_cpu_tier(workspace, port=first.endpoint.port)
            before = answered(again)
            until(lambda: answered(again) >= before + 5)
            going.clear()
            assert all(future.result() for future in asking)

    def test_with_none_there_is_no_answer(self, client_of) -> None:
        for attempts in (1, 4):
            assert refused(client_of(closed_port(), attempts=attempts), [1]).code is Code.LOOKUP_UNAVAILABLE

    def test_an_overloaded_one_is_passed_over(self, serve, client_of) -> None:
        hosts = Host(refuses=Code.OVERLOADED), Host()
        client = client_of(*map(serve, hosts), attempts=6)
        assert [client.lookup([1], IDS).version for _ in range(4)] == [1] * 4
        assert [client.start([1], IDS).result().version for _ in range(4)] == [1] * 4
        hosts[1].refuses = Code.OVERLOADED
        assert refused(client, [1]).code is Code.OVERLOADED

    def test_one_without_the_version_is_asked_once(self, serve, client_of) -> None:
        hosts = [Host(refuses=Code.VERSION_NOT_AVAILABLE) for _ in range(2)]
        client = client_of(*map(serve, hosts), attempts=50)
        refusal = refused(client, [5])
        assert refusal.code is Code.VERSION_NOT_AVAILABLE and refusal.versions == (2,)
        assert [len(host.names) for host in hosts] == [1, 1] and hosts[0].names == hosts[1].names
        hosts[0].refuses = None
        assert [client.lookup([5], IDS).version for _ in range(4)] == [5] * 4

    def test_every_request_has_a_name_of_its_own_and_connections_are_used_in_turn(self, serve, client_of) -> None:
        host = Host()
        address = serve(host)
        for client in (client_of(address, connections=3), client_of(address)):
            for _ in range(6):
                client.lookup([1], IDS)
        assert len(host.names) == len({*host.names}) == 12 and len(host.peers) == 4
        with pytest.raises(InvalidConfig, match="connections"):
            client_of(address, connections=0)
        with pytest.raises(InvalidConfig, match="attempts"):
            client_of(address, attempts=0)

    def test_the_time_of_one_request_is_no_longer_than_that_of_the_client(self, client_of, serve) -> None:
        remaining_s = []

        class Noting(Host):
            def Lookup(self, request: LookupRequest, context: grpc.ServicerContext) -> LookupResponse:
                remaining_s.append(context.time_remaining())
                return super().Lookup(request, context)

        client = client_of(serve(Noting()), timeout_s=280.0)
        for timeout_s in (None, 130.0, 420.0):
            client.lookup([1], IDS, timeout_s=timeout_s)
            client.start([1], IDS, timeout_s=timeout_s).result()
        assert [left // 145 for left in remaining_s] == [1, 1, 0, 0, 1, 1]


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
        dead = client_of(f"1/2={closed_port()}", targets_of(sharded((1,), (1,)))[0], attempts=2)
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

    def test_shards_are_asked_as_what_they_are_and_under_one_name(self, serve, client_of) -> None:
        hosts = Host(), Host()
        targets = [f"{index}/2={serve(host)}" for index, host in enumerate(hosts)]
        client_of(*targets).lookup([1], SPREAD)
        assert [host.shards for host in hosts] == [[(0, 2)], [(1, 2)]] and hosts[0].names == hosts[1].names

    @pytest.mark.parametrize(
        ("alter", "problem"),
        [
            (lambda answer: setattr(answer, "manifest_sha256", "cd" * 32), "one manifest"),
            (lambda answer: [widen(table) for table in answer.tables], "one width"),
        ],
        ids=["two manifests under one number", "rows of two widths"],
    )
    def test_what_differs_is_never_merged(self, alter, problem, serve, client_of) -> None:
        hosts = Host(), Host(alter=alter)
        targets = [f"{index}/2={serve(host)}" for index, host in enumerate(hosts)]
        refusal = refused(client_of(*targets), [1], SPREAD)
        assert refusal.code is Code.VERSION_MISMATCH and problem in str(refusal)


def widen(table: TableRows) -> None:
    table.row_bytes, table.rows = 2, bytes(2 * len(table.found))


def table_of(**fields: Any) -> TableRows:
    return TableRows(**{"name": "t", "row_bytes": 2, "rows": b"abcd", "found": b"\1\0", **fields})


class TestAnswers:
    """Of table `t` for two ids of version 1."""

    def refusal(self, client_of: Any, serve: Any, alter: Callable[[LookupResponse], Any]) -> RpcError:
        def altered(answer: LookupResponse) -> None:
            del answer.tables[:]
            answer.tables.append(table_of())
            alter(answer)

        client, ids = client_of(serve(Host(alter=altered))), {"t": np.array([1, 2])}
        refusal = refused(client, [1], ids)
        with pytest.raises(RpcError) as caught:
            client.start([1], ids).result()
        assert caught.value.code is refusal.code and len(str(refusal)) < 5000 and str(refusal).isprintable()
        return refusal

    def test_one_that_fits_is_read_where_it_came(self, serve, client_of) -> None:
        def altered(answer: LookupResponse) -> None:
            del answer.tables[:]
            answer.tables.append(table_of())

        answer = client_of(serve(Host(alter=altered))).lookup([1], {"t": np.array([1, 2])})
        assert answer.rows["t"].tolist() == [[97, 98], [99, 100]] and answer.rows["t"].dtype == np.uint8
        assert answer.found["t"].tolist() == [True, False] and answer.found["t"].dtype == np.bool_
        assert (answer.version, answer.manifest_sha256) == (1, "ab" * 32)

    @pytest.mark.parametrize(
        "alter",
        [
            lambda answer: setattr(answer, "version", 2),
            lambda answer: setattr(answer, "version", -1),
            lambda answer: setattr(answer, "manifest_sha256", "\n" * 10_000_000),
            lambda answer: setattr(answer.tables[0], "name", "u" * 1_000_000),
            lambda answer: setattr(answer.tables[0], "rows", b"abc"),
            lambda answer: setattr(answer.tables[0], "rows", b"abcde"),
            lambda answer: setattr(answer.tables[0], "rows", b""),
            lambda answer: answer.tables[0].MergeFrom(TableRows(rows=b"", row_bytes=2**32 - 1)),
            lambda answer: answer.tables[0].CopyFrom(table_of(rows=b"", row_bytes=0)),
            lambda answer: setattr(answer.tables[0], "row_bytes", 1),
            lambda answer: setattr(answer.tables[0], "found", b"\1\2"),
            lambda answer: setattr(answer.tables[0], "found", b"\1"),
            lambda answer: setattr(answer.tables[0], "found", b"\1\1\1"),
            lambda answer: answer.tables[0].CopyFrom(table_of(rows=b"ab", found=b"\1")),
            lambda answer: answer.tables.append(table_of()),
            lambda answer: answer.tables.extend([table_of(name="u")] * 10_000),
            lambda answer: answer.tables.insert(0, table_of(name="u")),
            lambda answer: answer.tables.pop(),
        ],
        ids=[
            "version not accepted", "negative version", "endless manifest", "another table", "a byte short",
            "a byte long", "no bytes", "rows of 4 GiB", "rows of nothing", "another width", "a mask of 2",
            "a mask too short", "a mask too long", "fewer rows", "the table again", "more tables",
            "another table before", "no table",
        ],
    )  # fmt: skip
    def test_one_that_does_not_fit_is_never_used(self, alter, serve, client_of) -> None:
        assert self.refusal(client_of, serve, alter).code is Code.VERSION_MISMATCH

    def test_tables_come_in_the_order_of_the_request(self, serve, client_of) -> None:
        def swap(answer: LookupResponse) -> None:
            answer.tables.append(answer.tables.pop(0))

        client = client_of(serve(Host(alter=swap)))
        assert refused(client, [1], {"t": np.array([1]), "u": np.array([2])}).code is Code.VERSION_MISMATCH

    def test_tables_of_other_versions_are_not_expected(self, serve, client_of) -> None:
        def drop(answer: LookupResponse) -> None:
            del answer.tables[1]

        ids, only = {"t": np.array([1]), "u": np.array([2])}, {"u": (2,)}
        assert [*client_of(serve(Host(alter=drop))).lookup([1, 2], ids, only=only).rows] == ["t"]
        with pytest.raises(RpcError) as caught:
            client_of(serve(Host())).lookup([1, 2], ids, only=only)
        assert caught.value.code is Code.VERSION_MISMATCH
