"""What is recorded of live traffic, and what `facet load` says of it."""

import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import click.testing
import grpc
import numpy as np
import pytest

from online.clock import CLOCK
from online.commands.load import load
from online.load.population import Population
from online.load.recording import NOT_SENT
from online.load.traffic import WARM_REQUESTS, WRONG_SHAPE, LookupTraffic, RankTraffic, lookup_traffic, rank_traffic
from online.proto import lookup_pb2, lookup_pb2_grpc
from online.ranking.client import RankedScores
from pipelines.contracts.errors import InvalidConfig
from tests.waiting import PATIENCE_S, FakeClock, until

POPULATION = Population({"item": np.arange(100)}, seed=0)
STALL_S = 2.0


class Stalling(lookup_pb2_grpc.LookupServicer):
    """A CPU host of one thread that answers at once, except that it stalls in one request."""

    def __init__(self, stalls_at: int, stall: Callable[[grpc.ServicerContext], None]) -> None:
        self._turn, self._stalls_at, self._stall = itertools.count(), stalls_at, stall

    def Lookup(self, request, context) -> lookup_pb2.LookupResponse:
        if next(self._turn) == self._stalls_at:
            self._stall(context)
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
def stalling() -> Iterator:
    servers = []

    def start(stalls_at: int = -1, stall: Callable[[grpc.ServicerContext], None] = lambda context: None) -> str:
        servers.append(grpc.server(ThreadPoolExecutor(1)))
        lookup_pb2_grpc.add_LookupServicer_to_server(Stalling(stalls_at, stall), servers[-1])
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait(PATIENCE_S)


def test_a_stall_shows_in_every_request_it_held_up_of_an_open_loop_but_in_one_of_a_closed_loop(stalling) -> None:
    def held_up(others: int, **loop) -> tuple[int, dict]:
        """The server stalls for `STALL_S` once so many other requests are under way."""
        clock = FakeClock()

        def stall(context: grpc.ServicerContext) -> None:
            until(lambda: not others or sum(slept > 1e-6 for slept in clock.slept) > 20 + others)  # a sleep an arrival
            clock.advance(STALL_S)

        traffic = lookup_traffic(
            [stalling(WARM_REQUESTS + 20, stall)], POPULATION, version=1, table="item.kge", batch=4, requests=200,
            seconds=0.0, seed=0, timeout_s=PATIENCE_S, clock=clock, **loop,
        )
        summary = traffic.summary()
        assert (summary["requests"], summary["failed"]) == (200, 0)
        return int((traffic.answers.column("latency_ms") >= STALL_S * 1e3).sum()), summary

    closed, hidden = held_up(0, concurrency=1)
    opened, shown = held_up(30, concurrency=64, rate=200.0)
    assert closed == 1 and opened >= 30
    assert (hidden["latency_ms"]["p90"], shown["latency_ms"]["p90"] >= STALL_S * 1e3) == (0.0, True)
    assert (hidden["loop"], shown["loop"], shown["rate"]) == ("closed", "open", 200.0)


def test_a_request_that_could_not_be_sent_in_time_counts_as_failed(stalling) -> None:
    clock = FakeClock()

    def stall(context: grpc.ServicerContext) -> None:
        gone = threading.Event()
        clock.advance(STALL_S)  # all requests are due by then
        assert context.add_callback(gone.set)
        assert gone.wait(PATIENCE_S), "its client waits on"

    traffic = lookup_traffic(
        [stalling(100 + 5, stall)], POPULATION, version=1, table="item.kge", batch=4, requests=100,
        seconds=0.0, seed=0, concurrency=1, rate=400.0, timeout_s=STALL_S / 4, clock=clock,
    )
    summary = traffic.summary()
    assert summary["requests"] == 100 and summary["failures"]["DEADLINE"] >= 1
    assert summary["failures"][NOT_SENT] == 100 - (5 + 1), "what was due before and could not be sent"
    assert summary["failed"] == sum(summary["failures"].values()) == sum(e["failed"] for e in summary["timeline"])


def test_every_failure_is_counted() -> None:
    population, clock = Population({"user": np.arange(9), "item": np.arange(9)}, seed=0), FakeClock()
    traffic = rank_traffic(
        "127.0.0.1:9", population, requests=7, seconds=0.0, concurrency=1, think_s=2.0, candidates=3, now_seconds=1e9,
        seed=0, clock=clock,
    )
    assert clock.slept == [2.0] * 8, "before each request, and before none was left"
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
    now, requests = CLOCK.now(), 20_000
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


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (0, 2), (4, 2)])
def test_an_answer_of_another_shape_is_a_failure_and_never_stretched(shape) -> None:
    traffic = RankTraffic(candidates=3)
    traffic.start()
    traffic.record(1, np.arange(3), answer(1, np.zeros((3, 2), np.float32)), due=0.0, sent=0.0)
    traffic.record(1, np.arange(3), answer(1, np.ones(shape, np.float32)), due=0.0, sent=0.0)
    assert len(traffic.answers) == 1 and traffic.failures.by_code() == {WRONG_SHAPE: 1}
    assert not traffic.for_verification().scores.any()


def test_goodput_counts_what_came_in_time() -> None:
    traffic = LookupTraffic(batch=4, deadline_ms=10.0, clock=(clock := FakeClock()))
    traffic.start()
    clock.advance(5.0)
    for late_s in (0.0, 0.0099, 0.0101, 5.0):
        traffic.record(np.array([True, False, True, True]), due=clock.now() - late_s, sent=clock.now())
    traffic.fail("DEADLINE", clock.now(), "")
    traffic.wall_s = 2.0
    summary = traffic.summary()
    assert (summary["requests"], summary["failed"], summary["answered_in_time"]) == (5, 1, 2)
    assert (summary["goodput_per_s"], summary["requests_per_s"], summary["rows_per_s"]) == (1.0, 2.0, 8)
    assert (summary["latency_ms"]["max"], summary["found_share"]) == (5000.0, 0.75)


def test_a_timeline_is_by_when_requests_were_due() -> None:
    traffic = LookupTraffic(batch=1, rate=1.0, clock=(clock := FakeClock()))
    traffic.start()
    clock.advance(4.5)
    for due_s, sent_s in ((0.5, 0.75), (0.75, 4.0), (3.25, 3.25)):
        traffic.record(np.ones(1, bool), due=1000 + due_s, sent=1000 + sent_s)
    traffic.fail("DEADLINE", 1000 + 1.5, "")
    assert [(e["second"], e["answered"], e["failed"], e["max_ms"]) for e in traffic.timeline()] == [
        (0, 2, 0, 4000.0), (1, 0, 1, 0.0), (3, 1, 0, 1250.0)
    ]
    traffic.wall_s = 2.0
    figures = traffic.figures()
    assert (figures["lag_ms"]["max"], figures["offered_per_s"], figures["requests_per_s"]) == (3250.0, 2.0, 1.5)


def test_nothing_has_a_summary_too() -> None:
    assert RankTraffic().summary()["requests"] == LookupTraffic().summary()["requests"] == 0


@pytest.mark.parametrize("arguments", [[], ["--ranker", "127.0.0.1:1", "--lookup", "127.0.0.1:1"]])
def test_the_command_needs_one_kind_of_target(arguments, workspace_with_versions) -> None:
    result = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    assert isinstance(result.exception, InvalidConfig)


def test_the_command_thinks_in_a_closed_loop_only(workspace_with_versions) -> None:
    arguments = ["--lookup", "127.0.0.1:1", "--rate", "5", "--think-ms", "5"]
    result = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    assert isinstance(result.exception, InvalidConfig) and "--rate (open) and --think-ms" in str(result.exception)


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
def test_the_command_thinks_as_long_as_it_is_told(workspace_with_versions, stalling) -> None:
    arguments = ["--lookup", stalling(), "--batch", "4", "--requests", "4", "--concurrency", "1", "--think-ms", "200"]
    done = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    said = json.loads(done.stdout)
    assert said["think_ms"] == 200 and said["wall_s"] >= 4 * 0.2


@pytest.mark.usefixtures("signals_as_they_were")
@pytest.mark.parametrize("rates", [(), (200,), (100, 400)])
def test_the_command_measures_and_draws(rates, workspace_with_versions, stalling, tmp_path) -> None:
    picture, out = tmp_path / "load.svg", tmp_path / "load.json"
    arguments = ["--rate", ",".join(map(str, rates))] if rates else []
    arguments += ["--lookup", stalling(), "--batch", "4", "--requests", "60", "--deadline-ms", "50"]
    click.testing.CliRunner().invoke(
        load, [*arguments, "--out", str(out), "--plot", str(picture)], obj=workspace_with_versions.workspace,
        catch_exceptions=False,
    )
    result = json.loads(out.read_text())
    assert [step.get("rate") for step in result.get("steps", [result])] == (list(rates) or [None])
    assert all(step["requests"] == 60 for step in result.get("steps", [result]))
    assert picture.read_text().startswith("<?xml") and "</svg>" in picture.read_text()
