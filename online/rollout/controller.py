"""The three-phase rollout: every version a CPU host can answer is loaded on every ranker, at every moment.

```
phase 1   each ranker loads the new upper model beside the old
phase 2   each CPU host loads the new rows; then, after a canary if one is asked for, each prefers them
phase 3   the old versions: drained and unloaded on each CPU host, then unloaded on each ranker
```

What comes next is decided anew before every step, by `online.rollout.plan`, from the durable state and from what the
hosts hold; the state is written before and after every step. So the walk can be begun again after a crash at any point,
and puts right what a restarted host has lost. Until the old version is retired it can be walked backwards.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from online.clock import CLOCK, Clock
from online.lookup.reader import VersionReader
from online.rollout.canary import CanaryLimits, Outcome, Tally, Verdict, verdict
from online.rollout.fleet import Answers, Fleet, is_away
from online.rollout.fleet_status import FleetStatus, InvariantViolated
from online.rollout.host_wait import HostWait
from online.rollout.plan import Plan, Stage, Step, source_of
from online.rollout.state import Record, RolloutState, alone, now
from online.rpc_error import RpcError
from pipelines.contracts.errors import (
    FacetError,
    IntegrityError,
    InvalidConfig,
    NotPrepared,
    Unavailable,
    VersionConflict,
)
from pipelines.contracts.freshness import DEFAULT_LIMITS, FreshnessLimits
from pipelines.contracts.workspace import Workspace

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["Rollout", "RolloutHalted"]

logger = logging.getLogger(__name__)

PATIENCE_S, LOOK_S = 30.0, 0.5

_PHASES_BEGUN = {Stage.CANARY: 2, Stage.PROMOTE: 2, Stage.RETIRE: 3}
"""Where a walk that is resumed stands: the pause before the next phase is still to come."""

Say = Callable[[str], None]


class RolloutHalted(FacetError):
    """The canary was not as good as the old version, or it could not be told."""


class Rollout:
    """A rollout of a workspace's version over a fleet.

    >>> rollout = Rollout.begin_or_resume(workspace, 2, cpu_tiers=[...], rankers=[...])    # doctest: +SKIP
    >>> for record, seconds in rollout.walk():                                            # doctest: +SKIP
    ...     print(record.step)
    """

    def __init__(
        self, state: RolloutState, *, security: "ClientSecurity | None" = None, clock: Clock = CLOCK
    ) -> None:
        self.state, self._security, self._clock = state, security, clock

    @classmethod
    def begin_or_resume(
        cls, workspace: Workspace, to: int, *, cpu_tiers: Sequence[str], rankers: Sequence[str],
        limits: FreshnessLimits = DEFAULT_LIMITS, canary: CanaryLimits | None = None, change_hosts: bool = False,
        dry: bool = False, patience_s: float = PATIENCE_S, security: "ClientSecurity | None" = None,
        clock: Clock = CLOCK,
    ) -> "Rollout":
        """Continue the unfinished rollout of this workspace, or plan a new one. Nothing is changed on any host.

        Args:
            limits: how old the version's pretraining may be; asked when a rollout begins, not when it is resumed.
            canary: what is asked of a canary; None for none, or for what an unfinished rollout was begun with.
            change_hosts: go on with these hosts in place of those with which the unfinished rollout was begun.
            dry: write nothing.
            patience_s: how long a host may be away.

        Raises:
            StalePretraining: the version's pretraining is older than the limits allow.
            VersionNotFound: `to` is not published, or not materialized.
            IntegrityError: its files are not the manifest's, or a host holds another manifest under that number.
            VersionConflict: another rollout is unfinished, or this one with another canary, or another controller is
                at work.
            Unavailable: a host does not answer.
            InvalidConfig: no CPU host of some shard is named, or there is nothing to compare a canary with.
            InvariantViolated: the fleet is in no state to begin.
        """
        manifest = VersionReader.open(workspace, to, verify=False).manifest
        manifest.verify(workspace.versions.path(to), only=(manifest.UPPER_CONFIG, manifest.UPPER_WEIGHTS))
        path = RolloutState.path_in(workspace)
        unfinished = RolloutState.read(path)
        if unfinished is not None and not unfinished.plan.ended:
            hosts = tuple(cpu_tiers), tuple(rankers)
            state = cls._resumed(path, to, hosts, canary, change_hosts=change_hosts, dry=dry)
            return cls(state, security=security, clock=clock)
        limits.check(manifest.windows, f"version {to}")
        host_wait = HostWait(patience_s, logger.warning, clock)
        fleet = _first_look(Fleet(cpu_tiers, rankers, security=security), host_wait)
        fleet.check()
        fleet.check_shards()
        _check_manifests(fleet, to, manifest.sha256)
        source = source_of(fleet, to)
        if canary and not source:
            raise InvalidConfig(
                "canary", expected="a version that every CPU host answers, to compare the new one with", got="none",
                remedy="Leave --canary away, or roll out to a common version first.",
            )
        plan = Plan(to, source, tuple(cpu_tiers), tuple(rankers), canary_share=canary.share if canary else 0.0)
        old = [version for version in fleet.versions if version != to]
        records = [Record(step) for step in plan.forwards(old)]
        state = RolloutState(path, plan, old, manifest.sha256, now(), records, canary)
        if not dry:
            with alone(path):
                written = RolloutState.read(path)
                if (written and written.begun) != (unfinished and unfinished.begun):
                    raise _changed_meanwhile(path)
                state.write()
        return cls(state, security=security, clock=clock)

    @classmethod
    def _resumed(
        cls, path: Path, to: int, hosts: tuple[tuple[str, ...], tuple[str, ...]], canary: CanaryLimits | None, *,
        change_hosts: bool, dry: bool,
    ) -> RolloutState:
        """The unfinished state, read while no other controller is at work; written unless `dry`."""
        with nullcontext() if dry else alone(path):
            state = cls._unfinished(path)
            plan = state.plan
            other_hosts = tuple(map(set, hosts)) != (set(plan.cpu_tiers), set(plan.rankers))
            if to != plan.to or (other_hosts and not change_hosts) or (canary and canary != state.canary):
                raise VersionConflict(
                    f"a rollout to version {plan.to} is unfinished",
                    expected=f"the same version, hosts and canary: {list(plan.cpu_tiers)}, {list(plan.rankers)}, "
                    f"{state.canary or 'none'}",
                    got=f"version {to}, {list(hosts[0])}, {list(hosts[1])}, {canary or 'none'}",
                    remedy="Finish it with the same options, take it back with --back, or give --change-hosts to go "
                    "on with other hosts.",
                )
            if other_hosts:
                state.change_hosts(*hosts)
            state.resumed.append(now())
            state.halted = state.halted if plan.turned else None  # the canary is tried again
            if not dry:
                state.write()
            return state

    @classmethod
    def take_back(
        cls, workspace: Workspace, *, security: "ClientSecurity | None" = None, clock: Clock = CLOCK
    ) -> "Rollout":
        """Turn the unfinished rollout of this workspace round; `walk` then takes it back.

        Raises:
            NotPrepared: there is none.
            VersionConflict: its old version is being retired already.
        """
        path = RolloutState.path_in(workspace)
        with alone(path):
            state = cls._unfinished(path)
            state.halted = None  # whoever asks for it is not told that it failed
            state.resumed.append(now())
            state.move_to(state.plan.turned_back())
        return cls(state, security=security, clock=clock)

    @classmethod
    def unfinished(cls, workspace: Workspace) -> RolloutState:
        """The state of the unfinished rollout; raises `NotPrepared` if there is none."""
        return cls._unfinished(RolloutState.path_in(workspace))

    @staticmethod
    def _unfinished(path: Path) -> RolloutState:
        state = RolloutState.read(path)
        if state is None or state.plan.ended:
            raise NotPrepared(
                "no rollout is under way", expected="one that is unfinished in this workspace",
                got="none" if state is None else f"one to version {state.plan.to}, {state.plan.stage!s}",
                remedy="Give --to, --cpu-tier and --ranker to begin one.",
            )
        return state

    def walk(
        self, *, pause_s: float = 0.0, patience_s: float = PATIENCE_S, rollback: bool = True, say: Say = logger.info,
    ) -> Iterator[tuple[Record, float]]:
        """Take the steps in order, yielding each when it holds, with how long it took in seconds.

        Args:
            pause_s: time between phases, to watch the new version before the old one is retired.
            patience_s: how long a host may be away; then the walk stops, a canary is taken back.
            rollback: take the rollout back when its canary halts; else stop.
            say: is given what happens beside the steps, in words.

        Raises:
            RpcError: a host refused a step; the state stays, so that the walk can be resumed, here and below.
            Unavailable: a host did not answer for longer than `patience_s`.
            InvariantViolated: the next step would break what must hold.
            RolloutHalted: the canary halted it; with `rollback`, after it was taken back.
            VersionConflict: another controller is at work.
        """
        with alone(self.state.path):
            written = RolloutState.read(self.state.path)
            if written is None or written.begun != self.state.begun:
                raise _changed_meanwhile(self.state.path)
            self.state = written
            fleet = Fleet(written.plan.cpu_tiers, written.plan.rankers, security=self._security)
            try:
                host_wait = HostWait(patience_s, say, self._clock)
                walk = _Walk(written, fleet, host_wait, rollback=rollback, say=say, clock=self._clock)
                yield from walk.steps(pause_s)
            finally:
                fleet.close()


class _Walk:
    """One controller's walk."""

    def __init__(
        self, state: RolloutState, fleet: Fleet, host_wait: HostWait, *, rollback: bool, say: Say, clock: Clock
    ) -> None:
        self._state, self._fleet, self._host_wait = state, fleet, host_wait
        self._rollback, self._say, self._clock = rollback, say, clock
        self._watch: _Watch | None = None
        self._refused: set[Step] = set()

    def steps(self, pause_s: float) -> Iterator[tuple[Record, float]]:
        state = self._state
        phase = _PHASES_BEGUN.get(state.plan.stage)
        while not state.plan.ended:
            try:
                answers = self._fleet.ask()
                status = answers.status()
                self._check(status)
                yield from ((record, 0.0) for record in state.passed_over(status))
                step = state.plan.next_step(status)
                coming = step.phase if step else {Stage.PROMOTE: 3}.get(state.plan.stage, phase)
                if phase and coming > phase and not state.plan.turned:
                    phase = coming
                    self._clock.sleep(pause_s)  # then look again
                    continue
                phase = coming
                if step:
                    began = self._clock.now()
                    if record := self._take(step, status):
                        yield record, self._clock.now() - began
                elif state.plan.stage is not Stage.CANARY or self._canary_passed(answers):
                    state.move_to(state.plan.advanced())
                self._host_wait.restored()
            except RpcError as refusal:
                self._wait(refusal)
        state.write_timeline()  # kept beside the state, which the next rollout overwrites
        if state.plan.turned and state.halted:
            raise RolloutHalted(
                f"version {state.plan.to} was tried and taken back", expected="what was asked of the canary",
                got=state.halted, remedy=f"Version {state.plan.source} answers everywhere, as before.",
            )

    def _take(self, step: Step, status: FleetStatus) -> Record | None:
        """Take a step; None if there is another to be taken first."""
        if broken := self._state.plan.would_break(step, status):
            raise InvariantViolated(
                f"{step} cannot be taken", expected="a step after which every request can be answered", got=broken,
                remedy="See `facet status`; put right by hand what it shows, then run the rollout again.",
            )
        record = self._state.begin(step)
        try:
            self._fleet.run(step)
        except RpcError as refusal:
            if is_away(refusal):
                raise
            self._state.refused(record)
            again = self._state.plan.next_step(self._fleet.status()) == step
            if again or step in self._refused:
                raise
            self._refused.add(step)  # the host had lost what it held when it was asked
            return None
        self._state.end(record)
        return record

    def _check(self, status: FleetStatus) -> None:
        """Raise where no step of ours can put right what is wrong."""
        status.check_shards()
        _check_manifests(status, self._state.plan.to, self._state.manifest_sha256)
        if any(violation.version in status.rankers[violation.ranker] for violation in status.violations()):
            status.check()

    def _wait(self, refusal: RpcError) -> None:
        if not is_away(refusal):
            raise refusal
        try:
            self._host_wait.wait(refusal)
        except Unavailable as error:
            if self._state.plan.stage is not Stage.CANARY:
                raise
            self._host_wait.restored()
            self._halt(str(error.problem))

    def _canary_passed(self, answers: Answers) -> bool:
        state = self._state
        if self._watch is None:
            self._watch = _Watch(state.plan, state.canary, self._clock)
            self._say(f"canary: version {state.plan.to} on {state.plan.canary_share:.2%} of the requests")
        result, line = self._watch.look(answers)
        if line:
            self._say(line)
        if result.outcome is Outcome.HALT:
            self._halt(result.reason)
        elif result.outcome is Outcome.WATCH:
            self._clock.sleep(LOOK_S)
        return result.outcome is Outcome.PASS

    def _halt(self, reason: str) -> None:
        state = self._state
        self._say(f"halted: {reason}")
        state.halted, self._watch = reason, None
        if not self._rollback:
            state.write()
            raise RolloutHalted(
                f"the canary of version {state.plan.to}", expected="what was asked of it", got=reason,
                remedy="It goes on with its share of the requests. Take it back with `facet rollout --back`, or run "
                "the same command again to try anew.",
            )
        state.move_to(state.plan.turned_back())


class _Watch:
    """A canary under way; begun anew by a controller that resumes."""

    def __init__(self, plan: Plan, limits: CanaryLimits, clock: Clock) -> None:
        self._plan, self._limits, self._tally, self._clock = plan, limits, Tally(), clock
        self._began = self._said = clock.now()

    def look(self, answers: Answers) -> tuple[Verdict, str | None]:
        """The verdict, and every few seconds a line on how it stands."""
        restarts = self._tally.restarts
        self._tally.look(answers.rankers)
        moment = self._clock.now()
        elapsed_s = moment - self._began
        result = verdict(
            self._tally, old=self._plan.source, new=self._plan.to, limits=self._limits, elapsed_s=elapsed_s
        )
        again = " (a ranker was restarted: it counts from zero again)" if self._tally.restarts > restarts else ""
        if not again and result.outcome is Outcome.WATCH and moment - self._said < 2:
            return result, None
        self._said = moment
        return result, f"canary, {elapsed_s:.0f} of {self._limits.seconds:.0f} s: {result.reason}{again}"


def _first_look(fleet: Fleet, host_wait: HostWait) -> FleetStatus:
    try:
        while True:
            try:
                return fleet.status()
            except RpcError as refusal:
                if not is_away(refusal):
                    raise
                host_wait.wait(refusal)
    finally:
        fleet.close()


def _check_manifests(fleet: FleetStatus, to: int, manifest_sha256: str) -> None:
    if other := fleet.manifests(to) - {manifest_sha256}:
        raise IntegrityError(
            f"version {to}", expected=f"manifest {manifest_sha256} wherever it is loaded", got=f"{sorted(other)}",
            remedy="Let all hosts read the same published versions.",
        )


def _changed_meanwhile(path: Path) -> VersionConflict:
    return VersionConflict(
        f"{path} was changed meanwhile", expected="one controller at a time", got="another rollout's state",
        remedy="Run the command again.",
    )
