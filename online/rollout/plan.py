"""What a rollout does next: pure functions of its durable plan and of what the hosts hold now.

```
            PREPARE                CANARY (if asked for)      PROMOTE            RETIRE                        DONE
forwards    models on all rankers, the new version tried on   the new version    the old drained, unloaded
            then rows on all       a share, on all CPU hosts  preferred on all   from all CPU hosts, then
            CPU hosts                                                            from all rankers
               │                       │                         │
               └───────────────────────┴────────────┬────────────┘
backwards                                           BACK                                                 TAKEN_BACK
                       the old version preferred on all; the new drained, unloaded from all CPU hosts, then rankers
```

A stage says what is to hold, in the order in which to bring it about; the next step is the first that does not hold. No
step is remembered as done, so a host that came back with less than it had is put right by the same rule, and it does
not matter where the controller died. One thing must be remembered: a step that was begun and not seen to end
(`pending`). Its call may still be at work on the host, and a load that ends after the rollout was taken back would
bring the version up where no ranker has its model any more. So a pending step counts as taken for the invariant, and is
asked for again, and answered, before any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from online.rollout.fleet_status import CpuHost, FleetStatus
from pipelines.contracts.errors import VersionConflict

__all__ = ["Plan", "Stage", "Step", "preview", "source_of"]


class Stage(StrEnum):
    """How far a rollout is; see the module."""

    PREPARE = "prepare"
    CANARY = "canary"
    PROMOTE = "promote"
    RETIRE = "retire"
    DONE = "done"
    BACK = "back"
    TAKEN_BACK = "taken back"


@dataclass(frozen=True)
class Step:
    """One action on one host.

    Attributes:
        phase: 1 upper models, 2 rows and routing, 3 retirement; backwards 2, then 1.
        action: load, prefer, canary, promote, drain, unload. `prefer` is a promotion that precedes a canary.
        on: cpu-tier, ranker.
        share: of the requests, for a canary.
    """

    phase: int
    action: str
    on: str
    host: str
    version: int
    share: float = 1.0

    def holds(self, fleet: FleetStatus) -> bool:
        """Whether the step's effect is there already."""
        if self.on == "ranker":
            return (self.version in fleet.rankers[self.host]) == (self.action == "load")
        cpu = fleet.cpu_tiers[self.host]
        return {
            "load": self.version in cpu.answering,
            "prefer": self.version == cpu.preferred,
            "canary": (self.version, self.share) == (cpu.canary, cpu.canary_share),
            "promote": self.version == cpu.preferred and not cpu.canary,
            "drain": self.version not in cpu.answering,
            "unload": self.version not in cpu.loaded,
        }[self.action]

    def effect(self, fleet: FleetStatus) -> FleetStatus:
        """The fleet after this step."""
        if self.on == "cpu-tier":
            hosts = {**fleet.cpu_tiers, self.host: self._changed(fleet.cpu_tiers[self.host], fleet)}
            return replace(fleet, cpu_tiers=hosts)
        models = dict(fleet.rankers[self.host])
        if self.action == "load":
            models.setdefault(self.version, _manifest(self.version, fleet))
        else:
            models.pop(self.version, None)
        return replace(fleet, rankers={**fleet.rankers, self.host: models})

    def _changed(self, cpu: CpuHost, fleet: FleetStatus) -> CpuHost:
        version = self.version
        if self.action == "load":
            loaded = {version: _manifest(version, fleet), **cpu.loaded}
            return replace(
                cpu, loaded=loaded, answering=cpu.answering | {version}, preferred=cpu.preferred or version
            )
        if self.action == "canary":
            return replace(cpu, canary=version, canary_share=self.share)
        if self.action in ("prefer", "promote"):
            return replace(cpu, preferred=version, canary=0, canary_share=0.0)
        answering = cpu.answering - {version}
        changed = replace(cpu, answering=answering)
        if cpu.preferred == version:
            changed = replace(changed, preferred=max(answering, default=0))
        if cpu.canary == version:
            changed = replace(changed, canary=0, canary_share=0.0)
        if self.action == "unload":
            changed = replace(changed, loaded={v: sha for v, sha in cpu.loaded.items() if v != version})
        return changed

    def __str__(self) -> str:
        share = f" for {self.share:.2%} of the requests" if self.action == "canary" else ""
        return f"phase {self.phase}: {self.action} version {self.version} on {self.on} {self.host}{share}"


@dataclass(frozen=True)
class Plan:
    """What a rollout is to reach, and how far it is.

    Attributes:
        to: the new version.
        source: the version that all CPU hosts answered at the beginning, to go back to; 0 if there was none.
        canary_share: share of the requests; 0: no canary.
        pending: steps that were begun and not seen to end.

    >>> cpu = CpuHost(loaded={1: "a"}, answering=frozenset({1}), preferred=1)
    >>> plan = Plan(2, 1, cpu_tiers=("cpu",), rankers=("gpu",))
    >>> for step in preview(plan, FleetStatus({"cpu": cpu}, {"gpu": {1: "a"}})):
    ...     print(step)
    phase 1: load version 2 on ranker gpu
    phase 2: load version 2 on cpu-tier cpu
    phase 2: promote version 2 on cpu-tier cpu
    phase 3: drain version 1 on cpu-tier cpu
    phase 3: unload version 1 on cpu-tier cpu
    phase 3: unload version 1 on ranker gpu
    """

    to: int
    source: int
    cpu_tiers: tuple[str, ...]
    rankers: tuple[str, ...]
    canary_share: float = 0.0
    stage: Stage = Stage.PREPARE
    pending: tuple[Step, ...] = ()

    @property
    def ended(self) -> bool:
        return self.stage in (Stage.DONE, Stage.TAKEN_BACK)

    @property
    def turned(self) -> bool:
        """Whether it is walked backwards."""
        return self.stage in (Stage.BACK, Stage.TAKEN_BACK)

    def next_step(self, fleet: FleetStatus) -> Step | None:
        """The step to take now; None when all holds that this stage wants."""
        steps = self._missing_models(fleet)
        # What would break now was asked of a host that lost what it held since: first that is put right.
        steps += [step for step in self.pending if not self.would_break(step, fleet)]
        steps += [step for step in self.wanted(fleet) if not step.holds(fleet)]
        return next(iter((*steps, *self.pending)), None)

    def wanted(self, fleet: FleetStatus) -> list[Step]:
        """What this stage wants to hold, in the order in which to bring it about.

        Before the retirement both versions are kept everywhere, so that either can be gone to; in it everything is
        retired but the new version.
        """
        to, source, stage = self.to, self.source, self.stage
        if self.ended:
            return []
        if stage is Stage.BACK:
            return [
                *self._models(1, "load", source), *self._rows(2, "load", source), *self._rows(2, "promote", source),
                *self._rows(2, "drain", to), *self._rows(2, "unload", to), *self._models(1, "unload", to),
            ]
        if stage is Stage.RETIRE:
            steps = [*self._models(1, "load", to), *self._rows(2, "load", to), *self._rows(2, "promote", to)]
            return steps + self._retirement([version for version in fleet.versions if version != to])
        kept = [version for version in (source, to) if version]
        steps = [step for version in kept for step in self._models(1, "load", version)]
        steps += [step for version in kept for step in self._rows(2, "load", version)]
        if stage is Stage.CANARY:
            steps += self._rows(2, "prefer", source) + self._rows(2, "canary", to, self.canary_share)
        if stage is Stage.PROMOTE:
            steps += self._rows(2, "promote", to)
        return steps

    def forwards(self, old: list[int]) -> list[Step]:
        """All steps of a rollout in which nothing goes wrong, where every host holds the versions `old`."""
        canary = self._rows(2, "canary", self.to, self.canary_share) if self.canary_share else []
        return [
            *self._models(1, "load", self.to), *self._rows(2, "load", self.to), *canary,
            *self._rows(2, "promote", self.to), *self._retirement(old),
        ]

    def advanced(self) -> "Plan":
        """The plan after this stage, when all holds that it wants and the canary has passed."""
        following = {
            Stage.PREPARE: Stage.CANARY if self.canary_share else Stage.PROMOTE, Stage.CANARY: Stage.PROMOTE,
            Stage.PROMOTE: Stage.RETIRE, Stage.RETIRE: Stage.DONE, Stage.BACK: Stage.TAKEN_BACK,
        }
        return replace(self, stage=following[self.stage])

    def turned_back(self) -> "Plan":
        """The plan to undo this one.

        Raises:
            VersionConflict: the old version is being retired already, or there was none.
        """
        if self.turned:
            return self
        if self.stage in (Stage.RETIRE, Stage.DONE) or not self.source:
            raise VersionConflict(
                f"the rollout to version {self.to} cannot be taken back",
                expected="one in which every CPU host still answers the old version",
                got=f"the stage {self.stage!s}" if self.source else "no version that every CPU host answered before",
                remedy=f"Finish it, then roll out to version {self.source} instead." if self.source
                else "Finish it, then roll out to another version.",
            )
        return replace(self, stage=Stage.BACK)

    def would_break(self, step: Step, fleet: FleetStatus) -> str | None:
        """What taking the step now would break, in words; None if nothing.

        Said apart from the order of the steps, so that an error in the one is caught by the other.
        """
        after, version = step.effect(fleet), step.version
        if broken := sorted(set(after.violations()) - set(fleet.violations())):
            return str(broken[0])
        if fleet.common and not after.common:
            return "no version could be answered by every CPU host"
        if step.on == "ranker" and step.action == "unload":
            for host, cpu in fleet.cpu_tiers.items():
                if version in cpu.loaded:
                    return f"CPU host {host} still holds version {version}"
        if step.action == "drain":
            for host, cpu in fleet.cpu_tiers.items():
                if version in (cpu.preferred, cpu.canary):
                    return f"CPU host {host} still chooses version {version}"
        return None

    def _missing_models(self, fleet: FleetStatus) -> list[Step]:
        """Loads that restore the invariant, after a host was changed by hand or lost what it held."""
        answered = {version for cpu in fleet.cpu_tiers.values() for version in cpu.answering}
        answered |= {step.version for step in self.pending if (step.on, step.action) == ("cpu-tier", "load")}
        return [
            Step(1, "load", "ranker", host, version)
            for version in sorted(answered) for host in self.rankers if version not in fleet.rankers[host]
        ]

    def _retirement(self, versions: list[int]) -> list[Step]:
        steps: list[Step] = []
        for version in versions:
            steps += self._rows(3, "drain", version) + self._rows(3, "unload", version)
            steps += self._models(3, "unload", version)
        return steps

    def _models(self, phase: int, action: str, version: int) -> list[Step]:
        return [Step(phase, action, "ranker", host, version) for host in self.rankers]

    def _rows(self, phase: int, action: str, version: int, share: float = 1.0) -> list[Step]:
        return [Step(phase, action, "cpu-tier", host, version, share) for host in self.cpu_tiers]


def source_of(fleet: FleetStatus, to: int) -> int:
    """The version to go back to: of those that every CPU host answers, which most prefer; 0 if there is none."""
    hosts = fleet.cpu_tiers.values()
    return max(
        fleet.common - {to}, key=lambda version: (sum(cpu.preferred == version for cpu in hosts), version), default=0
    )


def preview(plan: Plan, fleet: FleetStatus) -> Iterator[Step]:
    """The steps that would be taken from here if every one took effect and a canary passed.

    Raises:
        VersionConflict: a step would break what must hold.
    """
    while not plan.ended:
        step = plan.next_step(fleet)
        if step is None:
            plan = plan.advanced()
            continue
        if broken := plan.would_break(step, fleet):
            raise VersionConflict(
                f"{step} cannot be taken", expected="a step after which every request can be answered", got=broken,
                remedy="See `facet status`; put right by hand what it shows.",
            )
        yield step
        fleet = step.effect(fleet)
        plan = replace(plan, pending=tuple(p for p in plan.pending if p != step))


def _manifest(version: int, fleet: FleetStatus) -> str:
    return min(fleet.manifests(version), default="")
