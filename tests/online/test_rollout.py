"""The rollout: order, invariant, refusals, resumption after a crash at any step, and all of it under live traffic."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from online.client import RankClient, open_channel
from online.proto import admin_pb2, admin_pb2_grpc
from online.rollout import CpuHost, FleetStatus, InvariantViolated, Rollout
from pipelines.contracts.errors import IntegrityError, StalePretraining, VersionConflict, VersionNotFound
from pipelines.contracts.freshness import FreshnessLimits
from pipelines.publish import publish
from tests.releases import write_candidate

STEPS = 6


@pytest.fixture
def fleet(own_workspace, host_cpu_tier, host_ranker):
    """A CPU tier and a ranker that serve version 1 of a workspace of their own."""
    tier = host_cpu_tier(own_workspace.workspace, (1,))
    return own_workspace.workspace, tier, host_ranker(own_workspace, [tier.address], (1,))


def begin(fleet, to: int = 2) -> Rollout:
    workspace, tier, ranker = fleet
    return Rollout.begin_or_resume(workspace, to, cpu_tiers=[tier.admin_address], rankers=[ranker.admin_address])


def versions_of(fleet) -> tuple[list[int], list[int]]:
    _, tier, ranker = fleet
    return [entry.version for entry in tier.state.status().versions], sorted(ranker.state.pin())


def test_three_phases_in_order(fleet) -> None:
    rollout = begin(fleet)
    seen = []
    for step, _ in rollout.walk():
        seen.append((step.phase, step.action, step.on, step.version, *versions_of(fleet)))
    assert seen == [
        (1, "load", "ranker", 2, [1], [1, 2]),
        (2, "load", "cpu-tier", 2, [1, 2], [1, 2]),
        (2, "promote", "cpu-tier", 2, [1, 2], [1, 2]),
        (3, "drain", "cpu-tier", 1, [1, 2], [1, 2]),
        (3, "unload", "cpu-tier", 1, [2], [1, 2]),
        (3, "unload", "ranker", 1, [2], [2]),
    ]
    timeline = json.loads(rollout.timeline.read_text())
    assert timeline["finished"] and [step["phase"] for step in timeline["steps"]] == [1, 2, 2, 3, 3, 3]
    assert all(step["started"] <= step["finished"] for step in timeline["steps"])
    assert [versions_of(fleet) for _ in begin(fleet, to=1).walk()][-1] == ([1], [1])  # and back


@pytest.mark.parametrize("crash_after", range(STEPS))
def test_a_controller_that_dies_after_any_step_is_resumed(fleet, crash_after) -> None:
    walk = begin(fleet).walk()
    for _ in range(crash_after):
        next(walk)
    walk.close()
    again = begin(fleet)
    assert len(again.resumed) == 1
    assert sum(step.finished is not None for step in again.steps) == crash_after
    assert len(list(again.walk())) == STEPS
    assert versions_of(fleet) == ([2], [2])


def test_a_step_that_took_effect_before_the_crash_is_not_repeated(fleet) -> None:
    rollout = begin(fleet)
    rollout.steps[0].started = "2011-01-01T00:00:00+00:00"
    rollout._write()  # died between asking the ranker and noting that it answered
    fleet[2].state.load(2)
    assert next(begin(fleet).walk())[0].started == "2011-01-01T00:00:00+00:00"


def test_it_refuses_before_any_step(fleet, own_workspace) -> None:
    workspace = fleet[0]
    with pytest.raises(VersionNotFound, match="version 9"):
        begin(fleet, to=9)
    kept = workspace.root / "kept"
    shutil.move(workspace.segment(2, "item.kge"), kept)
    with pytest.raises(VersionNotFound, match="materialize"):
        begin(fleet)
    shutil.move(kept, workspace.segment(2, "item.kge"))
    weights = workspace.versions.path(2) / "upper" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        begin(fleet)
    weights.write_bytes(original)
    assert versions_of(fleet) == ([1], [1]) and not (workspace.root / "rollout").exists()


@pytest.mark.slow
def test_stale_pretraining_is_refused_before_any_step_unless_forced(fleet, own_workspace, tmp_path, caplog) -> None:
    workspace, tier, ranker = fleet
    candidate = write_candidate(tmp_path / "stale", seed=3)
    release = json.loads((candidate / "release.json").read_text())
    release["windows"]["pretrain"] = ["2010-06-01", "2010-07-01"]  # 274 days before fine-tuning
    (candidate / "release.json").write_text(json.dumps(release))
    publish(workspace, candidate, limits=FreshnessLimits(refuse_days=300))
    own_workspace.apply()
    own_workspace.materialize([spec.view_name(3) for spec in workspace.versions.manifest(3).tables])
    hosts = {"cpu_tiers": [tier.admin_address], "rankers": [ranker.admin_address]}
    with pytest.raises(StalePretraining, match="version 3 ends 2010-07-01, 274 days"):
        begin(fleet, to=3)
    assert versions_of(fleet) == ([1], [1]) and not (workspace.root / "rollout").exists()
    caplog.clear()
    walk = Rollout.begin_or_resume(workspace, 3, **hosts, limits=FreshnessLimits(forced=True)).walk()
    assert "274 days" in caplog.text
    next(walk)
    assert len(list(begin(fleet, to=3).walk())) == STEPS  # resuming does not ask again
    assert versions_of(fleet) == ([3], [3])


def test_another_rollout_has_to_wait(fleet) -> None:
    next(begin(fleet).walk())
    with pytest.raises(VersionConflict, match="unfinished"):
        begin(fleet, to=1)


def test_a_state_that_cannot_be_read_is_said_so(fleet) -> None:
    rollout = begin(fleet)
    rollout.path.write_text("{")
    with pytest.raises(IntegrityError, match="Delete it"):
        begin(fleet)


def test_a_cpu_host_that_answers_what_a_ranker_cannot_run_stops_it(fleet) -> None:
    fleet[1].state.load(2)  # by hand, before any ranker has the model
    with pytest.raises(InvariantViolated, match="can answer versions"):
        begin(fleet)


def test_a_host_that_was_changed_meanwhile_stops_the_walk(fleet) -> None:
    walk = begin(fleet).walk()
    next(walk)
    fleet[2].state.unload(2)
    with pytest.raises(InvariantViolated, match="cannot be taken"):
        next(walk)
    assert versions_of(fleet)[0] == [1]
    assert len(list(begin(fleet).walk())) == STEPS  # running it again loads the ranker anew


def test_the_invariant_compares_manifests_not_only_numbers() -> None:
    cpu = CpuHost(loaded={1: "a", 2: "b"}, answering=frozenset({1}), preferred=1)
    FleetStatus({"cpu": cpu}, {"ranker": {1: "a"}}).check()
    with pytest.raises(InvariantViolated):
        FleetStatus({"cpu": cpu}, {"ranker": {1: "other"}}).check()
    with pytest.raises(InvariantViolated):
        FleetStatus({"cpu": cpu}, {"good": {1: "a"}, "bad": {2: "b"}}).check()


def wait_for_answers(ranker, *, version: int, count: int) -> None:
    """Wait until the ranker has answered so many requests from a version; bounded."""
    deadline = time.monotonic() + 60
    with open_channel(ranker.port("admin")) as channel:
        admin = admin_pb2_grpc.RankerAdminStub(channel)
        while True:
            answered = {model.version: model.answered for model in admin.Status(admin_pb2.StatusRequest()).models}
            if answered.get(version, 0) >= count:
                return
            assert time.monotonic() < deadline, f"only {answered}"
            time.sleep(0.05)


@pytest.mark.slow
def test_under_live_traffic_with_the_controller_killed_and_two_versions(own_workspace, launch) -> None:
    """Four processes as a user runs them: no request fails, and every answer is recomputed for the version it names."""
    workspace = own_workspace.workspace
    tier = launch(workspace, "serve", "cpu-tier", "--versions", "1").wait_ready()
    ranker = launch(workspace, "serve", "ranker", "--versions", "1", "--cpu-tier", tier.port("lookup")).wait_ready()
    hosts = ("--cpu-tier", tier.port("admin"), "--ranker", ranker.port("admin"))
    report = workspace.root / "load.json"
    traffic = launch(
        workspace, "load", "--ranker", ranker.port("rank"), "--version", "1", "--requests", "300", "--seconds", "120",
        "--concurrency", "2", "--candidates", "8", "--out", report,
    )
    client = RankClient(ranker.port("rank"))
    wait_for_answers(ranker, version=1, count=150)

    killed = launch(workspace, "rollout", "--to", "2", *hosts, "--pause", "30")
    assert "rollout to version 2, 6 steps" in killed.process.stdout.readline()
    assert "load version 2 on ranker" in killed.process.stdout.readline()
    killed.kill()  # SIGKILL, between phases 1 and 2
    assert client.rank(1, np.array([1])).version == 1
    status, out, errors = launch(workspace, "rollout", "--to", "2", *hosts).finish()
    assert status == 0, errors
    assert "resuming the rollout to version 2, 1 of 6 steps" in out and "is served everywhere" in out
    assert client.rank(1, np.array([1])).version == 2
    client.close()
    wait_for_answers(ranker, version=2, count=150)

    traffic.process.send_signal(signal.SIGTERM)
    status, _, errors = traffic.finish(timeout_s=90)
    assert status == 0, errors
    result = json.loads(report.read_text())
    assert result["requests"] >= 300
    assert (result["failed"], result["mixed_version"]) == (0, 0), result["first_failures"]
    assert set(result["versions_seen"]) == {"1", "2"}
    assert result["checked"] == result["requests"] == result["distinguishable"]
    assert set(result["manifests"].values()) == {workspace.versions.manifest(v).sha256 for v in (1, 2)}
    assert (ranker.stop(), tier.stop()) == (0, 0)
