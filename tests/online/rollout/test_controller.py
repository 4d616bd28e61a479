"""The rollout: order, invariant, refusals, resumption after a crash at any step, and all of it under live traffic."""

import json
import shutil

import grpc
import pytest
from click.testing import CliRunner

from online.commands.rollout import rollout as rollout_command
from online.lookup.service import CpuTierAdminService
from online.lookup.shards import Shard
from online.proto import admin_pb2_grpc
from online.rollout.controller import Rollout
from online.rollout.fleet_status import InvariantViolated
from online.rpc.channel import open_channel
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import (
    IntegrityError,
    InvalidConfig,
    NotPrepared,
    StalePretraining,
    Unavailable,
    VersionConflict,
    VersionNotFound,
)
from pipelines.contracts.freshness import FreshnessLimits
from pipelines.publish import publish
from tests.releases import retell_windows, write_release
from tests.waiting import PATIENCE_S, FakeClock

STEPS = 6


@pytest.fixture
def fleet(own_workspace, host_cpu_tier, host_ranker):
    """A CPU tier and a ranker that serve version 1 of a workspace of their own."""
    tier = host_cpu_tier(own_workspace.workspace, (1,))
    return own_workspace.workspace, tier, host_ranker(own_workspace, [tier.address], (1,))


def begin(fleet, to: int = 2, **options) -> Rollout:
    workspace, tier, ranker = fleet
    hosts = {"cpu_tiers": [tier.admin_address], "rankers": [ranker.admin_address]}
    return Rollout.begin_or_resume(workspace, to, **hosts, **{"clock": FakeClock()} | options)


def admin_of(tier, *, port: int) -> Endpoint:
    """The admin service of a host that is there again."""
    admin = Endpoint("admin", "127.0.0.1", port, 2, audited=True, limits=Limits().for_admin())
    admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(tier.state), admin.server)
    return admin


def versions_of(fleet) -> tuple[list[int], list[int]]:
    _, tier, ranker = fleet
    return [entry.version for entry in tier.state.status().versions], sorted(ranker.state.pin())


def test_three_phases_in_order(fleet) -> None:
    rollout = begin(fleet)
    seen = []
    for record, _ in rollout.walk():
        step = record.step
        seen.append((step.phase, step.action, step.on, step.version, *versions_of(fleet)))
    assert seen == [
        (1, "load", "ranker", 2, [1], [1, 2]),
        (2, "load", "cpu-tier", 2, [1, 2], [1, 2]),
        (2, "promote", "cpu-tier", 2, [1, 2], [1, 2]),
        (3, "drain", "cpu-tier", 1, [1, 2], [1, 2]),
        (3, "unload", "cpu-tier", 1, [2], [1, 2]),
        (3, "unload", "ranker", 1, [2], [2]),
    ]
    timeline = json.loads(rollout.state.timeline.read_text())
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
    assert len(again.state.resumed) == 1
    assert again.state.done == crash_after
    assert len(list(again.walk())) == STEPS - crash_after
    assert versions_of(fleet) == ([2], [2])


def test_a_step_that_took_effect_before_the_crash_is_asked_for_again_and_keeps_its_beginning(fleet) -> None:
    rollout = begin(fleet)
    record = rollout.state.begin(rollout.state.records[0].step)
    began = record.started
    fleet[2].state.load(2)  # died between asking the ranker and noting that it answered
    again = begin(fleet)
    assert again.state.plan.pending == (record.step,)
    assert next(again.walk())[0].started == began
    assert again.state.plan.pending == ()


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
    release = write_release(tmp_path / "stale", seed=3)
    retell_windows(release, pretrain=["2010-06-01", "2010-07-01"])  # 274 days before fine-tuning
    publish(workspace, release, limits=FreshnessLimits(refuse_days=300))
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
    walk.close()
    assert len(list(begin(fleet, to=3).walk())) == STEPS - 1  # resuming does not ask again
    assert versions_of(fleet) == ([3], [3])


def test_another_rollout_has_to_wait(fleet) -> None:
    next(begin(fleet).walk())
    with pytest.raises(VersionConflict, match="unfinished"):
        begin(fleet, to=1)


def test_a_state_that_cannot_be_read_is_said_so(fleet) -> None:
    rollout = begin(fleet)
    rollout.state.path.write_text("{")
    with pytest.raises(IntegrityError, match="Delete it"):
        begin(fleet)


def test_a_cpu_host_that_answers_what_a_ranker_cannot_run_stops_it(fleet) -> None:
    fleet[1].state.load(2)  # by hand, before any ranker has the model
    with pytest.raises(InvariantViolated, match="can answer version 2"):
        begin(fleet)


def test_a_host_that_lost_what_it_held_is_put_right(fleet) -> None:
    walk = begin(fleet).walk()
    next(walk)
    fleet[2].state.unload(2)  # as a ranker that was restarted by its old command line
    assert str(next(walk)[0].step).startswith("phase 1: load version 2 on ranker")
    assert [record.step.action for record, _ in walk] == ["load", "promote", "drain", "unload", "unload"]
    assert versions_of(fleet) == ([2], [2])


def test_a_cpu_host_that_came_back_as_it_once_was(fleet) -> None:
    tier = fleet[1]
    walk = begin(fleet).walk()
    for _ in range(STEPS - 2):
        next(walk)
    tier.state.load(1)  # was draining, before its unloading
    tier.state.promote(1)
    assert versions_of(fleet) == ([1, 2], [1, 2])
    assert [record.step.action for record, _ in walk] == ["promote", "drain", "unload", "unload"]
    assert versions_of(fleet) == ([2], [2])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_it_is_taken_back_from_wherever_it_is(fleet, steps) -> None:
    walk = begin(fleet).walk()
    for _ in range(steps):
        next(walk)
    walk.close()
    rollout = Rollout.take_back(fleet[0])
    taken = [str(record.step).split(" on ")[0] for record, _ in rollout.walk()]
    assert versions_of(fleet) == ([1], [1]) and fleet[1].state.status().preferred == 1
    whole = ["phase 2: promote version 1", "phase 2: drain version 2", "phase 2: unload version 2",
             "phase 1: unload version 2"]
    assert taken == {0: [], 1: whole[3:], 2: whole[1:], 3: whole}[steps]
    record = json.loads(rollout.state.timeline.read_text())
    assert rollout.state.timeline.name == "taken-back-from-2.json"
    assert record["stage"] == "taken back" and len(record["steps"]) == steps + len(taken)
    assert all(step["started"] and step["finished"] for step in record["steps"])
    with pytest.raises(NotPrepared, match="no rollout is under way"):
        Rollout.take_back(fleet[0])
    assert [versions_of(fleet) for _ in begin(fleet).walk()][-1] == ([2], [2])  # and it can be begun again


def test_it_is_not_taken_back_once_the_old_version_is_being_retired(fleet) -> None:
    walk = begin(fleet).walk()
    for _ in range(4):
        next(walk)
    walk.close()
    with pytest.raises(VersionConflict, match="roll out to version 1 instead"):
        Rollout.take_back(fleet[0])
    assert len(list(begin(fleet).walk())) == STEPS - 4


def test_a_taking_back_that_died_goes_on(fleet) -> None:
    walk = begin(fleet).walk()
    for _ in range(3):
        next(walk)
    walk.close()
    back = Rollout.take_back(fleet[0]).walk()
    next(back)
    back.close()
    assert [record.step.action for record, _ in begin(fleet).walk()] == ["drain", "unload", "unload"]
    assert versions_of(fleet) == ([1], [1])


def test_a_second_controller_is_refused(fleet) -> None:
    rollout = begin(fleet)
    walk = rollout.walk()
    next(walk)
    for other in (begin, lambda fleet: Rollout.take_back(fleet[0])):
        with pytest.raises(VersionConflict, match="another controller is at work"):
            other(fleet)
    with pytest.raises(VersionConflict, match="another controller is at work"):
        next(rollout.walk())
    walk.close()
    assert len(list(begin(fleet).walk())) == STEPS - 1


def test_a_host_that_is_away_is_waited_for(fleet, host_cpu_tier) -> None:
    workspace, tier, ranker = fleet
    clock = FakeClock()
    walk = begin(fleet, clock=clock).walk(patience_s=0.75, say=(said := []).append)
    next(walk)
    tier.admin.stop().wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="--change-hosts"):
        next(walk)
    assert len(said) == 1 and "waiting up to 0.75 s" in said[0] and clock.slept == [0.25] * 3
    with pytest.raises(Unavailable):
        list(begin(fleet).walk(patience_s=0.0))
    other = host_cpu_tier(workspace, (1,))  # in its place
    with pytest.raises(VersionConflict, match="--change-hosts"):
        begin((workspace, other, ranker))
    walk = begin((workspace, other, ranker), change_hosts=True).walk()
    assert [record.step.action for record, _ in walk] == ["load", "promote", "drain", "unload", "unload"]
    assert versions_of((workspace, other, ranker)) == ([2], [2])


def test_a_host_that_comes_back_in_time_is_gone_on_with(fleet) -> None:
    """Three absences, each of more than half of the patience: between them there was progress."""
    tier = fleet[1]
    clock, port, away = FakeClock(), tier.admin.port, [False]

    def come_back() -> None:
        if away.pop():
            clock.advance(600)
            tier.admin = admin_of(tier, port=port)
            tier.admin.start()
            with open_channel(tier.admin_address) as channel:  # its connection is that of all channels to the address
                grpc.channel_ready_future(channel).result(PATIENCE_S)
        away.append(False)

    clock.meanwhile = come_back
    walk = begin(fleet, clock=clock).walk(patience_s=1000)
    next(walk)
    for action in ("load", "promote", "drain"):
        tier.admin.stop().wait(PATIENCE_S)
        away[:] = [True]
        assert next(walk)[0].step.action == action
    list(walk)
    assert clock.now() > 2800 and versions_of(fleet) == ([2], [2])


def test_a_host_that_is_away_at_first_is_waited_for_too(fleet) -> None:
    clock = FakeClock()
    fleet[1].admin.stop().wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="did not answer"):
        begin(fleet, clock=clock, patience_s=0.5)
    assert clock.slept == [0.25] * 2 and not (fleet[0].root / "rollout").exists()


def test_a_dry_run_shows_the_hosts_that_it_would_go_on_with(fleet, host_cpu_tier) -> None:
    workspace, tier, ranker = fleet
    walk = begin(fleet).walk()
    next(walk)
    walk.close()
    tier.admin.stop().wait(PATIENCE_S)
    before, other = (workspace.root / "rollout" / "state.json").read_bytes(), host_cpu_tier(workspace, (1,))
    dry = command((workspace, other, ranker), "--to", "2", "--change-hosts", "--dry-run")
    assert dry.exit_code == 0 and f"cpu-tier {other.admin_address}" in dry.output, dry.output
    assert tier.admin_address not in dry.output
    assert (workspace.root / "rollout" / "state.json").read_bytes() == before


def test_a_canary_asked_for_too_late_is_refused(fleet) -> None:
    walk = begin(fleet).walk()
    next(walk)
    walk.close()
    refused = command(fleet, "--to", "2", "--canary", "0.05")
    assert isinstance(refused.exception, VersionConflict) and "hosts and canary" in str(refused.exception)
    assert len(list(begin(fleet).walk())) == STEPS - 1


def test_a_walk_that_is_resumed_still_pauses_before_the_old_version_is_retired(fleet) -> None:
    clock = FakeClock()
    walk = begin(fleet, clock=clock).walk(pause_s=30)
    for _ in range(3):
        next(walk)
    walk.close()
    assert clock.slept == [30] and versions_of(fleet) == ([1, 2], [1, 2])
    walk = begin(fleet, clock=clock).walk(pause_s=30)
    assert next(walk)[0].step.action == "drain" and clock.slept == [30, 30]
    list(walk)
    assert clock.slept == [30, 30]


def test_a_host_that_refuses_a_step_stops_it(fleet) -> None:
    workspace = fleet[0]
    walk = begin(fleet).walk()
    next(walk)
    segment = next(path for path in workspace.segment(2, "item.kge").iterdir() if path.suffix != ".json")
    original = segment.read_bytes()
    segment.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(RpcError) as refused:
        next(walk)
    assert refused.value.code is Code.INTEGRITY and versions_of(fleet) == ([1], [1, 2])
    segment.write_bytes(original)
    assert begin(fleet).state.plan.pending == ()
    assert len(list(begin(fleet).walk())) == STEPS - 1


def test_replicas_and_shards_are_all_needed(own_workspace, host_cpu_tier, host_ranker) -> None:
    """Rows everywhere before any host prefers them; preferred everywhere before any host drains."""
    workspace = own_workspace.workspace
    tiers = [host_cpu_tier(workspace, (1,), shard=Shard(index, 2)) for index in (0, 1)]
    ranker = host_ranker(own_workspace, [tiers[0].address], (1,))
    hosts = {"cpu_tiers": [tier.admin_address for tier in tiers], "rankers": [ranker.admin_address]}
    with pytest.raises(InvalidConfig, match="at least one host of every shard"):
        Rollout.begin_or_resume(workspace, 2, cpu_tiers=hosts["cpu_tiers"][:1], rankers=hosts["rankers"])
    rollout = Rollout.begin_or_resume(workspace, 2, **hosts)
    actions = [(record.step.action, record.step.on) for record, _ in rollout.walk()]
    rows = [(action, "cpu-tier") for action in ("load", "promote", "drain", "unload") for _ in tiers]
    assert actions == [("load", "ranker"), *rows, ("unload", "ranker")]


def command(fleet, *options: str):
    workspace, tier, ranker = fleet
    hosts = ["--cpu-tier", tier.admin_address, "--ranker", ranker.admin_address]
    return CliRunner().invoke(rollout_command, [*(hosts if "--to" in options else []), *options], obj=workspace)


def test_the_command_shows_what_it_would_do_does_it_and_takes_it_back(fleet) -> None:
    workspace = fleet[0]
    dry = command(fleet, "--to", "2", "--canary", "0.05", "--dry-run").output.splitlines()
    assert dry[0] == "invariant: every version a CPU host answers is on every ranker"
    assert [line.split()[:2] for line in dry[1:]] == [["holds", "phase"]] * 2 + [["to", "do"]] * 7
    assert "canary version 2" in dry[5] and "5.00% of the requests" in dry[5]
    assert versions_of(fleet) == ([1], [1]) and not (workspace.root / "rollout").exists()

    walk = begin(fleet).walk()
    for _ in range(3):
        next(walk)
    walk.close()
    assert [line.split()[:2] for line in command(fleet, "--dry-run").output.splitlines()].count(["to", "do"]) == 3
    back = command(fleet, "--back")
    assert back.exit_code == 0 and "version 1 is served everywhere" in back.output
    done = command(fleet, "--to", "2")
    assert done.exit_code == 0 and "version 2 is served everywhere" in done.output
    assert versions_of(fleet) == ([2], [2])
    assert isinstance(command(fleet).exception, InvalidConfig)  # nothing is under way
    assert isinstance(command(fleet, "--back").exception, NotPrepared)
