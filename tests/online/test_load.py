"""The load generator: what it draws, how it counts, and the command."""

import threading

import click.testing
import numpy as np
import pytest

from online.commands.load import load
from online.load import Population, RankTraffic, drive, lookup_latency, percentiles, rank_traffic
from pipelines.contracts.errors import InvalidConfig


def test_population_prefers_popular_ids_and_mixes_in_unknown_ones() -> None:
    ids = np.arange(1000, 2000)
    population = Population({"item": ids}, seed=1)
    drawn = population.draw("item", 20_000, np.random.default_rng(0))
    unknown = drawn < 0
    assert 0.01 < unknown.mean() < 0.03
    assert np.isin(drawn[~unknown], ids).all()
    _, counts = np.unique(drawn[~unknown], return_counts=True)
    assert counts.max() > 20 * np.median(counts)


def test_drive_sends_at_least_what_was_asked_and_raises_what_breaks() -> None:
    seen, lock = [], threading.Lock()

    def send(number, random) -> None:
        with lock:
            seen.append(number)

    drive(send, requests=57, seconds=0.0, concurrency=4, seed=0)
    assert sorted(seen) == list(range(57))
    seconds = drive(send, requests=1, seconds=0.05, concurrency=2, seed=0)
    assert seconds >= 0.05 and len(seen) > 58

    def fail(number, random) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(fail, requests=3, seconds=0.0, concurrency=1, seed=0)


def test_every_failure_is_counted(workspace_with_versions) -> None:
    population = Population.of_version(workspace_with_versions.workspace, 1, seed=0)
    traffic = rank_traffic(
        "127.0.0.1:9", population, requests=5, seconds=0.0, concurrency=2, candidates=3, now_seconds=1e9, seed=0
    )
    summary = traffic.summary()
    assert (summary["requests"], summary["failed"]) == (5, 5)
    assert sum(summary["failures"].values()) == 5 and len(summary["first_failures"]) == 5
    assert sum(entry["failed"] for entry in summary["timeline"]) == 5


def test_lookup_latency_is_measured_over_all_requests(workspace_with_versions, host_cpu_tier) -> None:
    workspace = workspace_with_versions.workspace
    tier = host_cpu_tier(workspace, (1,))
    result = lookup_latency(
        tier.address, Population.of_version(workspace, 1, seed=0), version=1, table="item.kge", batch=64, requests=50,
        seconds=0.0, concurrency=1, seed=0,
    )
    assert (result["requests"], result["failed"], sum(result["histogram"]["counts"])) == (50, 0, 50)
    assert len(result["histogram"]["edges_ms"]) == len(result["histogram"]["counts"]) + 1
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert 0.9 < result["found_share"] < 1.0


def test_percentiles_of_nothing_are_zero() -> None:
    assert percentiles([])["p99"] == 0.0 and percentiles([1.0, 3.0])["p50"] == 2.0
    assert RankTraffic().summary()["requests"] == 0


@pytest.mark.parametrize("arguments", [[], ["--ranker", "127.0.0.1:1", "--lookup", "127.0.0.1:1"]])
def test_the_command_needs_one_target(arguments, workspace_with_versions) -> None:
    result = click.testing.CliRunner().invoke(load, arguments, obj=workspace_with_versions.workspace)
    assert isinstance(result.exception, InvalidConfig)
