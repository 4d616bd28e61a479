"""What `facet status` shows: the fleet as one document, and the document as a table that a person reads."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from online.proto import admin_pb2
from online.rollout.canary import Tally, quantile
from online.rollout.fleet import Answers
from online.rollout.fleet_status import CpuHost
from online.rollout.plan import Stage
from online.rollout.state import RolloutState
from online.rpc_error import RpcError

__all__ = ["render", "view"]

_PHASES = {
    Stage.PREPARE: "loading models, then rows", Stage.CANARY: "trying it on a share of the requests",
    Stage.PROMOTE: "preferring it everywhere", Stage.RETIRE: "retiring the old",
    Stage.BACK: "being taken back", Stage.DONE: "finished", Stage.TAKEN_BACK: "taken back",
}


def view(before: Answers, now: Answers, seconds: float, state: RolloutState | None) -> dict[str, Any]:
    """The fleet as plain values.

    Args:
        before, now: two looks at it, `seconds` apart; the traffic is what was answered in between.
        state: the last rollout of the workspace, if there was one.

    Returns:
        invariant     violations, in words
        unseen        why there may be others, in words; empty if nothing is left unseen
        cpu_tiers     address -> shard, shards, workers, preferred, canary, versions; or error
        rankers       address -> failed, models with counts and percentiles in ms (None: beyond the slowest bin's
                      bound, or nothing was answered); or error
        traffic       seconds; answered, failed and share by version; failed before any version was known
        rollout       to, source, stage, canary, next step, done and planned steps; or None
    """
    fleet = now.present()
    return {
        "invariant": [str(violation) for violation in fleet.violations()],
        "unseen": _unseen(now),
        "cpu_tiers": {host: _cpu_tier(answer) for host, answer in now.cpu_tiers.items()},
        "rankers": {host: _ranker(answer) for host, answer in now.rankers.items()},
        "traffic": _traffic(before, now, seconds),
        "rollout": _rollout(state, now),
    }


def _unseen(now: Answers) -> str:
    for kind, hosts in (("CPU host", now.cpu_tiers), ("ranker", now.rankers)):
        if not hosts:
            return f"no {kind} was asked"
    away, asked = len([*now.refusals()]), len(now.cpu_tiers) + len(now.rankers)
    return f"{away} of {asked} hosts did not answer" if away else ""


def _cpu_tier(answer: "admin_pb2.CpuTierStatus | RpcError") -> dict[str, Any]:
    if isinstance(answer, RpcError):
        return {"error": answer.problem}
    host = CpuHost.of(answer)
    return {
        "shard": host.shard, "shards": host.shards, "workers": answer.workers or 1, "preferred": host.preferred,
        "canary": host.canary, "canary_share": host.canary_share,
        "versions": [
            {
                "version": v.version, "manifest_sha256": v.manifest_sha256, "in_flight": v.in_flight,
                "answered": v.answered, "state": _state(v, host),
            }
            for v in answer.versions
        ],
    }


def _state(hosted: admin_pb2.HostedVersion, host: CpuHost) -> str:
    if hosted.draining:
        return "draining"
    if hosted.version == host.canary:
        return "canary"
    return "preferred" if hosted.version == host.preferred else "answering"


def _ranker(answer: "admin_pb2.RankerStatus | RpcError") -> dict[str, Any]:
    if isinstance(answer, RpcError):
        return {"error": answer.problem}
    bounds = tuple(answer.latency_bounds_ms)
    return {
        "failed": answer.failed,
        "slowest_bin_ms": max(bounds, default=None),
        "models": [
            {
                "version": m.version, "manifest_sha256": m.manifest_sha256, "device": m.device,
                "answered": m.answered, "failed": m.failed,
                **{f"p{round(q * 100)}_ms": _finite(quantile(m.latency_counts, bounds, q)) for q in (0.5, 0.95)},
            }
            for m in answer.models
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has neither infinity, of the open bin, nor "nothing was counted"."""
    return value if math.isfinite(value) else None


def _traffic(before: Answers, now: Answers, seconds: float) -> dict[str, Any]:
    tally = Tally()
    for answers in (before, now):
        tally.look({host: a for host, a in answers.rankers.items() if not isinstance(a, RpcError)})
    every = sum(counts.answered for counts in tally.counts.values())
    return {
        "seconds": seconds,
        "versions": {
            str(version): {
                "answered": counts.answered, "failed": counts.failed,
                "share": counts.answered / every if every else 0.0,
            }
            for version, counts in sorted(tally.counts.items())
        },
        "failed": tally.unversioned,
    }


def _rollout(state: RolloutState | None, now: Answers) -> dict[str, Any] | None:
    if state is None:
        return None
    plan = state.plan
    fleet = now.present()
    following = "unknown: not all of its hosts answered"
    if plan.ended:
        following = None
    elif set(plan.cpu_tiers) <= set(fleet.cpu_tiers) and set(plan.rankers) <= set(fleet.rankers):
        step = plan.next_step(fleet)
        following = str(step) if step else "watch the canary" if plan.stage is Stage.CANARY else "the next stage"
    return {
        "to": plan.to, "source": plan.source, "stage": str(plan.stage), "canary_share": plan.canary_share,
        "begun": state.begun, "finished": state.finished, "halted": state.halted, "done": state.done,
        "steps": len(state.records), "next": following,
    }


def render(shown: Mapping[str, Any]) -> str:
    """The document of `view` as text."""
    return "\n".join(_lines(shown))


def _lines(shown: Mapping[str, Any]) -> Iterator[str]:
    yield from _rollout_lines(shown["rollout"])
    unseen = f", as far as can be seen: {shown['unseen']}" if shown["unseen"] else ""
    broken = shown["invariant"]
    yield f"invariant  {'VIOLATED' if broken else 'holds'}: every version a CPU host answers is on every ranker{unseen}"
    yield from (f"           {violation}" for violation in broken)
    yield ""
    yield from _table(["CPU host", "shard", "workers", "version", "state", "in flight", "answered"], _cpu_rows(shown))
    yield ""
    yield from _table(["ranker", "version", "device", "answered", "failed", "p50 ms", "p95 ms"], _ranker_rows(shown))
    yield ""
    traffic = shown["traffic"]
    shares = [
        f"version {version} {of['share']:.1%} ({of['answered']:,} answered, {of['failed']:,} failed)"
        for version, of in traffic["versions"].items() if of["answered"] or of["failed"]
    ]
    unknown = f"; {traffic['failed']:,} failed before any version was known" if traffic["failed"] else ""
    yield f"traffic    over {traffic['seconds']:.1f} s: {', '.join(shares) or 'none'}{unknown}"


def _rollout_lines(rollout: Mapping[str, Any] | None) -> Iterator[str]:
    if rollout is None:
        yield "rollout    none in this workspace"
        return
    what = _PHASES[Stage(rollout["stage"])]
    when = f", {rollout['finished'] or 'begun ' + rollout['begun']}"
    yield f"rollout    from {rollout['source'] or 'nothing'} to {rollout['to']}: {what}{when}"
    if rollout["halted"]:
        yield f"           halted: {rollout['halted']}"
    if rollout["next"]:
        yield f"           {rollout['done']} of {rollout['steps']} steps; next: {rollout['next']}"


def _cpu_rows(shown: Mapping[str, Any]) -> Iterator[list[str]]:
    for address, host in shown["cpu_tiers"].items():
        if "error" in host:
            yield [address, host["error"]]
            continue
        about = [address, f"{host['shard']}/{host['shards']}", str(host["workers"])]
        for entry in host["versions"]:
            share = f" {host['canary_share']:.2%}" if entry["state"] == "canary" else ""
            yield [
                *about, str(entry["version"]), entry["state"] + share, f"{entry['in_flight']:,}",
                f"{entry['answered']:,}",
            ]
            about = ["", "", ""]


def _ranker_rows(shown: Mapping[str, Any]) -> Iterator[list[str]]:
    for address, host in shown["rankers"].items():
        if "error" in host:
            yield [address, host["error"]]
            continue
        for entry in host["models"]:
            unknown = f"> {host['slowest_bin_ms']:g}" if entry["answered"] and host["slowest_bin_ms"] else "-"
            times = [f"{entry[name]:.3g}" if entry[name] else unknown for name in ("p50_ms", "p95_ms")]
            yield [
                address, str(entry["version"]), entry["device"], f"{entry['answered']:,}", f"{entry['failed']:,}",
                *times,
            ]
            address = ""
        if host["failed"]:
            yield ["", "none", "", "", f"{host['failed']:,}"]


def _table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """Columns as wide as they need to be; a row of two cells is a host and one sentence over the rest."""
    table = [head, *rows]
    whole = [row for row in table if len(row) != 2]
    widths = [max(len(row[i]) for row in whole if i < len(row)) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in table)
    for row in table:
        cells = row if len(row) == 2 else [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([cells[0].ljust(widths[0]), *cells[1:]]).rstrip()
