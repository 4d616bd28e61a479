"""The benchmarks run, and say what they should; how fast anything is, is not asked here."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.rowcodec import codec
from tests.benchmarks.harness import (
    MIN_ROUNDS,
    Side,
    Timing,
    bounded,
    interleave,
    interval_of_ratio,
    measured,
    ratio_by_round,
    speeds_compared,
    write_results,
)
from tests.benchmarks.lookup_client import KINDS
from tests.benchmarks.memory import run_watched
from tests.benchmarks.synthetic import BLOCK_ROWS, DIM, ascending_ids, packed_rows
from tests.waiting import PROGRAM_S

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"name", "ours", "rival", "rival_name", "ratio", "unit", "conditions"}
PUBLISH = {
    "materialize_vs_feast_sqlite", "materialize_vs_feast_redis", "materialize_vs_redis_mset", "lookup512_vs_fbgemm",
    "lookup512_vs_redis_mget", "lookup512_vs_feast_redis", "bytes_per_row_segment", "bytes_per_row_redis",
    "lookup512_vs_index_select", "index_lookup_vs_sorted_array", "index_build_vs_sorted_array",
    "bytes_per_row_vs_feast_redis", "redis_packed_lookup512", "delta_1pct_materialize_vs_full",
    "delta_1pct_bytes_vs_full", "delta_1pct_lookup512_vs_full",
}
ONLINE = {
    "lookup512_p50_vs_grpc_echo", "lookup512_p99_vs_grpc_echo",
    "lookup512_p50_socket_vs_grpc",
}
PUBLISH_100M = {
    "materialize_s", "materialize_peak_memory", "bytes_per_row", "lookup512_median_us", "lookup512_p99_us", "retire_s",
    "different_rows",
}


def run(tmp_path: Path, module: str, *options: str) -> dict[str, dict]:
    output = tmp_path / "reports" / "figures.json"
    module = f"tests.benchmarks.{module}"
    command = [sys.executable, "-m", module, "--output", str(output), "--scratch", str(tmp_path), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    results = json.loads(output.read_text())["results"]
    assert all(set(result) == FIELDS for result in results)
    assert [path.name for path in tmp_path.iterdir()] == ["reports"], "the scratch directory was not cleared"
    return {result["name"]: result for result in results}


@pytest.mark.slow
def test_publish_measures_everything(tmp_path: Path) -> None:
    results = run(tmp_path, "publish", "--quick")
    assert set(results) >= PUBLISH
    for name in PUBLISH:
        result = results[name]
        assert result["ours"] > 0 and result["rival"] > 0 and result["rival_name"] and result["conditions"]["rows"]
        by_unit = {"rows/s": result["ours"] / result["rival"]}
        ratio = by_unit.get(result["unit"], result["rival"] / result["ours"])
        assert math.isclose(result["ratio"], ratio), name
        if result["unit"] != "bytes/row":
            assert result["conditions"]["rounds"] >= MIN_ROUNDS
    assert results["materialize_different_rows"]["ours"] == 0


@pytest.mark.slow
def test_the_large_table_goes_from_publishing_to_retiring(tmp_path: Path) -> None:
    results = run(tmp_path, "publish_100m", "--rows", "20000")
    assert set(results) >= PUBLISH_100M and results["different_rows"]["ours"] == 0
    for name in ("materialize_peak_memory", "bytes_per_row"):
        assert math.isclose(results[name]["ratio"], results[name]["ours"] / results[name]["rival"])


@pytest.mark.slow
def test_online_measures_a_lookup_against_an_echo(tmp_path: Path) -> None:
    results = run(tmp_path, "online", "--quick", "--only", "lookup512_p50_vs_grpc_echo")
    assert set(results) == ONLINE
    for result in results.values():
        assert math.isclose(result["ratio"], result["ours"] / result["rival"])
        assert result["conditions"]["rounds"] >= MIN_ROUNDS
    said = results["lookup512_p50_vs_grpc_echo"]["conditions"]
    assert set(said["rounds_us"]) == set(KINDS), "each client asked"
    median = {kind: statistics.median(rounds) for kind, rounds in said["rounds_us"].items()}
    result = results["lookup512_p50_vs_grpc_echo"]
    assert math.isclose(result["ratio"], median["ours"] / median["echo"])


def test_sides_take_turns_and_the_first_turn_does_not_count() -> None:
    said: list[str] = []
    sides = [Side(name, lambda _, name=name: said.append(name), after=lambda: said.append("|")) for name in "ab"]
    timings = interleave(sides, rounds=3, label="test")
    assert "".join(said) == "b|a|" "a|b|" "b|a|" "a|b|"
    assert [len(timing.rounds) for timing in timings.values()] == [3, 3] and list(timings) == ["a", "b"]


def test_no_ratio_comes_from_few_rounds() -> None:
    sides = [Side(name, lambda _: None) for name in ("ours", "theirs")]
    few = interleave(sides, rounds=MIN_ROUNDS - 1, label="test")
    with pytest.raises(InvalidConfig, match="expected at least 5 rounds, got 4"):
        speeds_compared("x", ours=few["ours"], rival=few["theirs"])
    enough = interleave(sides, rounds=MIN_ROUNDS, label="test")
    assert speeds_compared("x", ours=enough["ours"], rival=enough["theirs"]).unit == "us"


def test_an_interval_counts_rounds_not_calls() -> None:
    """Golden: log-normal rounds of known spread; calls of a round that are all the same make it no narrower."""
    random, rounds = np.random.default_rng(0), 200
    noise = np.exp(random.normal(0, 0.1, rounds))
    for calls in (1, 50):
        ours = Timing("a", tuple((1.1 * each,) * calls for each in noise))
        rival = Timing("b", ((1.0,) * calls,) * rounds)
        low, high = interval_of_ratio(ours, rival, lambda timing: float(np.mean(timing.turns)))
        half = 1.96 * np.std(1.1 * noise) / rounds**0.5  # of a mean
        assert low < np.mean(1.1 * noise) < high and math.isclose(high - low, 2 * half, rel_tol=0.15)
    together = Timing("b", tuple((each,) for each in noise))  # what slows both is no uncertainty of their ratio
    low, high = interval_of_ratio(Timing("a", tuple((1.1 * each,) for each in noise)), together, lambda t: t.seconds)
    assert math.isclose(low, 1.1) and math.isclose(high, 1.1)


def test_a_ratio_by_round_is_not_moved_by_what_slows_both_sides() -> None:
    speed = np.random.default_rng(0).choice([45.0, 65.0], 20)
    ratio, interval = ratio_by_round(0.9 * speed, speed)
    assert math.isclose(ratio, 0.9) and np.allclose(interval, 0.9)


def test_the_interval_of_a_ratio_by_round() -> None:
    """Golden: the standard error of a median of normal values is sqrt(pi / 2 / n) of their deviation."""
    rates = np.random.default_rng(0).normal(50, 5, 400)
    ratio, (low, high) = ratio_by_round(rates, np.full(400, 50.0))
    assert low < 1 < high and math.isclose(ratio, np.median(rates) / 50)
    assert math.isclose(high - low, 2 * 1.96 * 0.1 * (math.pi / 2 / 400) ** 0.5, rel_tol=0.25)


def test_the_99th_percentile_is_of_all_calls() -> None:
    timing = Timing("a", (tuple(range(50)), tuple(range(50, 100)), tuple(range(100, 200))))
    assert timing.p99 == 198 and timing.rounds == (24.5, 74.5, 149.5) and timing.calls == 50


def test_results_of_other_names_stay(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_results(path, [measured("a", ours=1, unit="s"), measured("b", ours=1, unit="s")])
    write_results(path, [bounded("b", ours=1, at_most=4, unit="s")])
    assert [(line["name"], line["ratio"]) for line in json.loads(path.read_text())["results"]] == [
        ("a", None), ("b", 0.25)
    ]


@pytest.mark.parametrize("rows", [1, 3, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_synthetic_ids_are_distinct_ascending_and_of_64_bits(rows: int) -> None:
    ids = np.concatenate(list(ascending_ids(rows, np.random.default_rng(0))))
    assert len(ids) == rows and (ids[1:] > ids[:-1]).all()
    if rows > 100:
        assert ids[0] < -(2**62) and ids[-1] > 2**62 and len(np.unique(ids & 0xFFFF)) > 60_000


def test_synthetic_rows_can_be_published() -> None:
    packed = packed_rows(1000, np.random.default_rng(0))
    floats = codec("int4").decode(packed, DIM)
    assert np.isfinite(floats).all() and len(np.unique(packed, axis=0)) == 1000


def test_memory_of_a_child_is_counted_and_a_failure_is_an_error(tmp_path: Path) -> None:
    hold = "import time; b = bytearray(64 << 20); b[::4096] = b'x' * len(b[::4096]); time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    watched = run_watched([sys.executable, "-c", parent], cwd=tmp_path)
    assert 64 << 20 < watched.peak_bytes < 512 << 20
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_watched([sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path)
    assert not list(tmp_path.iterdir())
