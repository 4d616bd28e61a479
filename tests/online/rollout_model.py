"""A small model of a fleet under rollouts, explored in all its interleavings; what decides in it is the real plan.

```
controller   crashed | idle | about to take a step      durable: its Plan, pending steps included
calls        of a controller that crashed or gave up waiting: they take effect at any later moment, or never
CPU hosts    up | crashed; loaded, answering, preferred, canary: remembered over a crash, or lost
rankers      up | crashed; models: remembered over a crash, or lost
request      pins the models of a ranker ── asks host after host ── is scored
```

Versions are bits of a mask: bit v for version v. Everything is a tuple, so that states can be told apart by hashing.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from online.rollout.fleet_status import CpuHost, FleetStatus
from online.rollout.plan import Plan, Stage, Step

CPU_HOSTS, RANKERS = ("cpu-0", "cpu-1"), ("gpu-0", "gpu-1")
ONE = 1 << 1
DOWN, IDLE = "down", "idle"


class Cpu(NamedTuple):
    up: bool = True
    lost: bool = False  # came back without what it held, and the controller has not put it right yet
    loaded: int = ONE
    answering: int = ONE
    preferred: int = 1
    canary: int = 0


class Ranker(NamedTuple):
    up: bool = True
    lost: bool = False
    models: int = ONE


class Request(NamedTuple):
    ranker: int
    pinned: int
    got: tuple[int, ...] = ()  # the version that each host asked so far answered from


class State(NamedTuple):
    plan: Plan
    controller: str | Step
    calls: frozenset[Step]
    cpus: tuple[Cpu, ...]
    rankers: tuple[Ranker, ...]
    request: Request | None
    losses: int  # how many more hosts may lose what they held
    kills: int  # how many more times a process may die


class Broken(Exception):
    """A property does not hold; `args[0]` says which."""


def versions_of(mask: int) -> list[int]:
    return [version for version in (1, 2, 3) if mask >> version & 1]


@lru_cache(None)
def fleet_of(cpus: tuple[tuple, ...], rankers: tuple[int, ...], sharded: bool) -> FleetStatus:
    """What the controller sees. cpus: (loaded, answering, preferred, canary, canary share); rankers: models."""
    return FleetStatus(
        {
            name: CpuHost(
                {v: f"manifest {v}" for v in versions_of(loaded)}, frozenset(versions_of(answering)), preferred, canary,
                share, i if sharded else 0, 2 if sharded else 1,
            )
            for i, (name, (loaded, answering, preferred, canary, share)) in enumerate(zip(CPU_HOSTS, cpus, strict=True))
        },
        {name: {v: f"manifest {v}" for v in versions_of(m)} for name, m in zip(RANKERS, rankers, strict=True)},
    )


def cpu_after(cpu: Cpu, step: Step) -> Cpu | None:
    """A CPU host's own rules (online/lookup/hosted.py); None: refused."""
    bit = 1 << step.version
    if step.action == "load":
        return cpu._replace(
            loaded=cpu.loaded | bit, answering=cpu.answering | bit, preferred=cpu.preferred or step.version
        )
    if step.action in ("prefer", "promote", "canary"):
        if not cpu.answering & bit or (step.action == "canary" and cpu.preferred == step.version):
            return None
        if step.action == "canary":
            return cpu._replace(canary=step.version)
        return cpu._replace(preferred=step.version, canary=0)
    answering = cpu.answering & ~bit
    if step.action == "drain":
        if not answering:
            return None
    elif cpu.answering & bit:
        return None  # still answering
    canary = 0 if cpu.canary == step.version else cpu.canary
    preferred = cpu.preferred if cpu.preferred != step.version else max(versions_of(answering))
    loaded = cpu.loaded & ~bit if step.action == "unload" else cpu.loaded
    return cpu._replace(loaded=loaded, answering=answering, preferred=preferred, canary=canary)


def ranker_after(ranker: Ranker, step: Step) -> Ranker | None:
    bit = 1 << step.version
    models = ranker.models | bit if step.action == "load" else ranker.models & ~bit
    return ranker._replace(models=models) if models else None


def way_to(state: State, came_from: dict[State, State | None]) -> str:
    """What changed from state to state, a line each."""
    lines: list[str] = []
    at: State | None = state
    while at is not None and (before := came_from[at]) is not None:
        changed = [
            f"{name} {getattr(at, name)}" for name in ("controller", "calls", "cpus", "rankers", "request")
            if getattr(at, name) != getattr(before, name)
        ]
        if at.plan.stage is not before.plan.stage:
            changed.insert(0, f"{at.plan.stage!s} to {at.plan.to}")
        lines.append("; ".join(changed))
        at = before
    return "\n".join(reversed(lines))


class Model:
    """The rules of the world.

    Args:
        sharded: the two CPU hosts have half of the ids each; else they are replicas.
        plan_type: what decides; a subclass of `Plan` that errs must be found out.
        one_version: whether a request asks all hosts for the version that the first answered from.
        canary_share: 0 for rollouts without a canary.
        targets: the rollouts, one after the other, from version 1.
        requests: whether a request is under way; else only what a new one would find is looked at.
    """

    def __init__(
        self, *, sharded: bool, plan_type: type[Plan] = Plan, one_version: bool = True, canary_share: float = 0.5,
        targets: tuple[int, ...] = (2, 3), losses: int = 0, kills: int = 100, requests: bool = True,
    ) -> None:
        self.sharded, self.plan_type, self.one_version = sharded, plan_type, one_version
        self.canary_share, self.targets, self.requests = canary_share, targets, requests
        self.losses, self.kills = losses, kills
        self._decisions: dict[tuple, tuple[Step | None, str | None]] = {}
        self._sound: set[State] = set()

    def first(self) -> State:
        plan = self.plan_type(self.targets[0], 1, CPU_HOSTS, RANKERS, canary_share=self.canary_share)
        hosts = (Cpu(), Cpu()), (Ranker(), Ranker())
        return State(plan, IDLE, frozenset(), *hosts, None, self.losses, self.kills)

    def explore(self) -> int:
        """Visit every state; how many there are. Raises `Broken`, with the way that led there."""
        came_from: dict[State, State | None] = {self.first(): None}
        frontier = list(came_from)
        try:
            while frontier:
                following: list[State] = []
                for state in frontier:
                    self.check(state)
                    for successor in self.successors(state):
                        if successor not in came_from:
                            came_from[successor] = state
                            following.append(successor)
                frontier = following
            for state in came_from:
                self.check_way_on(state)
        except Broken as broken:
            raise Broken(f"{broken}\n{way_to(state, came_from)}") from None
        return len(came_from)

    # -- what may happen ------------------------------------------------------------------------------------------

    def successors(self, state: State) -> Iterator[State]:
        yield from self.controller(state)
        for call in state.calls:  # a call of a controller that is gone, or waits no longer
            yield self.taken(state._replace(calls=state.calls - {call}), call)
        yield from self.hosts(state)
        if self.requests:
            yield from self.request(state)

    def controller(self, state: State) -> Iterator[State]:
        at, plan = state.controller, state.plan
        if at == DOWN:
            yield state._replace(controller=IDLE)
            return
        if isinstance(at, Step):
            yield self.answered(state, at)
            lost = state._replace(controller=IDLE, calls=state.calls | {at})
            if self.is_up(state, at):
                yield lost  # it waited long enough
            if state.kills:
                dead = {"controller": DOWN, "kills": state.kills - 1}
                yield state._replace(**dead)  # before the call left
                if self.is_up(state, at):
                    yield lost._replace(**dead)
                    yield self.taken(state, at)._replace(**dead)  # after the call, before it was noted
            return
        if state.kills:
            yield state._replace(controller=DOWN, kills=state.kills - 1)
        if plan.stage in (Stage.PREPARE, Stage.CANARY, Stage.PROMOTE):
            yield state._replace(plan=plan.turned_back())  # by hand, or the canary halted
        if self.all_up(state):
            yield self.decided(state)

    def decided(self, state: State) -> State:
        """The controller saw all hosts, and wrote down what it does next."""
        state = self.put_right(state)
        plan = state.plan
        if plan.ended:
            return self.next_rollout(state)
        step, broken = self.decision(state)
        if broken:
            raise Broken(f"the plan stops at {step}: {broken}")
        if step is None:
            return state._replace(plan=plan.advanced())
        pending = plan.pending if step in plan.pending else (*plan.pending, step)
        return state._replace(plan=replace(plan, pending=pending), controller=step)

    def next_rollout(self, state: State) -> State:
        if state.calls or state.plan.pending:
            raise Broken("a call is still under way when the rollout has ended")
        target = next((t for t in self.targets if t > state.plan.to), None)
        if target is None:
            return state
        source = state.plan.to if state.plan.stage is Stage.DONE else state.plan.source
        plan = self.plan_type(target, source, CPU_HOSTS, RANKERS, canary_share=self.canary_share)
        return state._replace(plan=plan)

    def answered(self, state: State, step: Step) -> State:
        """The step's call came back: with success, a refusal, or the news that the host is away."""
        if not self.is_up(state, step):
            return state._replace(controller=IDLE)  # it stays pending
        pending = tuple(p for p in state.plan.pending if p != step)
        # Hosts take loads one after the other, so an earlier call of the same step has ended too.
        after = self.taken(state, step)._replace(
            plan=replace(state.plan, pending=pending), controller=IDLE, calls=state.calls - {step}
        )
        if not step.holds(self.fleet(after)) and self.decision(after)[0] == step:
            raise Broken(f"a host refuses {step}")  # else it had lost what it held: the next step is another
        return after

    def taken(self, state: State, step: Step) -> State:
        """The state after a host has taken a step, or has refused it."""
        if step.on == "ranker":
            i = RANKERS.index(step.host)
            after = ranker_after(state.rankers[i], step)
            if after is None or after == state.rankers[i]:
                return state
            return state._replace(rankers=(*state.rankers[:i], after, *state.rankers[i + 1 :]))
        i = CPU_HOSTS.index(step.host)
        after = cpu_after(state.cpus[i], step)
        if after is None or after == state.cpus[i]:
            return state
        return state._replace(cpus=(*state.cpus[:i], after, *state.cpus[i + 1 :]))

    def hosts(self, state: State) -> Iterator[State]:
        for kind, names, fresh in (("cpus", CPU_HOSTS, Cpu(lost=True)), ("rankers", RANKERS, Ranker(lost=True))):
            hosts = getattr(state, kind)
            for i, host in enumerate(hosts):
                def changed(after, i=i, hosts=hosts, kind=kind) -> State:
                    return state._replace(**{kind: (*hosts[:i], after, *hosts[i + 1 :])})

                if not host.up:
                    yield changed(host._replace(up=True))
                    if state.losses:
                        yield changed(fresh)._replace(losses=state.losses - 1)
                elif state.kills:
                    request = state.request
                    if kind == "rankers" and request and request.ranker == i:
                        request = None  # the caller tries again elsewhere
                    calls = frozenset(call for call in state.calls if call.host != names[i])
                    yield changed(host._replace(up=False))._replace(
                        request=request, calls=calls, kills=state.kills - 1
                    )

    def request(self, state: State) -> Iterator[State]:
        request = state.request
        if request is None:
            for i, ranker in enumerate(state.rankers):
                if ranker.up:
                    yield state._replace(request=Request(i, ranker.models))
            return
        wanted = 2 if self.sharded else 1
        if len(request.got) == wanted:
            if len(set(request.got)) != 1 or not request.pinned >> request.got[0] & 1:
                raise Broken(f"an answer mixes versions: rows of {request.got}, models {versions_of(request.pinned)}")
            yield state._replace(request=None)
            return
        accepted = 1 << request.got[0] if request.got and self.one_version else request.pinned
        for i in [len(request.got)] if self.sharded else range(2):
            if state.cpus[i].up:
                chosen = choices(state.cpus[i], accepted)
                if not chosen:
                    yield state._replace(request=None)  # refused: the whole request is begun anew
                for version in chosen:
                    yield state._replace(request=request._replace(got=(*request.got, version)))

    # -- what must hold -------------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """Raise `Broken` where the invariant does not hold, or a new request over living hosts finds no answer."""
        for (i, cpu), (j, ranker) in product(enumerate(state.cpus), enumerate(state.rankers)):
            if cpu.answering & ~ranker.models and not cpu.lost and not ranker.lost:
                raise Broken(f"{CPU_HOSTS[i]} can answer what {RANKERS[j]} cannot run")
        living = [cpu for cpu in state.cpus if cpu.up and not cpu.lost]
        for ranker in state.rankers:
            if ranker.up and not ranker.lost and (not self.sharded or len(living) == 2):
                self.check_answers(ranker, living)

    def check_way_on(self, state: State) -> None:
        """Raise `Broken` unless the controller, if nothing else happens, comes to the end of the last rollout."""
        quiet, path = self.calmed(state), []
        while quiet not in self._sound:
            path.append(quiet)
            following = self.alone(quiet)
            if following == quiet and quiet.plan.ended:
                break
            if following in path or following == quiet:
                raise Broken(f"the controller, left alone, does not come to an end: it stays at {following.controller}")
            quiet = following
        self._sound.update(path)

    def check_answers(self, ranker: Ranker, living: list[Cpu]) -> None:
        """Whichever host is asked first, and whatever it chooses, the others must be able to answer the same."""
        for cpu in living:
            chosen = choices(cpu, ranker.models)
            if not chosen:
                raise Broken("a new request finds no version")
            if self.sharded and any(not other.answering >> version & 1 for version in chosen for other in living):
                raise Broken("one shard chooses a version that another does not answer")

    def calmed(self, state: State) -> State:
        """Whoever died is back, no request is under way, and nobody dies any more."""
        return state._replace(
            cpus=tuple(cpu._replace(up=True) for cpu in state.cpus),
            rankers=tuple(ranker._replace(up=True) for ranker in state.rankers),
            request=None, losses=0, kills=0, controller=IDLE if state.controller == DOWN else state.controller,
        )

    def alone(self, state: State) -> State:
        """What the controller makes of it when nothing else happens."""
        at = state.controller
        return self.answered(state, at) if isinstance(at, Step) else self.decided(state)

    # -- parts ----------------------------------------------------------------------------------------------------

    def decision(self, state: State) -> tuple[Step | None, str | None]:
        plan, fleet = state.plan, self.fleet(state)
        key = (plan, id(fleet))
        if key not in self._decisions:
            step = plan.next_step(fleet)
            self._decisions[key] = step, step and plan.would_break(step, fleet)
        return self._decisions[key]

    def fleet(self, state: State) -> FleetStatus:
        share = self.canary_share
        cpus = tuple((c.loaded, c.answering, c.preferred, c.canary, share if c.canary else 0.0) for c in state.cpus)
        return fleet_of(cpus, tuple(ranker.models for ranker in state.rankers), self.sharded)

    @staticmethod
    def put_right(state: State) -> State:
        """Hosts that had lost what they held, and now fit in again, are held to the invariant again."""
        if state.plan.pending or not any(host.lost for host in (*state.cpus, *state.rankers)):
            return state
        common = state.cpus[0].answering & state.cpus[1].answering
        fits = common and not any(cpu.answering & ~r.models for cpu, r in product(state.cpus, state.rankers))
        if not fits or any(not other.answering >> v & 1 for r in state.rankers for cpu in state.cpus
                           for v in choices(cpu, r.models) for other in state.cpus):
            return state
        return state._replace(
            cpus=tuple(cpu._replace(lost=False) for cpu in state.cpus),
            rankers=tuple(ranker._replace(lost=False) for ranker in state.rankers),
        )

    @staticmethod
    def is_up(state: State, step: Step) -> bool:
        if step.on == "ranker":
            return state.rankers[RANKERS.index(step.host)].up
        return state.cpus[CPU_HOSTS.index(step.host)].up

    @staticmethod
    def all_up(state: State) -> bool:
        return all(host.up for host in (*state.cpus, *state.rankers))


@lru_cache(None)
def choices(cpu: Cpu, accepted: int) -> tuple[int, ...]:
    """The versions that a CPU host may answer a request from: the preferred, or the canary, as the request id falls."""
    able = cpu.answering & accepted
    if not able:
        return ()
    tried = tuple(v for v in {cpu.preferred, cpu.canary} if v and able >> v & 1)
    return tried or tuple(versions_of(able))
