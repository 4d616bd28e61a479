"""A rollout's plan and record as they lie in the workspace: whole at every moment, written by one controller at a time.

```
<workspace>/rollout/
  state.json               the rollout under way, or the last one
  timeline-to-2.json       a finished one: its steps, and when each was begun and ended
  taken-back-from-2.json   one that was taken back
```
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from online.rollout.canary import CanaryLimits
from online.rollout.fleet_status import FleetStatus
from online.rollout.plan import Plan, Stage, Step
from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import IntegrityError, VersionConflict
from pipelines.contracts.locks import locked
from pipelines.contracts.workspace import Workspace

__all__ = ["Record", "RolloutState", "alone", "now"]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Record:
    """A step, with the ISO times at which it was first begun and was seen to hold; None if it was not yet."""

    step: Step
    started: str | None = None
    finished: str | None = None

    @property
    def pending(self) -> bool:
        return self.started is not None and self.finished is None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.step), "started": self.started, "finished": self.finished}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Record":
        return cls(Step(**{name: raw[name] for name in _STEP_FIELDS}), raw["started"], raw["finished"])


_STEP_FIELDS = [entry.name for entry in fields(Step)]


@dataclass
class RolloutState:
    """A rollout under way.

    Attributes:
        old: versions that were loaded anywhere when it began.
        manifest_sha256: of the new version; a host that holds another under its number reads other files.
        records: what was done, then what is planned; a step that had to be taken again lies there again.
        canary: what is asked of the canary; None for none.
        halted: why the canary halted it.
        resumed: when it was.
    """

    path: Path
    plan: Plan
    old: list[int]
    manifest_sha256: str
    begun: str
    records: list[Record]
    canary: CanaryLimits | None = None
    finished: str | None = None
    halted: str | None = None
    resumed: list[str] = field(default_factory=list)

    @staticmethod
    def path_in(workspace: Workspace) -> Path:
        return workspace.root / "rollout" / "state.json"

    @classmethod
    def read(cls, path: Path) -> "RolloutState | None":
        """The last rollout of a workspace, finished or not; None if there was none.

        Raises:
            IntegrityError: the file is no such state.
        """
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_text())
            records = [Record.from_dict(entry) for entry in raw["steps"]]
            canary = CanaryLimits(**raw["canary"]) if raw["canary"] else None
            plan = Plan(
                raw["to"], raw["source"], tuple(raw["cpu_tiers"]), tuple(raw["rankers"]),
                canary_share=canary.share if canary else 0.0, stage=Stage(raw["stage"]),
                pending=tuple(record.step for record in records if record.pending),
            )
            rest = {name: raw[name] for name in ("old", "manifest_sha256", "begun", "finished", "halted", "resumed")}
            return cls(path=path, plan=plan, records=records, canary=canary, **rest)
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path} cannot be read", expected="the state of a rollout", got=repr(error),
                remedy="Delete it; a new rollout finds out what the hosts hold.",
            ) from error

    def write(self) -> None:
        with replacing_file(self.path) as staging:
            staging.write_text(self._to_json())

    def begin(self, step: Step) -> Record:
        """Note that a step is about to be taken, before it is: it is pending until `end`, or `refused`."""
        record = self._record_of(step)
        record.started = record.started or now()
        self._write_pending()
        return record

    def end(self, record: Record) -> None:
        record.started = record.started or now()
        record.finished = now()
        self._write_pending()

    def refused(self, record: Record) -> None:
        """Note that the host answered, and did not take the step."""
        record.started = None
        self._write_pending()

    def passed_over(self, fleet: FleetStatus) -> Iterator[Record]:
        """Note the planned steps that hold without having been taken, up to the first that does not."""
        for step in self.plan.wanted(fleet):
            if not step.holds(fleet):
                return
            for record in self.records:
                if record.step == step and record.started is None:
                    self.end(record)
                    yield record

    def move_to(self, plan: Plan) -> None:
        """Go on to another stage."""
        if plan.turned and not self.plan.turned:
            self.records = [record for record in self.records if record.started]
        self.plan = plan
        self.finished = now() if plan.ended else None
        self.write()

    def change_hosts(self, cpu_tiers: tuple[str, ...], rankers: tuple[str, ...]) -> None:
        """Plan on with other hosts; what was planned or pending for one that is gone is forgotten. Not yet written."""
        hosts = {"cpu-tier": cpu_tiers, "ranker": rankers}
        self.records = [r for r in self.records if r.finished or r.step.host in hosts[r.step.on]]
        pending = tuple(record.step for record in self.records if record.pending)
        self.plan = replace(self.plan, cpu_tiers=cpu_tiers, rankers=rankers, pending=pending)

    @property
    def done(self) -> int:
        """How many steps hold."""
        return sum(record.finished is not None for record in self.records)

    @property
    def timeline(self) -> Path:
        """Where the finished rollout's steps and times lie, as JSON."""
        kind = "taken-back-from" if self.plan.turned else "timeline-to"
        return self.path.with_name(f"{kind}-{self.plan.to}.json")

    def write_timeline(self) -> None:
        with replacing_file(self.timeline) as staging:
            staging.write_text(self._to_json())

    def _write_pending(self) -> None:
        self.plan = replace(self.plan, pending=tuple(record.step for record in self.records if record.pending))
        self.write()

    def _record_of(self, step: Step) -> Record:
        for record in self.records:
            if record.step == step and record.finished is None:
                return record
        # Not planned, or taken before: after what was done, before what is planned.
        record = Record(step)
        position = next((i for i, other in enumerate(self.records) if other.started is None), len(self.records))
        self.records.insert(position, record)
        return record

    def _to_json(self) -> str:
        plan = self.plan
        raw = {
            "to": plan.to, "source": plan.source, "old": self.old, "stage": str(plan.stage),
            "cpu_tiers": plan.cpu_tiers, "rankers": plan.rankers, "manifest_sha256": self.manifest_sha256,
            "canary": asdict(self.canary) if self.canary else None, "begun": self.begun, "finished": self.finished,
            "halted": self.halted, "resumed": self.resumed, "steps": [record.to_dict() for record in self.records],
        }
        return json.dumps(raw, indent=1)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only controller of the state at `path` while the block runs; however a controller ends, it lets go.

    Raises:
        VersionConflict: there is another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent) as mine:
        if not mine:
            raise VersionConflict(
                f"another controller is at work in {path.parent}", expected="one at a time", got="its lock is held",
                remedy="Wait for it to end, or stop it; then run the command again.",
            )
        yield
