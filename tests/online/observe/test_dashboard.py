"""The Grafana dashboard asks only for what is exported, and for all of it."""

import json
import re
from importlib.resources import files

import pytest

from tests.online.observe.test_metrics import LABELS

DASHBOARD = json.loads(files("online.observe").joinpath("dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]

OF_PROMETHEUS = {"job", "instance"}
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


def metric_of(name: str) -> str:
    return name if name in LABELS else SUFFIXES.sub("", name)


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES)
def test_a_query_names_metrics_and_labels_that_are_exported(title, query, legend) -> None:
    metrics = {metric_of(name) for name in re.findall(r"\b(?:facet|process)_\w+", query)}
    assert metrics and metrics <= set(LABELS), f"{title}: unknown {metrics - set(LABELS)}"
    known = OF_PROMETHEUS.union(*(LABELS[metric] for metric in metrics))
    selectors = " ".join(re.findall(r"\{([^}]*)\}", query))
    selected = set(re.findall(r"(\w+)\s*[=!]~?", selectors))
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
    assert selected <= known and grouped - {"le"} <= known, f"{title}: unknown labels"
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert shown <= (grouped or known), f"{title}: the legend shows labels that the query drops"


def test_a_histogram_is_asked_for_its_buckets_by_le() -> None:
    for title, query, _ in QUERIES:
        assert ("histogram_quantile" in query) == ("_bucket" in query) == ("(le," in query), title


def test_every_metric_is_on_some_panel() -> None:
    asked = {metric_of(name) for _, query, _ in QUERIES for name in re.findall(r"\b(?:facet|process)_\w+", query)}
    assert asked == set(LABELS)


def test_what_must_never_happen_turns_red() -> None:
    panel = next(panel for panel in PANELS if "mismatches" in panel["title"])
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1] == {"color": "red", "value": 1}


def test_panels_are_laid_out_without_overlap_and_read_one_data_source() -> None:
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                   for y in range(place["y"], place["y"] + place["h"])}
        assert not covered & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= covered
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["description"] for panel in PANELS)
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource" and DASHBOARD["schemaVersion"] >= 39
