"""What hosts say of themselves, and whether it fits together."""

import pytest

from online.proto.admin_pb2 import CpuTierStatus, HostedVersion, LoadedModel, RankerStatus
from online.refusal import Code, Refusal
from online.rollout.fleet import Answers, CpuHost, Fleet, FleetStatus, InvariantViolated, is_away
from online.rollout.plan import Step
from pipelines.contracts.errors import InvalidConfig

CPU = CpuHost(loaded={1: "a", 2: "b"}, answering=frozenset({1}), preferred=1)


def test_the_invariant_compares_manifests_not_only_numbers() -> None:
    FleetStatus({"cpu": CPU}, {"ranker": {1: "a"}}).check()
    with pytest.raises(InvariantViolated, match="another manifest"):
        FleetStatus({"cpu": CPU}, {"ranker": {1: "other"}}).check()
    with pytest.raises(InvariantViolated, match="can answer version 1: expected it loaded on ranker bad"):
        FleetStatus({"cpu": CPU}, {"good": {1: "a"}, "bad": {2: "b"}}).check()


@pytest.mark.parametrize(
    ("shards", "fit"),
    [
        ([(0, 1), (0, 1)], True), ([(0, 2), (1, 2), (1, 2)], True),
        ([(0, 2)], False), ([(0, 2), (0, 1)], False), ([(0, 2), (1, 3)], False),
    ],
)
def test_every_shard_is_needed(shards, fit) -> None:
    hosts = {str(i): CpuHost({1: "a"}, frozenset({1}), 1, shard=s, shards=n) for i, (s, n) in enumerate(shards)}
    status = FleetStatus(hosts, {})
    if fit:
        status.check_shards()
    else:
        with pytest.raises(InvalidConfig, match="Name every CPU host"):
            status.check_shards()


def test_what_is_common_and_what_lies_anywhere() -> None:
    other = CpuHost(loaded={2: "b", 3: "c"}, answering=frozenset({2, 3}), preferred=3)
    status = FleetStatus({"a": CPU, "b": other}, {"r": {4: "d", 2: "x"}})
    assert (status.common, status.versions, status.manifests(2)) == (frozenset(), [1, 2, 3, 4], {"b", "x"})


def test_answers_become_a_status() -> None:
    tier = CpuTierStatus(
        versions=[
            HostedVersion(version=1, manifest_sha256="a"),
            HostedVersion(version=2, manifest_sha256="b", draining=True),
        ],
        preferred=1, canary=3, canary_share=0.1, shard=1, shards=4,
    )
    ranker = RankerStatus(models=[LoadedModel(version=1, manifest_sha256="a")])
    answers = Answers({"cpu": tier}, {"gpu": ranker})
    assert answers.status() == FleetStatus(
        {"cpu": CpuHost({1: "a", 2: "b"}, frozenset({1}), 1, 3, 0.1, 1, 4)}, {"gpu": {1: "a"}}
    )
    assert CpuHost.of(CpuTierStatus()).shards == 1  # of a host that does not say
    refusal = Refusal(Code.DEADLINE, "cpu", expected="an answer", got="none", remedy="Wait.")
    away = Answers({"cpu": refusal}, {"gpu": ranker})
    assert away.present() == FleetStatus({}, {"gpu": {1: "a"}})
    with pytest.raises(Refusal):
        away.status()


def test_steps_on_a_real_cpu_host(own_workspace, host_cpu_tier) -> None:
    """Every action, as the host shows it afterwards, is what the plan takes it to be; a refusal is no absence."""
    host = host_cpu_tier(own_workspace.workspace, (1,))
    fleet = Fleet([host.admin_address], [])
    try:
        status = fleet.status()
        for action, version, share in (
            ("load", 2, 1.0), ("canary", 2, 0.25), ("prefer", 1, 1.0), ("canary", 2, 0.5), ("promote", 2, 1.0),
            ("drain", 1, 1.0), ("load", 1, 1.0), ("drain", 1, 1.0), ("unload", 1, 1.0), ("load", 1, 1.0),
            ("canary", 1, 0.5), ("drain", 1, 1.0), ("load", 1, 1.0), ("drain", 2, 1.0), ("unload", 2, 1.0),
        ):
            step = Step(2, action, "cpu-tier", host.admin_address, version, share)
            for _ in range(2):  # every call may be repeated
                fleet.run(step)
            expected = step.effect(status).cpu_tiers[host.admin_address]
            status = fleet.status()
            got = status.cpu_tiers[host.admin_address]
            assert step.holds(status), step
            assert (set(got.loaded), got.answering, got.preferred, got.canary, got.canary_share) == (
                set(expected.loaded), expected.answering, expected.preferred, expected.canary, expected.canary_share,
            ), step
        with pytest.raises(Refusal) as refused:
            fleet.run(Step(3, "drain", "cpu-tier", host.admin_address, 1))
        assert refused.value.code is Code.LAST_VERSION and not is_away(refused.value)
        host.admin.stop().wait()
        with pytest.raises(Refusal) as refused:
            fleet.run(Step(2, "load", "cpu-tier", host.admin_address, 2))
        assert is_away(refused.value)
    finally:
        fleet.close()
