"""What is recorded of live traffic, and what `facet load` says of it."""

import json
import signal
import time
from collections.abc import Iterator

import click.testing
import numpy as np
import pytest

from online.commands.load import load
from online.load.drive import drive
from online.load.population import Population
from online.load.recording import NOT_SENT
from online.load.traffic import WRONG_SHAPE, LookupTraffic, RankTraffic, lookup_traffic, rank_traffic
from online.proto import lookup_pb2, lookup_pb2_grpc
from online.ranking.client import RankedScores
from pipelines.contracts.errors import InvalidConfig
from tests.grpc_server import grpc_server
from tests.online.load.clock import Clock

POPULATION = Population({"item": np.arange(100)}, seed=0)
STALL_S = 2.0


class Answering(lookup_pb2_grpc.LookupServicer):
    """A CPU host that has one byte for every id."""

    def Lookup(self, request, context) -> lookup_pb2.LookupResponse:
        return lookup_pb2.LookupResponse(
            version=request.accepted_versions[0],
            tables=[
                lookup_pb2.TableRows(
                    name=table.name, row_bytes=1, rows=bytes(len(table.ids) // 8), found=b"\1" * (len(table.ids) // 8)
                )
                for table in request.tables
            ],
        )


@pytest.fixture
def answering() -> Iterator[str]:
    with grpc_server(lambda server: lookup_pb2_grpc.add_LookupServicer_to_server(Answering(), server)) as address:
        yield address


def stalled(rate: float | None, timeout_s: float = 60.0) -> LookupTraffic:
    """200 requests of one client to a server that takes 1 ms for each, but for one of them 2 s."""
    clock, traffic = Clock(), None

    def send(number, random, begin) -> None:
        def call() -> np.ndarray:
            clock.sleep(STALL_S if number == 20 else 0.001)
            return np.ones(4, bool)

        if answered := traffic.ask(call, begin, timeout_s):
            traffic.record(answered.answer, due=answered.due, sent=answered.sent)

    traffic = LookupTraffic(batch=4, rate=rate, clock=clock)
    traffic.start()
    traffic.wall_s = drive(
        send, requests=200, seconds=0.0, concurrency=1, seed=0, rate=rate, clock=clock, sleep=clock.sleep
    )
    return traffic


def test_a_stall_shows_in_every_request_it_held_up_of_an_open_loop_but_in_one_of_a_closed_loop() -> None:
    hidden, shown = stalled(None), stalled(200.0)
    late = [int((traffic.answers.column("latency_ms") > STALL_S * 1e3 / 4).sum()) for traffic in (hidden, shown)]
    assert late[0] == 1 and late[1] > 150
    hidden, shown = hidden.summary(), shown.summary()
    assert (shown["requests"], shown["failed"]) == (hidden["requests"], hidden["failed"]) == (200, 0)
    assert shown["latency_ms"]["p90"] > STALL_S * 1e3 / 2
    assert hidden["latency_ms"]["p90"] == pytest.approx(1.0, abs=0.01)
    assert hidden["wall_s"] == pytest.approx(STALL_S + 0.199)
    assert (hidden["loop"], shown["loop"], shown["rate"]) == ("closed", "open", 200.0)


def test_a_request_that_could_not_be_sent_in_time_counts_as_failed() -> None:
    summary = stalled(200.0, timeout_s=STALL_S / 2).summary()
    failed = summary["failures"][NOT_SENT]
    assert summary["failures"] == {NOT_SENT: failed} and failed == summary["failed"] > 100
    assert summary["requests"] == 200 and sum(entry["failed"] for entry in summary["timeline"]) == failed


def test_no_request_is_left_out_of_a_rate(answering) -> None:
    summary = lookup_traffic(
        [answering], POPULATION, version=1, table="item.kge", batch=4, requests=50, seconds=0.0, concurrency=4,
        seed=0, timeout_s=60.0, rate=1000.0,
    ).summary()
    assert summary["requests"] == 50 and summary["loop"] == "open"


def test_every_failure_is_counted() -> None:
    population = Population({"user": np.arange(9), "item": np.arange(9)}, seed=0)
    traffic = rank_traffic(
        "127.0.0.1:9", population, requests=7, seconds=0.0, concurrency=2, candidates=3, now_seconds=1e9, seed=0
    )
    summary = traffic.summary()
    assert (summary["requests"], summary["failed"], summary["goodput_per_s"]) == (7, 7, 0.0)
    assert sum(summary["failures"].values()) == 7 and len(summary["first_failures"]) == 5
    assert sum(entry["failed"] for entry in summary["timeline"]) == 7
    assert len(traffic.for_verification().version) == 0


def test_lookups_are_measured_over_all_requests(workspace_with_versions, host_cpu_tier) -> None:
    workspace = workspace_with_versions.workspace
    tier = host_cpu_tier(workspace, (1,))
    result = lookup_traffic(
        [tier.address], Population.of_version(workspace, 1, seed=0), version=1, table="item.kge", batch=64,
        requests=50, seconds=0.0, concurrency=1, seed=0, deadline_ms=60_000.0,
    ).summary()
    assert (result["requests"], result["failed"], sum(result["histogram"]["counts"])) == (50, 0, 50)
    assert len(result["histogram"]["edges_ms"]) == len(result["histogram"]["counts"]) + 1
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["p99_9_ms"] <= result["max_ms"]
    assert 0.9 < result["found_share"] < 1.0 and result["answered_in_time"] == 50


def answer(version: int, scores: np.ndarray) -> RankedScores:
    return RankedScores(
        version=version, manifest_sha256=f"m{version}", tasks=("ctr", "cvr")[: scores.shape[1]], scores=scores,
        found={}, timing_ms={"total_ms": 2.0},
    )


def test_answers_are_kept_exactly_over_many_blocks() -> None:
    traffic, random = RankTraffic(candidates=3, now_seconds=5.0), np.random.default_rng(0)
    traffic.start()
    now, requests = time.perf_counter(), 20_000
    users, versions = random.integers(-(2**62), 2**62, requests), random.integers(1, 4, requests)
    items = random.integers(-(2**62), 2**62, (requests, 3))
    scores = random.random((requests, 3, 2), np.float32)
    for number in range(requests):
        traffic.record(
            int(users[number]), items[number], answer(int(versions[number]), scores[number]), due=now, sent=now
        )
    kept = traffic.for_verification()
    assert (kept.version == versions).all() and kept.manifest_sha256 == [f"m{version}" for version in versions]
    assert (kept.users == np.repeat(users, 3)).all() and (kept.items == items.reshape(-1)).all()
    assert (kept.scores == scores.reshape(-1, 2)).all() and (kept.now_seconds == 5.0).all()
    assert (kept.request == np.repeat(np.arange(requests), 3)).all()
    traffic.wall_s = 2.0
    summary = traffic.summary()
    assert summary["versions_seen"] == {str(v): int((versions == v).sum()) for v in (1, 2, 3)}
    assert sum(sum(entry["versions"].values()) for entry in summary["timeline"]) == requests
    assert summary["stages_p50_ms"] == {"total_ms": 2.0} and summary["manifests"]["2"] == "m2"
    assert summary["requests_per_s"] == summary["goodput_per_s"] == requests / 2


def test_any_number_of_manifests_is_told_apart() -> None:
    traffic, scores = RankTraffic(candidates=1), np.zeros((1, 2), np.float32)
    traffic.start()
    for number in range(33_000):
        traffic.record(1, np.arange(1), answer(number, scores), due=0.0, sent=0.0)
    assert traffic.for_verification().version.tolist() == [*range(33_000)]


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (0, 2), (4, 2)])
def test_an_answer_of_another_shape_is_a_failure_and_never_stretched(shape) -> None:
    traffic = RankTraffic(candidates=3)
    traffic.start()
    traffic.record(1, np.arange(3), answer(1, np.zeros((3, 2), np.float32)), due=0.0, sent=0.0)
    traffic.record(1, np.arange(3), answer(1, np.ones(shape, np.float32)), due=0.0, sent=0.0)
    assert len(traffic.answers) == 1 and traffic.failures.by_code() == {WRONG_SHAPE: 1}
    assert not traffic.for_verification().scores.any()


def test_goodput_counts_what_came_in_time() -> None:
    clock = Clock()
    traffic = LookupTraffic(batch=4, deadline_ms=10.0, clock=clock)
    traffic.start()
    for latency_ms in (9.0, 9.9, 11.0, 5000.0):
        due = clock()
        clock.sleep(latency_ms / 1e3)
        traffic.record(np.ones(4, bool), due=due, sent=due)
    traffic.wall_s = 2.0
    figures = traffic.figures()
    assert figures["latency_ms"]["max"] == pytest.approx(5000)
    assert (figures["requests"], figures["answered_in_time"], figures["goodput_per_s"]) == (4, 2, 1.0)


def test_nothing_has_a_summary_too() -> None:
    assert RankTraffic().summary()["requests"] == LookupTraffic().summary()["requests"] == 0


@pytest.mark.parametrize("arguments", [[], ["--ranker", "127.0.0.1:1", "--lookup", "127.0.0.1:1"]])
def test_the_command_needs_one_kind_of_target(arguments, workspace_with_versions) -> None:
    result = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    assert isinstance(result.exception, InvalidConfig)


@pytest.mark.parametrize("rate", ["0", "-1", "5,x", "nan", "inf", ""])
def test_the_command_refuses_what_is_no_rate(rate, workspace_with_versions) -> None:
    arguments = ["--lookup", "127.0.0.1:1", "--rate", rate]
    result = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    assert result.exit_code == 2 and "requests a second" in result.output


@pytest.fixture
def signals_as_they_were() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_they_were")
@pytest.mark.parametrize("rates", [(), (200,), (100, 400)])
def test_the_command_measures_and_draws(rates, workspace_with_versions, answering, tmp_path) -> None:
    picture, out = tmp_path / "load.svg", tmp_path / "load.json"
    arguments = ["--rate", ",".join(map(str, rates))] if rates else []
    arguments += ["--lookup", answering, "--batch", "4", "--requests", "60", "--deadline-ms", "50"]
    click.testing.CliRunner().invoke(
        load, [*arguments, "--out", str(out), "--plot", str(picture)], obj=workspace_with_versions.workspace,
        catch_exceptions=False,
    )
    result = json.loads(out.read_text())
    assert [step.get("rate") for step in result.get("steps", [result])] == (list(rates) or [None])
    assert all(step["requests"] == 60 for step in result.get("steps", [result]))
    assert picture.read_text().startswith("<?xml") and "</svg>" in picture.read_text()
