"""What hosts say of themselves, and what steps do there."""

import pytest

from online.proto import admin_pb2_grpc
from online.proto.admin_pb2 import CpuTierStatus, HostedVersion, LoadedModel, RankerStatus
from online.rollout.fleet import Answers, Fleet, is_away
from online.rollout.fleet_status import CpuHost, FleetStatus
from online.rollout.plan import Step
from online.rpc_error import Code, RpcError
from tests.grpc_server import grpc_server
from tests.waiting import PATIENCE_S


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
    refusal = RpcError(Code.DEADLINE, "cpu", expected="an answer", got="none", remedy="Wait.")
    away = Answers({"cpu": refusal}, {"gpu": ranker})
    assert away.present() == FleetStatus({}, {"gpu": {1: "a"}})
    with pytest.raises(RpcError):
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
        with pytest.raises(RpcError) as refused:
            fleet.run(Step(3, "drain", "cpu-tier", host.admin_address, 1))
        assert refused.value.code is Code.LAST_VERSION and not is_away(refused.value)
        host.admin.stop().wait(PATIENCE_S)
        with pytest.raises(RpcError) as refused:
            fleet.run(Step(2, "load", "cpu-tier", host.admin_address, 2))
        assert is_away(refused.value)
    finally:
        fleet.close()


def test_a_load_may_take_longer_than_any_other_step() -> None:
    """As long as it takes to read and hash a version: a controller that gave up would never see it loaded."""
    remaining_s = {}

    class Admin(admin_pb2_grpc.CpuTierAdminServicer):
        def Load(self, request, context) -> CpuTierStatus:
            remaining_s["load"] = context.time_remaining()
            return CpuTierStatus()

        def Drain(self, request, context) -> CpuTierStatus:
            remaining_s["drain"] = context.time_remaining()
            return CpuTierStatus()

    with grpc_server(lambda server: admin_pb2_grpc.add_CpuTierAdminServicer_to_server(Admin(), server)) as address:
        fleet = Fleet([address], [])
        for action in ("load", "drain"):
            fleet.run(Step(2, action, "cpu-tier", address, 1))
        fleet.close()
    assert 100 < remaining_s["load"] <= 630 and remaining_s["drain"] <= 63  # gRPC rounds up by some percent
