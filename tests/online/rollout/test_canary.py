"""Canaries: the verdict from counts, and whole ones on real servers whose second model is good, slow, or fails."""

import dataclasses
import json
import math
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from online.proto.admin_pb2 import LoadedModel, RankerStatus
from online.ranking.client import RankClient
from online.ranking.scorer import Scorer
from online.rollout.canary import CanaryLimits, Counts, Outcome, Tally, p95_range, quantile, verdict, wilson
from online.rollout.controller import Rollout, RolloutHalted
from online.rpc_error import RpcError
from pipelines.contracts.errors import InvalidConfig, Unavailable, VersionConflict
from pipelines.contracts.workspace import Workspace
from tests.waiting import PATIENCE_S, FakeClock, joined, until

BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0)
LIMITS = CanaryLimits(0.1, seconds=60, requests=200, max_failures=0.01, max_slower=1.5)


def counted(answered: int, failed: int = 0, *, bin_: int = 1) -> Counts:
    return Counts(answered, failed, tuple(answered * (i == bin_) for i in range(len(BOUNDS) + 1)))


def judged(old: Counts, new: Counts, *, unversioned: int = 0, elapsed_s: float = 61.0, limits=LIMITS):
    tally = Tally({1: old, 2: new}, unversioned, BOUNDS)
    return verdict(tally, old=1, new=2, limits=limits, elapsed_s=elapsed_s)


def test_a_good_version_passes_when_time_and_requests_are_enough() -> None:
    assert judged(counted(2000), counted(200)).outcome is Outcome.PASS
    assert judged(counted(2000), counted(200), elapsed_s=59).outcome is Outcome.WATCH
    assert judged(counted(2000), counted(199)).outcome is Outcome.WATCH
    assert judged(counted(199), counted(2000)).outcome is Outcome.WATCH


def test_too_few_requests_halt_it_in_the_end() -> None:
    result = judged(counted(2000), counted(3), elapsed_s=600)
    assert result.outcome is Outcome.HALT and "too few to tell" in result.reason
    assert "version 2: 3 requests" in result.reason
    assert judged(counted(2000), counted(3), elapsed_s=599).outcome is Outcome.WATCH
    at_once = dataclasses.replace(LIMITS, seconds=0)  # requests have ten seconds even so
    assert judged(counted(2000), counted(3), elapsed_s=9.9, limits=at_once).outcome is Outcome.WATCH
    assert judged(counted(2000), counted(3), elapsed_s=10, limits=at_once).outcome is Outcome.HALT


@pytest.mark.parametrize(
    ("new", "elapsed_s", "outcome"),
    [
        (counted(200, 2), 61, Outcome.PASS),  # 0.99 %
        (counted(200, 3), 61, Outcome.HALT),
        (counted(200, 3), 30, Outcome.WATCH),  # over the limit, but not surely
        (counted(0, 1), 1, Outcome.HALT),  # surely at least 10 %
        (counted(10, 1), 1, Outcome.WATCH),
        (counted(10, 10), 1, Outcome.HALT),
    ],
)
def test_failures(new, elapsed_s, outcome) -> None:
    result = judged(counted(2000), new, elapsed_s=elapsed_s)
    assert result.outcome is outcome, result
    if outcome is Outcome.HALT:
        assert "of its requests failed, over the 1.00% allowed" in result.reason


def test_the_old_versions_own_failures_do_not_halt_it() -> None:
    assert judged(counted(2000, 500), counted(200)).outcome is Outcome.PASS


def test_failures_before_any_version_was_known_are_held_against_it() -> None:
    assert judged(counted(2000), counted(200), unversioned=2).outcome is Outcome.PASS
    result = judged(counted(2000), counted(200), unversioned=3)
    assert result.outcome is Outcome.HALT and "3 failed before any version was known" in result.reason
    assert judged(counted(2000), counted(298), unversioned=3).outcome is Outcome.PASS  # 3 of 301 requests
    # every other one of its few, which are hardly any of all
    assert judged(counted(39_600), counted(200), unversioned=200, elapsed_s=5).outcome is Outcome.HALT
    assert judged(counted(2000), counted(199, 1), unversioned=2).outcome is Outcome.HALT


def test_latencies_beyond_the_slowest_bin_do_not_pass_it() -> None:
    slow = len(BOUNDS)
    result = judged(counted(2000, bin_=slow), counted(200, bin_=slow))
    assert result.outcome is Outcome.HALT and "do not tell" in result.reason
    assert judged(counted(2000), counted(200, bin_=slow)).outcome is Outcome.HALT
    assert judged(counted(2000, bin_=slow), counted(200)).outcome is Outcome.HALT


@pytest.mark.parametrize(
    ("bin_", "answered", "elapsed_s", "outcome"),
    [
        (1, 200, 61, Outcome.PASS),
        (2, 200, 61, Outcome.HALT),  # 3.9 ms for 1.95 ms
        (2, 3, 5, Outcome.HALT),  # nearly all of the old one's lie below 2 ms, all of these above it
        (5, 200, 61, Outcome.HALT),  # beyond all bins
        (0, 200, 61, Outcome.PASS),  # faster
    ],
)
def test_slowness(bin_, answered, elapsed_s, outcome) -> None:
    new = counted(answered, bin_=bin_)
    # 5 of 2,000 lie in the next bin: what the tail is like does not matter.
    old = Counts(2000, 0, (0, 1995, 5, 0, 0, 0))
    result = judged(old, new, elapsed_s=elapsed_s, limits=dataclasses.replace(LIMITS, max_slower=1.02))
    assert result.outcome is outcome, result


def test_rankers_that_count_no_latencies_cannot_pass_it() -> None:
    result = judged(Counts(2000), Counts(200))
    assert result.outcome is Outcome.HALT and "none or beyond the slowest bin" in result.reason


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"share": 1.0}, {"share": 0.1, "requests": 0}, {"share": 0.1, "max_slower": 0.0}]
)
def test_limits_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(InvalidConfig):
        CanaryLimits(**wrong)


counts = st.builds(
    lambda latency, failed: Counts(sum(latency), failed, tuple(latency)),
    st.lists(st.integers(0, 1000), min_size=len(BOUNDS) + 1, max_size=len(BOUNDS) + 1), st.integers(0, 1000),
)


@given(counts, counts, st.integers(0, 100), st.floats(0, 1e4))
def test_a_verdict_keeps_its_promises(old, new, unversioned, elapsed_s) -> None:
    result = judged(old, new, unversioned=unversioned, elapsed_s=elapsed_s)
    assert result.reason
    if result.outcome is Outcome.PASS:
        assert elapsed_s >= LIMITS.seconds and min(old.requests, new.requests) >= LIMITS.requests
        assert new.failed + unversioned <= LIMITS.max_failures * (new.requests + unversioned)
        assert not quantile(new.latency, BOUNDS, 0.95) > LIMITS.max_slower * quantile(old.latency, BOUNDS, 0.95)
    if result.outcome is Outcome.WATCH and min(old.requests, new.requests) < LIMITS.requests:
        assert elapsed_s < 10 * LIMITS.seconds
    if new.failed == new.requests >= 20:
        assert result.outcome is Outcome.HALT


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_wilson_holds_the_share_and_narrows(failed, others) -> None:
    low, high = wilson(failed, failed + others)
    assert 0 <= low <= high <= 1
    if failed + others:
        assert low <= failed / (failed + others) + 1e-9 and failed / (failed + others) - 1e-9 <= high
        lower, higher = wilson(10 * failed, 10 * (failed + others))
        assert higher - lower <= high - low + 1e-9


@given(counts)
def test_quantiles_rise_and_the_p95_lies_in_its_range(sample) -> None:
    if not sum(sample.latency):
        assert math.isnan(quantile(sample.latency, BOUNDS, 0.5))
        return
    values = [quantile(sample.latency, BOUNDS, q) for q in (0.0, 0.25, 0.5, 0.95, 1.0)]
    assert values == sorted(values)
    low, high = p95_range(sample, BOUNDS)
    assert low <= quantile(sample.latency, BOUNDS, 0.95) <= high


def ranker(failed: int = 0, **versions: Counts) -> RankerStatus:
    return RankerStatus(
        latency_bounds_ms=BOUNDS, failed=failed,
        models=[
            LoadedModel(version=int(name[1:]), answered=c.answered, failed=c.failed, latency_counts=c.latency)
            for name, c in versions.items()
        ],
    )


def test_a_tally_counts_what_came_since_over_all_rankers() -> None:
    tally = Tally()
    tally.look({"a": ranker(5, v1=counted(100, 7)), "b": ranker(v1=counted(50))})
    assert (tally.of(1), tally.unversioned) == (Counts(), 0)
    tally.look({"a": ranker(6, v1=counted(110, 8)), "b": ranker(v1=counted(53), v2=counted(2, bin_=3))})
    assert (tally.of(1), tally.of(2), tally.unversioned) == (counted(13, 1), counted(2, bin_=3), 1)
    assert tally.restarts == 0


def test_a_tally_notices_a_ranker_that_counts_from_zero_again() -> None:
    tally = Tally()
    tally.look({"a": ranker(4, v1=counted(100))})
    tally.look({"a": ranker(4, v1=counted(120))})
    tally.look({"a": ranker(1, v1=counted(9), v2=counted(1))})
    tally.look({"a": ranker(1, v1=counted(10), v2=counted(1))})
    assert (tally.of(1), tally.of(2), tally.unversioned, tally.restarts) == (counted(30), counted(1), 1, 1)


@pytest.mark.parametrize("again", [
    ranker(4, v1=counted(200, 0)), ranker(0, v1=counted(200, 3)), ranker(4, v1=counted(99, 3)),
    ranker(4, v1=Counts(200, 3, (0, 99, 101, 0, 0, 0))), ranker(4, v1=counted(200, 3, bin_=2)),
], ids=["failed", "unversioned", "answered", "latency", "latencies"])  # fmt: skip
def test_any_number_that_falls_is_a_restart_and_all_are_counted_from_zero(again) -> None:
    tally = Tally()
    tally.look({"a": ranker(1, v1=counted(100, 1))})
    tally.look({"a": ranker(3, v1=counted(100, 2))})
    tally.look({"a": again})
    counts = again.models[0]
    assert tally.restarts == 1 and tally.unversioned == 2 + again.failed
    assert (tally.of(1).answered, tally.of(1).failed) == (counts.answered, 1 + counts.failed)


def test_a_ranker_that_loads_or_unloads_a_version_was_not_restarted() -> None:
    tally = Tally()
    tally.look({"a": ranker(v1=counted(100))})
    tally.look({"a": ranker(v1=counted(101), v2=counted(1))})
    tally.look({"a": ranker(v2=counted(4))})
    assert (tally.of(1), tally.of(2), tally.restarts) == (counted(1), counted(4), 0)


def test_rankers_of_different_bins_are_not_added_up() -> None:
    with pytest.raises(InvalidConfig, match="same Facet"):
        Tally().look({"a": ranker(), "b": RankerStatus(latency_bounds_ms=[1.0, 3.0])})


# Whole canaries.


class Failing(torch.nn.Module):
    """An upper model that fails."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.config = model.config

    def forward(self, *inputs):
        raise RuntimeError("a defect of this model")


class Tried(NamedTuple):
    """The hosts of a rollout, with requests coming in all the time, some of them in every sleep of its controller."""

    workspace: Workspace
    tier: Any
    ranker: Any
    clock: FakeClock


SLOW_MS, USUAL_MS = 50.0, 2.0
REQUESTS_PER_SLEEP = 20


@pytest.fixture
def under_traffic(own_workspace, host_cpu_tier, host_ranker, monkeypatch):
    """Call with how version 2 is worse, if it is. What the ranker takes for an answer is not measured but said here."""
    stop, sent = threading.Event(), []
    threads: list[threading.Thread] = []

    def ask(address: str) -> None:
        client = RankClient(address, timeout_s=PATIENCE_S)
        while not stop.is_set():
            with suppress(RpcError):
                client.rank(1, np.array([1, 2]), request_id=f"0-{len(sent)}")
            sent.append(1)
        client.close()

    def some_requests() -> None:
        before = len(sent)
        until(lambda: len(sent) >= before + REQUESTS_PER_SLEEP)

    def start(worse: str | None = None) -> Tried:
        workspace = own_workspace.workspace
        tier = host_cpu_tier(workspace, (1,))
        ranker = host_ranker(own_workspace, [tier.address], (1,))
        count = ranker.state.count_answer

        def count_answer(version: int, total_ms: float) -> None:
            assert total_ms > 0
            count(version, SLOW_MS if (version, worse) == (2, "slow") else USUAL_MS)

        def load(version: int) -> Scorer:
            scorer = Scorer.load(workspace, version, device="cpu")
            fails = (version, worse) == (2, "fails")
            return dataclasses.replace(scorer, model=Failing(scorer.model)) if fails else scorer

        monkeypatch.setattr(ranker.state, "count_answer", count_answer)
        monkeypatch.setattr(ranker.state, "_load_scorer", load)
        threads.append(threading.Thread(target=ask, args=(ranker.address,), name="traffic"))
        threads[-1].start()
        return Tried(workspace, tier, ranker, FakeClock(meanwhile=some_requests))

    yield start
    stop.set()
    joined(*threads)


def begin(fleet: Tried, **limits) -> Rollout:
    canary = CanaryLimits(0.3, **{"seconds": 5.0, "requests": 20, "max_slower": 3.0} | limits)
    hosts = {"cpu_tiers": [fleet.tier.admin_address], "rankers": [fleet.ranker.admin_address]}
    return Rollout.begin_or_resume(fleet.workspace, 2, **hosts, canary=canary, clock=fleet.clock)


def held(fleet: Tried) -> tuple[list[int], int, list[int]]:
    status = fleet.tier.state.status()
    return [entry.version for entry in status.versions], status.preferred, sorted(fleet.ranker.state.pin())


def test_a_canary_that_is_as_good_is_promoted_when_its_time_is_over(under_traffic) -> None:
    fleet = under_traffic()
    said: list[str] = []
    steps = begin(fleet).walk(say=said.append)
    began = fleet.clock.now()
    actions = [(record.step.action, fleet.clock.now() - began) for record, _ in steps]
    assert [action for action, _ in actions] == ["load", "load", "canary", "promote", "drain", "unload", "unload"]
    assert actions[2][1] == 0 and actions[3][1] >= 5.0
    assert held(fleet) == ([2], 2, [2])
    assert "30.00% of the requests" in said[0] and "version 2: " in said[-1]
    assert 3 <= len(said) <= 5, "a line every two seconds, and the last"


@pytest.mark.parametrize(("worse", "reason"), [("fails", "of its requests failed"), ("slow", "times as slow")])
def test_a_canary_that_is_worse_is_taken_back(under_traffic, worse, reason) -> None:
    fleet = under_traffic(worse)
    rollout = begin(fleet)
    actions: list[str] = []
    with pytest.raises(RolloutHalted, match="tried and taken back") as halted:
        for record, _ in rollout.walk():
            actions.append(record.step.action)
    assert reason in halted.value.got
    assert actions == ["load", "load", "canary", "promote", "drain", "unload", "unload"]
    assert held(fleet) == ([1], 1, [1])
    record = json.loads(rollout.state.timeline.read_text())
    assert record["stage"] == "taken back" and reason in record["halted"]


def test_a_canary_that_is_worse_can_be_left_as_it_is(under_traffic) -> None:
    fleet = under_traffic("fails")
    with pytest.raises(RolloutHalted, match="facet rollout --back"):
        list(begin(fleet).walk(rollback=False))
    assert held(fleet) == ([1, 2], 1, [1, 2]) and fleet.tier.state.status().canary == 2
    assert len(list(Rollout.take_back(fleet.workspace).walk())) == 4
    assert held(fleet) == ([1], 1, [1])


def test_a_host_that_goes_away_in_the_canary_halts_it(under_traffic) -> None:
    fleet = under_traffic()
    walk = begin(fleet, seconds=60.0).walk(patience_s=1.0)
    for _ in range(3):
        next(walk)
    fleet.tier.admin.stop().wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="did not answer"):
        list(walk)
    state = Rollout.unfinished(fleet.workspace)
    assert state.plan.turned and "did not answer" in state.halted  # it goes on backwards when the host is there again


def test_a_controller_that_dies_in_the_canary_begins_it_anew(under_traffic) -> None:
    fleet = under_traffic()
    walk = begin(fleet).walk()
    for _ in range(3):
        next(walk)
    walk.close()
    assert fleet.tier.state.status().canary == 2
    with pytest.raises(VersionConflict, match="CanaryLimits"):  # other limits than it was begun with
        begin(fleet, requests=21)
    hosts = {"cpu_tiers": [fleet.tier.admin_address], "rankers": [fleet.ranker.admin_address]}
    walk = Rollout.begin_or_resume(fleet.workspace, 2, **hosts, clock=fleet.clock).walk()
    assert [record.step.action for record, _ in walk] == ["promote", "drain", "unload", "unload"]
    assert held(fleet) == ([2], 2, [2]) and sum(fleet.clock.slept) >= 5.0, "all of its time again"


def test_a_canary_needs_a_version_to_be_compared_with(own_workspace, host_cpu_tier, host_ranker) -> None:
    tier = host_cpu_tier(own_workspace.workspace, (2,))
    ranker = host_ranker(own_workspace, [tier.address], (2,))
    with pytest.raises(InvalidConfig, match="to compare the new one with"):
        begin(Tried(own_workspace.workspace, tier, ranker, FakeClock()))
