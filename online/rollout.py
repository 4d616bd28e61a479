"""The three-phase rollout: every version a CPU host can answer is loaded on every ranker, at every moment.

```
phase 1   each ranker loads the new upper model beside the old
phase 2   each CPU host loads the new rows; then each prefers them
phase 3   the old versions: drained and unloaded on each CPU host, then unloaded on each ranker
```

The plan and how far it came lie in `<workspace>/rollout/state.json`, written before and after every step. A step whose
effect is there already is passed over, so the walk can be begun again after a crash at any point.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from online.client import open_channel
from online.proto import admin_pb2, admin_pb2_grpc
from online.reader import VersionReader
from online.refusal import refusal_from
from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import FacetError, IntegrityError, VersionConflict
from pipelines.contracts.freshness import DEFAULT_LIMITS, FreshnessLimits
from pipelines.contracts.workspace import Workspace

__all__ = ["Fleet", "InvariantViolated", "Rollout", "Step"]

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S, CALL_TIMEOUT_S = 600.0, 60.0


class InvariantViolated(FacetError):
    """A CPU host can answer a version that some ranker cannot run; no further step is taken."""


@dataclass(frozen=True)
class CpuHost:
    """What a CPU host said it holds."""

    loaded: dict[int, str]  # version -> manifest sha256
    answering: frozenset[int]
    preferred: int


@dataclass(frozen=True)
class FleetStatus:
    cpu_tiers: dict[str, CpuHost]
    rankers: dict[str, dict[int, str]]  # address -> version -> manifest sha256

    def check(self) -> None:
        """Raise `InvariantViolated` unless every version a CPU host can answer is loaded on every ranker."""
        for host, cpu in self.cpu_tiers.items():
            for ranker, models in self.rankers.items():
                if missing := sorted(v for v in cpu.answering if models.get(v) != cpu.loaded[v]):
                    raise InvariantViolated(
                        f"CPU host {host} can answer versions {missing}", expected=f"them loaded on ranker {ranker}",
                        got=f"upper models of {sorted(models)} there, or other manifests of the same number",
                        remedy="Load them on the ranker, or drain them on the CPU host, then run the rollout again.",
                    )


class Fleet:
    """The admin services of all CPU hosts and rankers, by address `host:port`."""

    def __init__(self, cpu_tiers: Sequence[str], rankers: Sequence[str]) -> None:
        self._cpu_tiers = {host: admin_pb2_grpc.CpuTierAdminStub(open_channel(host)) for host in cpu_tiers}
        self._rankers = {host: admin_pb2_grpc.RankerAdminStub(open_channel(host)) for host in rankers}

    def status(self) -> FleetStatus:
        """Ask every host; raises `Refusal` if one does not answer: a rollout needs to know all of them."""
        request = admin_pb2.StatusRequest()
        answers = {host: _call(stub.Status, request, host) for host, stub in self._cpu_tiers.items()}
        return FleetStatus(
            cpu_tiers={
                host: CpuHost(
                    loaded={v.version: v.manifest_sha256 for v in answer.versions},
                    answering=frozenset(v.version for v in answer.versions if not v.draining),
                    preferred=answer.preferred,
                )
                for host, answer in answers.items()
            },
            rankers={
                host: {m.version: m.manifest_sha256 for m in _call(stub.Status, request, host).models}
                for host, stub in self._rankers.items()
            },
        )

    def run(self, step: "Step") -> None:
        stub = (self._cpu_tiers if step.on == "cpu-tier" else self._rankers)[step.host]
        timeout_s = LOAD_TIMEOUT_S if step.action == "load" else CALL_TIMEOUT_S
        call = getattr(stub, step.action.capitalize())
        _call(call, admin_pb2.VersionRequest(version=step.version), step.host, timeout_s)


def _call(method: Callable, request: Any, host: str, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise refusal_from(error, host) from error


@dataclass
class Step:
    """One action on one host; `started` and `finished` are ISO times of the first run, or None."""

    phase: int
    action: str  # load, promote, drain, unload
    on: str  # cpu-tier, ranker
    host: str
    version: int
    started: str | None = None
    finished: str | None = None

    def holds(self, fleet: FleetStatus) -> bool:
        """Whether the step's effect is there already."""
        if self.on == "ranker":
            return (self.version in fleet.rankers[self.host]) == (self.action == "load")
        cpu = fleet.cpu_tiers[self.host]
        return {
            "load": self.version in cpu.answering,
            "promote": self.version == cpu.preferred,
            "drain": self.version not in cpu.answering,
            "unload": self.version not in cpu.loaded,
        }[self.action]

    def would_break(self, fleet: FleetStatus) -> bool:
        """Whether taking the step now would let a CPU host answer what some ranker cannot run."""
        if self.on == "cpu-tier" and self.action == "load":
            return any(self.version not in models for models in fleet.rankers.values())
        if self.on == "ranker" and self.action == "unload":
            return any(self.version in cpu.loaded for cpu in fleet.cpu_tiers.values())
        return False

    def __str__(self) -> str:
        return f"phase {self.phase}: {self.action} version {self.version} on {self.on} {self.host}"


@dataclass
class Rollout:
    """A rollout's plan and progress, durable.

    >>> rollout = Rollout.begin_or_resume(workspace, 2, cpu_tiers=[...], rankers=[...])    # doctest: +SKIP
    >>> for step in rollout.walk():                                                       # doctest: +SKIP
    ...     print(step)
    """

    path: Path
    to: int
    old: list[int]
    cpu_tiers: list[str]
    rankers: list[str]
    begun: str
    steps: list[Step]
    finished: str | None = None
    resumed: list[str] = field(default_factory=list)

    @classmethod
    def begin_or_resume(
        cls, workspace: Workspace, to: int, *, cpu_tiers: Sequence[str], rankers: Sequence[str],
        limits: FreshnessLimits = DEFAULT_LIMITS,
    ) -> "Rollout":
        """Continue the unfinished rollout of this workspace, or plan a new one. Nothing is changed on any host.

        Args:
            limits: how old the version's pretraining may be; asked when a rollout begins, not when it is resumed.

        Raises:
            StalePretraining: the version's pretraining is older than the limits allow.
            VersionNotFound: `to` is not published, or not materialized.
            IntegrityError: its files are not the manifest's, or a host holds another manifest under that number.
            VersionConflict: another rollout is unfinished.
            Refusal: a host does not answer.
            InvariantViolated: the fleet is in no state to begin.
        """
        manifest = VersionReader.open(workspace, to, verify=False).manifest
        manifest.verify(workspace.versions.path(to), only=(manifest.UPPER_CONFIG, manifest.UPPER_WEIGHTS))
        path = workspace.root / "rollout" / "state.json"
        unfinished = cls._read(path) if path.is_file() else None
        if unfinished is not None and unfinished.finished is None:
            asked = (to, sorted(cpu_tiers), sorted(rankers))
            if asked != (unfinished.to, sorted(unfinished.cpu_tiers), sorted(unfinished.rankers)):
                raise VersionConflict(
                    f"a rollout to version {unfinished.to} is unfinished",
                    expected=f"the same version and hosts: {unfinished.cpu_tiers}, {unfinished.rankers}",
                    got=f"version {to}, {list(cpu_tiers)}, {list(rankers)}",
                    remedy=f"Finish it with the same options, or delete {path} to give it up.",
                )
            unfinished.resumed.append(_now())
            unfinished._write()
            return unfinished
        limits.check(manifest.windows, f"version {to}")
        status = Fleet(cpu_tiers, rankers).status()
        status.check()
        held = [cpu.loaded for cpu in status.cpu_tiers.values()] + list(status.rankers.values())
        if any(versions.get(to, manifest.sha256) != manifest.sha256 for versions in held):
            raise IntegrityError(
                f"version {to}", expected=f"manifest {manifest.sha256} wherever it is loaded", got="another manifest",
                remedy="Let all hosts read the same published versions.",
            )
        old = sorted({version for versions in held for version in versions} - {to})
        rollout = cls(path, to, old, list(cpu_tiers), list(rankers), _now(), _plan(to, old, cpu_tiers, rankers))
        rollout._write()
        return rollout

    def walk(self, *, pause_s: float = 0.0):
        """Take the steps in order, yielding each after it holds, with how long it took in seconds.

        Args:
            pause_s: time between phases, to watch the new version before the old one is retired.

        Raises:
            Refusal: a host refused or did not answer; the state stays, so that the walk can be resumed.
            InvariantViolated: before the step that would have been next.
        """
        fleet = Fleet(self.cpu_tiers, self.rankers)
        phase = 1
        for step in self.steps:
            if step.phase != phase:
                time.sleep(pause_s)
                phase = step.phase
            status = fleet.status()
            status.check()
            began = time.perf_counter()
            if not step.holds(status):
                if step.would_break(status):
                    raise InvariantViolated(
                        f"{step} cannot be taken", expected="every version a CPU host can answer on every ranker",
                        got=f"{status}", remedy="A host was changed by hand or restarted; run the rollout again.",
                    )
                step.started = step.started or _now()
                self._write()
                fleet.run(step)
            step.started = step.started or _now()
            step.finished = step.finished or _now()
            self._write()
            yield step, time.perf_counter() - began
        self.finished = _now()
        self._write()
        # Kept beside the state, which the next rollout overwrites.
        with replacing_file(self.timeline) as staging:
            staging.write_text(self._to_json())

    @property
    def timeline(self) -> Path:
        """Where the finished rollout's steps and times lie, as JSON."""
        return self.path.with_name(f"timeline-to-{self.to}.json")

    def _to_json(self) -> str:
        raw = asdict(self)
        del raw["path"]
        return json.dumps(raw, indent=1)

    def _write(self) -> None:
        with replacing_file(self.path) as staging:
            staging.write_text(self._to_json())

    @classmethod
    def _read(cls, path: Path) -> "Rollout":
        try:
            raw = json.loads(path.read_text())
            return cls(**{**raw, "path": path, "steps": [Step(**step) for step in raw["steps"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path} cannot be read", expected="the state of a rollout", got=repr(error),
                remedy="Delete it; a new rollout finds out what the hosts hold.",
            ) from error


def _plan(to: int, old: Sequence[int], cpu_tiers: Sequence[str], rankers: Sequence[str]) -> list[Step]:
    steps = [Step(1, "load", "ranker", host, to) for host in rankers]
    steps += [Step(2, "load", "cpu-tier", host, to) for host in cpu_tiers]
    steps += [Step(2, "promote", "cpu-tier", host, to) for host in cpu_tiers]
    for version in old:
        steps += [Step(3, "drain", "cpu-tier", host, version) for host in cpu_tiers]
        steps += [Step(3, "unload", "cpu-tier", host, version) for host in cpu_tiers]
        steps += [Step(3, "unload", "ranker", host, version) for host in rankers]
    return steps


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
