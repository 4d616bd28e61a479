"""The rank client: several rankers, of which some are away, overloaded or out of step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from online.proto import rank_pb2, rank_pb2_grpc
from online.ranking.client import RankClient
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError, errors_to_status
from pipelines.contracts.errors import InvalidConfig

ITEMS = np.arange(3)


class Ranker(rank_pb2_grpc.RankServicer):
    """Refuses with these codes, one after the other, before it answers for good."""

    def __init__(self, refusals: list[Code]) -> None:
        self.refusals, self.asked = refusals, []

    def Rank(self, request: rank_pb2.RankRequest, context: Any) -> rank_pb2.RankResponse:
        self.asked.append(request.request_id)
        with errors_to_status(context, request.request_id):
            if self.refusals:
                raise RpcError(self.refusals.pop(0), "no", expected="-", got="-", remedy="-")
            count = len(request.candidates) // 8
            return rank_pb2.RankResponse(version=1, tasks=["t"], scores=np.full(count, 0.5, "<f4").tobytes())


@pytest.fixture
def rankers() -> Iterator[Any]:
    """Call with refusals: the ranker and its address."""
    endpoints = []

    def ranker(*refusals: Code) -> tuple[Ranker, str]:
        endpoint, service = Endpoint("rank", "127.0.0.1", 0, 2), Ranker(list(refusals))
        rank_pb2_grpc.add_RankServicer_to_server(service, endpoint.server)
        endpoint.start()
        endpoints.append(endpoint)
        return service, f"127.0.0.1:{endpoint.port}"

    yield ranker
    for endpoint in endpoints:
        endpoint.stop().wait()


def ranked(client: RankClient, requests: int = 1) -> None:
    for _ in range(requests):
        assert client.rank(1, ITEMS).scores.tolist() == [[0.5]] * 3
    client.close()


def test_another_ranker_is_asked(rankers) -> None:
    gone = Endpoint("gone", "127.0.0.1", 0, 1)
    gone.stop().wait()
    service, address = rankers()
    ranked(RankClient([f"127.0.0.1:{gone.port}", address], attempts=3, timeout_s=30.0), 4)
    assert len(service.asked) == len(set(service.asked)) == 4


@pytest.mark.parametrize(
    "code", [Code.LOOKUP_UNAVAILABLE, Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE, Code.VERSION_MISMATCH]
)
def test_what_passes_is_tried_again_under_the_same_name(code, rankers) -> None:
    service, address = rankers(code, code)
    ranked(RankClient(address, attempts=3, timeout_s=30.0))
    assert len(service.asked) == 3 and len(set(service.asked)) == 1


def test_one_attempt_by_default_and_other_refusals_are_final(rankers) -> None:
    for code, attempts in ((Code.OVERLOADED, 1), (Code.MALFORMED_IDS, 9), (Code.INTERNAL, 9), (Code.DEADLINE, 9)):
        service, address = rankers(code)
        client = RankClient(address, attempts=attempts)
        with pytest.raises(RpcError) as caught:
            client.rank(1, ITEMS)
        client.close()
        assert caught.value.code is code and len(service.asked) == 1


def test_no_ranker_is_no_client() -> None:
    with pytest.raises(InvalidConfig, match="at least one"):
        RankClient([])
