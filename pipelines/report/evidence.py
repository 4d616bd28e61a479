"""What the stages left behind, gathered into the numbers of `summary.json` and the lines of the charts."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts.runspec import ARMS, RunSpec
from pipelines.contracts.workspace import Workspace

__all__ = ["Evidence"]

RUNS = ("v1", "v2")
CODEC = "int4"


@dataclass(frozen=True)
class Evidence:
    """Reads a finished demo; every number comes from a file that a stage wrote.

    Args:
        facts: stage name -> what the stage reported (`pipelines.demo.Demo.run`).
    """

    workspace: Workspace
    facts: dict[str, dict[str, Any]]

    @cached_property
    def events(self) -> dict[str, Any]:
        return _json(self.workspace.events.with_suffix(".json"))

    @cached_property
    def specs(self) -> dict[str, RunSpec]:
        return {name: RunSpec.read(self.workspace.run(name).spec) for name in RUNS}

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.specs["v1"].tasks

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.facts["evaluate"]

    @cached_property
    def release(self) -> dict[str, Any]:
        return _json(self.workspace.run("v1").ranker("both", 0) / CODEC / "release.json")

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        load, lookup = self.facts["serve"]["load"], self.facts["serve"]["lookup"]
        log = self.workspace.root / "feast" / "materializations.jsonl"
        materialized = [json.loads(line) for line in log.read_text().splitlines()]
        rows, seconds = sum(m["rows"] for m in materialized), sum(m["seconds"] for m in materialized)
        audits = self.facts["audit"]
        return {
            "dataset": self.events["dataset"],
            "events": self.events["rows"],
            "wall_s": round(sum(stage["wall_s"] for stage in self.facts.values()), 1),
            "stages_s": {name: stage["wall_s"] for name, stage in self.facts.items()},
            "peak_rss_mib": max(stage["peak_rss_mib"] for stage in self.facts.values()),
            "auc": self.evaluation["auc"],
            "auc_delta_vs_scratch": self.evaluation["delta_vs_scratch"],
            "int4": {
                "auc_delta": {task: row["int4"] - row["fp32"] for task, row in self.quantized().items()},
                "bytes_per_row": self.release["metrics"]["bytes_per_row"],
                "bytes_ratio_to_fp16": self.release["metrics"]["bytes_ratio_to_fp16"],
            },
            "materialize": {"rows": rows, "rows_per_s": round(rows / seconds)},
            "lookup": {name: lookup[name] for name in ("p50_ms", "p99_ms", "batch", "requests")},
            "rollout": {name: load[name] for name in ("requests", "failed", "mixed_version", "versions_seen")},
            "audit": {
                name: sum(audits[str(v)][name] for v in (1, 2)) for name in ("rows_checked", "rows_different")
            },
        }

    def quantized(self) -> dict[str, dict[str, float]]:
        """Task -> test ROC-AUC of the published model with FP32 and with INT4 rows."""
        auc = self.release["metrics"]["auc"]
        fp32, int4 = auc["fp32"], auc["quantized"]
        return {task: {"fp32": fp32[task], "int4": int4[task]} for task in self.tasks}

    def weekly_events(self) -> tuple[list[datetime], dict[str, list[int]]]:
        """Start of each week, and events by kind in each."""
        table = pq.read_table(self.workspace.events, columns=["event_timestamp", "kind"])
        weeks = pc.floor_temporal(table["event_timestamp"], unit="week")
        cells = pa.table({"week": weeks, "kind": table["kind"]}).group_by(["week", "kind"])
        counted = cells.aggregate([([], "count_all")])
        by_cell = {(row["week"], row["kind"]): row["count_all"] for row in counted.to_pylist()}
        starts = sorted({week for week, _ in by_cell})
        kinds = sorted({kind for _, kind in by_cell}, key=lambda kind: -self.events["kinds"][kind])
        return starts, {kind: [by_cell.get((week, kind), 0) for week in starts] for kind in kinds}

    def folds(self) -> list[dict[str, Any]]:
        """One row per run and fold: examples, labels and share of positives per task."""
        rows = []
        for name in RUNS:
            run = self.workspace.run(name)
            examples = pq.read_table(run.examples, columns=["fold", *self.tasks])
            relations = _json(run.graph / "relations.json")
            for fold in ("finetune", "validation", "test"):
                part = examples.filter(pc.field("fold") == fold)
                labels = {task: len(part) - part[task].null_count for task in self.tasks}
                rows.append(
                    {
                        "run": name,
                        "fold": fold,
                        "pairs": pq.read_metadata(run.pairs).num_rows,
                        "edges": sum(relation["edges"] for relation in relations),
                        "examples": len(part),
                        "labels": labels,
                        "positive": {task: pc.mean(part[task]).as_py() or 0.0 for task in self.tasks},
                    }
                )
        return rows

    def curves(self) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
        """Panels for `curve_chart`: each facet's loss, and validation AUC by arm per task (seed 0 of run v1)."""
        run = self.workspace.run("v1")
        panels = []
        for facet in ("contrastive", "kge"):
            curve = _json(run.facet(facet, 0) / "metrics.json")["curve"]
            panels.append((f"{facet}, training loss", "epoch", {facet: [(p["epoch"], p["loss"]) for p in curve]}))
        arms = {arm: _json(run.ranker(arm, 0) / "metrics.json")["curve"] for arm in ARMS}
        for task in self.tasks:
            lines = {
                arm: [(p["epoch"], p["validation_auc"][task]) for p in curve if task in p["validation_auc"]]
                for arm, curve in arms.items()
            }
            panels.append((f"{task}, validation", "epoch", {arm: line for arm, line in lines.items() if line}))
        return panels


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
