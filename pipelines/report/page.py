"""Writes the demo's `summary.json` and `index.html`: one page with nothing to fetch."""

import json
import os
import platform
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.runspec import ARMS
from pipelines.contracts.workspace import Workspace
from pipelines.report import charts
from pipelines.report.evidence import Evidence

__all__ = ["Summary", "write_report"]

NAMES = {"online_retail": "Online Retail"}


@dataclass(frozen=True)
class Summary:
    """The content of `summary.json`, and the same as a few lines for a terminal."""

    content: dict[str, Any]

    def table(self) -> str:
        """AUC per task and arm, then what serving did; about 80 columns wide."""
        content = self.content
        lines = ["", f"{'test ROC-AUC':<18}" + "".join(f"{arm:>18}" for arm in ARMS)]
        for task, arms in content["auc"].items():
            cells = (f"{arms[arm]['mean']:.4f} ± {arms[arm]['ci95']:.4f}" for arm in ARMS)
            lines.append(f"{task:<18}" + "".join(f"{cell:>18}" for cell in cells))
        int4, lookup, rollout = content["int4"], content["lookup"], content["rollout"]
        deltas = ", ".join(f"{task} {delta:+.5f}" for task, delta in int4["auc_delta"].items())
        seen = ", ".join(f"version {version}: {count:,}" for version, count in rollout["versions_seen"].items())
        facts = [
            ("INT4 against FP32", f"AUC {deltas}; {int4['bytes_ratio_to_fp16']:.1%} of FP16's bytes"),
            (
                "materialize",
                f"{content['materialize']['rows']:,} rows, {content['materialize']['rows_per_s']:,} rows/s",
            ),
            ("lookup", f"{lookup['batch']} ids: p50 {lookup['p50_ms']:.2f} ms, p99 {lookup['p99_ms']:.2f} ms"),
            ("rollout", f"{rollout['requests']:,} requests, {rollout['failed']} failed, "
                        f"{rollout['mixed_version']} mixed; {seen}"),
            ("audit", f"{content['audit']['rows_checked']:,} rows on every path, "
                      f"{content['audit']['rows_different']} different"),
        ]
        return "\n".join([*lines, "", *(f"{name:<18}  {value}" for name, value in facts)])


def write_report(workspace: Workspace, facts: dict[str, dict[str, Any]], directory: Path) -> Summary:
    """Gather what the stages wrote, and write both files into `directory`, each atomically."""
    evidence = Evidence(workspace, facts)
    summary = evidence.summary()
    with replacing_file(directory / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1))
    with replacing_file(directory / "index.html") as path:
        path.write_text(_render(evidence, summary))
    return Summary(summary)


def _render(evidence: Evidence, summary: dict[str, Any]) -> str:
    package = files("pipelines.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    serve = evidence.facts["serve"]
    weeks, counts = evidence.weekly_events()
    windows = {name: spec.windows for name, spec in evidence.specs.items()}
    lookup = serve["lookup"]
    return environment.from_string((package / "page.html").read_text()).render(
        summary=summary,
        names=NAMES,
        command="facet demo",
        machine=f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}",
        flow=(package / "flow.svg").read_text(),
        data_note=_data_note(evidence.events),
        folds=evidence.folds(),
        tasks=evidence.tasks,
        arms=list(ARMS),
        delta=summary["auc_delta_vs_scratch"],
        seeds=len(next(iter(summary["auc"].values()))["scratch"]["seeds"]),
        verdict=_verdict(summary["auc_delta_vs_scratch"]),
        quantized=evidence.quantized(),
        manifests=serve["load"]["manifests"],
        rollout_note=_rollout_note(serve["load"]),
        charts={
            "activity": charts.activity_chart(weeks, counts, windows),
            "auc": charts.auc_chart(summary["auc"]),
            "curves": charts.curve_chart(evidence.curves()),
            "lookup": charts.histogram_chart(
                lookup["histogram"]["edges_ms"], lookup["histogram"]["counts"],
                {"p50": lookup["p50_ms"], "p99": lookup["p99_ms"]},
            ),
            "rollout": charts.rollout_chart(
                *_answers_per_second(serve["load"]), _steps(serve), _seconds(serve, *serve["materializing"])
            ),
        },
    )


def _data_note(events: dict[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in events["dropped"].items() if count)
    return (
        f"{events['rows_read']:,} rows were read and {events['rows']:,} kept (left out: {dropped}): "
        f"{events['users']:,} users, {events['items']:,} items, {events['first'][:10]} to {events['last'][:10]}."
    )


def _verdict(delta: dict[str, dict[str, dict[str, float]]]) -> str:
    """Say for each task which arms differ from scratch beyond their interval."""
    sentences = []
    for task, arms in delta.items():
        better = [arm for arm, d in arms.items() if d["mean"] > d["ci95"]]
        worse = [arm for arm, d in arms.items() if d["mean"] < -d["ci95"]]
        parts = [f"better with {', '.join(better)}"] * bool(better) + [f"worse with {', '.join(worse)}"] * bool(worse)
        sentences.append(f"{task}: {' and '.join(parts) or 'no arm differs from scratch beyond its interval'}.")
    return " ".join(sentences)


def _rollout_note(load: dict[str, Any]) -> str:
    latency = load["latency_ms"]
    return (
        f"All {load['checked']:,} were recomputed; {load['mixed_version']:,} differed by more than "
        f"{load['tolerance']:g}. For {load['distinguishable']:,} of them the other version's scores differ by more "
        f"than that, so that a mix would have shown. Latency: median {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} "
        f"ms, with {load['concurrency']} clients that wait {load['think_ms']:g} ms before each request, and "
        "materialization and the controller on the same cores."
    )


def _answers_per_second(load: dict[str, Any]) -> tuple[list[float], dict[str, list[int]]]:
    timeline = load["timeline"]
    return (
        [entry["second"] for entry in timeline],
        {version: [entry["versions"].get(version, 0) for entry in timeline] for version in load["versions_seen"]},
    )


def _seconds(serve: dict[str, Any], *moments: str) -> tuple[float, ...]:
    """Seconds of traffic at which ISO moments were."""
    began = datetime.fromisoformat(serve["load"]["began"])
    return tuple((datetime.fromisoformat(moment) - began).total_seconds() for moment in moments)


def _steps(serve: dict[str, Any]) -> list[tuple[float, str]]:
    """(second of the traffic, step); steps that lie within a blink are drawn as one."""
    drawn: list[tuple[float, str]] = []
    for step in serve["rollout"]["steps"]:
        (second,) = _seconds(serve, step["finished"])
        what = f"{step['action']} {step['version']} on {step['on']}"
        if drawn and second - drawn[-1][0] < 0.5:
            drawn[-1] = (drawn[-1][0], f"{drawn[-1][1]}; {what}")
        else:
            drawn.append((second, what))
    return drawn
