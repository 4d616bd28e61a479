"""The rank client: several rankers, of which some are away, overloaded or out of step."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from online.proto import rank_pb2, rank_pb2_grpc
from online.ranking.client import RankClient
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig
from tests.grpc_server import end_by, grpc_server
from tests.waiting import PATIENCE_S

ITEMS = np.arange(3)


class Ranker(rank_pb2_grpc.RankServicer):
    """Refuses with these codes, one after the other, before it answers for good, as `alter` alters it."""

    def __init__(self, refusals: list[Code], alter: Callable[[rank_pb2.RankResponse], Any] = lambda _: None) -> None:
        self.refusals, self.alter, self.asked = refusals, alter, []

    def Rank(self, request: rank_pb2.RankRequest, context: Any) -> rank_pb2.RankResponse:
        self.asked.append(request.request_id)
        if self.refusals:
            end_by(context, RpcError(self.refusals.pop(0), "no", expected="-", got="-", remedy="-"))
        count = len(request.candidates) // 8
        answer = rank_pb2.RankResponse(
            version=1, manifest_sha256="ab" * 32, tasks=["t"], scores=np.full(count, 0.5, "<f4").tobytes(),
            found=[rank_pb2.TableFound(table="item.kge", ids=4, found=3)], timing=rank_pb2.Timing(total_ms=2.5),
        )
        self.alter(answer)
        return answer


@pytest.fixture
def rankers() -> Iterator[Any]:
    """Call with refusals: the ranker and its address."""
    with ExitStack() as stack:

        def ranker(*refusals: Code, **options: Any) -> tuple[Ranker, str]:
            service = Ranker(list(refusals), **options)
            add = rank_pb2_grpc.add_RankServicer_to_server
            return service, stack.enter_context(grpc_server(lambda server: add(service, server)))

        yield ranker


def ranked(client: RankClient, requests: int = 1) -> None:
    for _ in range(requests):
        assert client.rank(1, ITEMS).scores.tolist() == [[0.5]] * 3
    client.close()


def test_another_ranker_is_asked(rankers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"127.0.0.1:{free.getsockname()[1]}"
    service, address = rankers()
    ranked(RankClient([gone, address], attempts=3, timeout_s=PATIENCE_S), 4)
    assert len(service.asked) == len(set(service.asked)) == 4


@pytest.mark.parametrize(
    "code", [Code.LOOKUP_UNAVAILABLE, Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE, Code.VERSION_MISMATCH]
)
def test_what_passes_is_tried_again_under_the_same_name(code, rankers) -> None:
    service, address = rankers(code, code)
    ranked(RankClient(address, attempts=3, timeout_s=PATIENCE_S))
    assert len(service.asked) == 3 and len(set(service.asked)) == 1


def test_one_attempt_by_default_and_other_refusals_are_final(rankers) -> None:
    for code, attempts in ((Code.OVERLOADED, 1), (Code.MALFORMED_IDS, 9), (Code.INTERNAL, 9), (Code.DEADLINE, 9)):
        service, address = rankers(code)
        client = RankClient(address, attempts=attempts, timeout_s=PATIENCE_S)
        with pytest.raises(RpcError) as caught:
            client.rank(1, ITEMS)
        client.close()
        assert caught.value.code is code and len(service.asked) == 1


def test_no_ranker_is_no_client() -> None:
    with pytest.raises(InvalidConfig, match="at least one"):
        RankClient([])


def test_all_of_an_answer(rankers) -> None:
    client = RankClient(rankers()[1], timeout_s=PATIENCE_S)
    answer = client.rank(1, ITEMS)
    client.close()
    assert (answer.version, answer.manifest_sha256, answer.tasks) == (1, "ab" * 32, ("t",))
    assert answer.found == {"item.kge": 0.75} and answer.timing_ms == {"total_ms": 2.5}


def scores(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda a: setattr(a, "version", 0), "a version"),
        (lambda a: setattr(a, "manifest_sha256", "\n" * 1_000_000), "manifest"),
        (lambda a: a.tasks.pop(), "tasks"),
        (lambda a: a.tasks.append("t"), "tasks"),
        (lambda a: a.tasks.append("u" * 1_000_000), "3 x 2 scores"),
        (lambda a: setattr(a, "scores", b""), "3 x 1 scores"),
        (lambda a: setattr(a, "scores", a.scores[:-1]), "3 x 1 scores"),
        (lambda a: setattr(a, "scores", a.scores + a.scores), "3 x 1 scores"),
        (lambda a: setattr(a, "scores", scores(0.5, 0.5, float("nan"))), "probabilities"),
        (lambda a: setattr(a, "scores", scores(0.5, 0.5, 1.5)), "probabilities"),
        (lambda a: setattr(a, "scores", scores(-0.5, 0.5, 1.0)), "probabilities"),
        (lambda a: setattr(a.found[0], "found", 5), "no more rows than ids"),
        (lambda a: a.found.append(a.found[0]), "each once"),
        (lambda a: setattr(a.timing, "wait_ms", float("nan")), "wait_ms"),
        (lambda a: setattr(a.timing, "queue_ms", 1e300), "queue_ms"),
    ],
)
def test_an_answer_that_does_not_fit_is_a_typed_error(alter, problem, rankers) -> None:
    _, address = rankers(alter=alter)
    client = RankClient(address, timeout_s=PATIENCE_S)
    with pytest.raises(RpcError, match=problem) as caught:
        client.rank(1, ITEMS)
    client.close()
    assert caught.value.code is Code.INTERNAL and len(str(caught.value)) < 1000 and str(caught.value).isprintable()
