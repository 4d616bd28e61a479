"""Answers of admin services that cannot be true, from a real server; each is one alteration of an answer that can."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from online.proto import admin_pb2, admin_pb2_grpc
from online.rollout.fleet import Fleet, is_away
from online.rpc_error import Code, RpcError
from tests.waiting import PATIENCE_S

SHA = "ab" * 32


def cpu_tier() -> admin_pb2.CpuTierStatus:
    versions = [admin_pb2.HostedVersion(version=version, manifest_sha256=SHA) for version in (1, 2)]
    return admin_pb2.CpuTierStatus(versions=versions, preferred=1, canary=2, canary_share=0.5, shard=1, shards=2)


def ranker() -> admin_pb2.RankerStatus:
    model = admin_pb2.LoadedModel(version=1, manifest_sha256=SHA, device="cpu", latency_counts=[1, 2, 3])
    return admin_pb2.RankerStatus(models=[model], latency_bounds_ms=[1.0, 2.0])


class Says(admin_pb2_grpc.CpuTierAdminServicer, admin_pb2_grpc.RankerAdminServicer):
    answer: Any = None

    def Status(self, request: admin_pb2.StatusRequest, context: grpc.ServicerContext) -> Any:
        return self.answer


@pytest.fixture(scope="module")
def says() -> Iterator[Callable[[Any], Any]]:
    """Call with an answer: what a fleet of one such host takes it for."""
    service, server = Says(), grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_CpuTierAdminServicer_to_server(service, server)
    admin_pb2_grpc.add_RankerAdminServicer_to_server(service, server)
    host = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    tiers, rankers = Fleet([host], []), Fleet([], [host])

    def ask(answer: Any) -> Any:
        service.answer = answer
        is_tier = isinstance(answer, admin_pb2.CpuTierStatus)
        answers = (tiers if is_tier else rankers).ask(timeout_s=PATIENCE_S)
        return (answers.cpu_tiers if is_tier else answers.rankers)[host]

    yield ask
    tiers.close()
    rankers.close()
    assert server.stop(0).wait(PATIENCE_S)


@pytest.mark.parametrize("answer", [cpu_tier(), ranker(), admin_pb2.CpuTierStatus(), admin_pb2.RankerStatus()])
def test_what_can_be_true_is_taken_as_it_is(says, answer) -> None:
    assert says(answer) == answer


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda a: setattr(a.versions[1], "version", 1), "each once"),
        (lambda a: setattr(a.versions[1], "version", -2), "from 1 on"),
        (lambda a: setattr(a.versions[0], "manifest_sha256", "\x1b[2J" * 10_000), "SHA-256"),
        (lambda a: setattr(a.versions[0], "manifest_sha256", SHA.upper()), "SHA-256"),
        (lambda a: setattr(a, "preferred", 3), "preferred"),
        (lambda a: setattr(a, "canary", -1), "canary"),
        (lambda a: setattr(a, "canary_share", 1.5), "share"),
        (lambda a: setattr(a, "canary_share", float("nan")), "share"),
        (lambda a: setattr(a, "shard", 2), "shard < shards"),
        (lambda a: setattr(a, "shards", 2**32 - 1), "shard < shards"),
    ],
)
def test_a_cpu_host_that_cannot_be_right_is_refused(says, alter, problem) -> None:
    answer = cpu_tier()
    alter(answer)
    refused_for(says(answer), problem)


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda a: a.models.append(a.models[0]), "each once"),
        (lambda a: setattr(a.models[0], "manifest_sha256", ""), "SHA-256"),
        (lambda a: a.latency_bounds_ms.insert(0, 9.0), "ascending"),
        (lambda a: a.latency_bounds_ms.append(float("inf")), "finite"),
        (lambda a: a.latency_bounds_ms.append(float("nan")), "finite"),
        (lambda a: a.latency_bounds_ms.insert(0, -1.0), "ascending"),
        (lambda a: a.models[0].latency_counts.append(1), "3 latency counts"),
        (lambda a: setattr(a.models[0], "device", "cpu\n"), "device"),
        (lambda a: setattr(a.models[0], "device", "x" * 65), "device"),
    ],
)
def test_a_ranker_that_cannot_be_right_is_refused(says, alter, problem) -> None:
    answer = ranker()
    alter(answer)
    refused_for(says(answer), problem)


def refused_for(refusal: Any, problem: str) -> None:
    assert isinstance(refusal, RpcError) and refusal.code is Code.INTERNAL and not is_away(refusal)
    assert problem in str(refusal) and len(str(refusal)) < 500 and str(refusal).isprintable()
