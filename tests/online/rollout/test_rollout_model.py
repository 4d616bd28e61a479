"""The rollout in all its interleavings: nothing that may happen breaks what must hold, and what errs is found out."""

from collections.abc import Callable
from typing import Any

import pytest

from online.rollout.fleet_status import FleetStatus
from online.rollout.plan import Plan, Stage, Step
from tests.online.rollout_model import CPU_HOSTS, RANKERS, Broken, Model

HOSTS = pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])


@HOSTS
@pytest.mark.parametrize(
    ("world", "states"),
    [
        # a crash of the controller or any host at every moment, in two rollouts with a canary, halted at any moment
        ({"kills": 1, "requests": False}, 5_000),
        # the same, and the host that crashed comes back with version 1 alone
        ({"kills": 1, "losses": 1, "requests": False}, 30_000),
        # two crashes at once, and hosts that stay away, in one rollout
        ({"kills": 3, "targets": (2,), "requests": False}, 10_000),
        # a request under way, while one process dies
        ({"kills": 1, "targets": (2,)}, 15_000),
        # a request under way over two rollouts without a canary
        ({"kills": 0, "canary_share": 0.0}, 2_000),
    ],
    ids=["crash", "loss", "crashes", "request", "requests"],
)
def test_nothing_that_may_happen_breaks_what_must_hold(sharded: bool, world: dict[str, Any], states: int) -> None:
    assert Model(sharded=sharded, **world).explore() > states  # it did go everywhere


# What a controller could get wrong. Each errs in its steps and believes that it breaks nothing.


class Unguarded(Plan):
    def would_break(self, step: Step, fleet: FleetStatus) -> str | None:
        return None


class SkipsPhase1(Unguarded):
    def _missing_models(self, fleet: FleetStatus) -> list[Step]:
        return []

    def _models(self, phase: int, action: str, version: int) -> list[Step]:
        return [] if phase == 1 and action == "load" else super()._models(phase, action, version)


class UnloadsModelsFirst(Unguarded):
    def wanted(self, fleet: FleetStatus) -> list[Step]:
        steps = super().wanted(fleet)
        return sorted(steps, key=lambda step: (step.action, step.on) != ("unload", "ranker"))


class PromotesBeforeAllHaveTheRows(Unguarded):
    def wanted(self, fleet: FleetStatus) -> list[Step]:
        steps = super().wanted(fleet)
        if self.stage is not Stage.PREPARE:
            return steps
        host = CPU_HOSTS[0]
        first = next(i for i, s in enumerate(steps) if s == Step(2, "load", "cpu-tier", host, self.to))
        return [*steps[: first + 1], Step(2, "promote", "cpu-tier", host, self.to), *steps[first + 1 :]]


class DrainsBeforePromotedEverywhere(Unguarded):
    def wanted(self, fleet: FleetStatus) -> list[Step]:
        return [step for step in super().wanted(fleet) if (step.action, step.host) != ("promote", CPU_HOSTS[1])]


class DrainsHostByHostBeforeTheRowsCame(Unguarded):
    def _rows(self, phase: int, action: str, version: int, share: float = 1.0) -> list[Step]:
        steps = super()._rows(phase, action, version, share)
        return steps[:1] if action in ("load", "canary", "promote") and version == self.to else steps


class ForgetsWhatWasPending(Plan):
    def next_step(self, fleet: FleetStatus) -> Step | None:
        return next((step for step in self.wanted(fleet) if not step.holds(fleet)), None)

    @property
    def pending(self) -> tuple[Step, ...]:
        return ()

    @pending.setter
    def pending(self, value: tuple[Step, ...]) -> None: ...


class RepeatsWhatWasPendingBlindly(Plan):
    """Also where the host has lost meanwhile what it held."""

    def next_step(self, fleet: FleetStatus) -> Step | None:
        return next(iter(self.pending), None) or super().next_step(fleet)


class TakesBackModelsFirst(Unguarded):
    def wanted(self, fleet: FleetStatus) -> list[Step]:
        steps = super().wanted(fleet)
        return steps[::-1] if self.stage is Stage.BACK else steps


class TakesBackWithoutPromoting(Unguarded):
    def wanted(self, fleet: FleetStatus) -> list[Step]:
        steps = super().wanted(fleet)
        if self.stage is not Stage.BACK:
            return steps
        return [step for step in steps if step.action != "promote" or step.host != CPU_HOSTS[1]]


class BelievesThatNobodyLosesAnything(Plan):
    """In the retirement it only retires: what was loaded and promoted before is taken for granted."""

    def wanted(self, fleet: FleetStatus) -> list[Step]:
        return [step for step in super().wanted(fleet) if self.stage is not Stage.RETIRE or step.phase == 3]


class ForgetsOneRanker(Unguarded):
    def _models(self, phase: int, action: str, version: int) -> list[Step]:
        return [step for step in super()._models(phase, action, version) if step.host != RANKERS[1]]

    def _missing_models(self, fleet: FleetStatus) -> list[Step]:
        return []


class NeverRetires(Plan):
    def advanced(self) -> Plan:
        return self if self.stage is Stage.PROMOTE else super().advanced()


@pytest.mark.parametrize(
    ("plan_type", "world", "found"),
    [
        (SkipsPhase1, {}, "cannot run"),
        (ForgetsOneRanker, {}, "gpu-1 cannot run"),
        (UnloadsModelsFirst, {}, "cannot run"),
        (PromotesBeforeAllHaveTheRows, {"sharded": True}, "another does not answer"),
        (DrainsBeforePromotedEverywhere, {"sharded": True, "canary_share": 0.0}, "another does not answer"),
        (DrainsHostByHostBeforeTheRowsCame, {"sharded": True}, "another does not answer|refuses"),
        (ForgetsWhatWasPending, {"kills": 1}, "cannot run|still under way"),
        (RepeatsWhatWasPendingBlindly, {"kills": 2, "losses": 1}, "the plan stops at|refuses"),
        (TakesBackModelsFirst, {}, "cannot run"),
        (TakesBackWithoutPromoting, {"sharded": True}, "another does not answer"),
        (BelievesThatNobodyLosesAnything, {"kills": 1, "losses": 1}, "the plan stops at|refuses|cannot run"),
        (NeverRetires, {}, "does not come to an end"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_plan_that_errs_is_found_out(plan_type: Callable, world: dict[str, Any], found: str) -> None:
    model = Model(**{"sharded": False, "kills": 0, "requests": False, "targets": (2,), "plan_type": plan_type} | world)
    with pytest.raises(Broken, match=found):
        model.explore()


def test_a_client_that_chooses_a_version_per_shard_is_found_out() -> None:
    with pytest.raises(Broken, match="mixes versions"):
        Model(sharded=True, one_version=False, kills=0, targets=(2,)).explore()
