"""The whole way on a sample of the real log, by the commands a user types; then stock Feast on what it left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from feast import FeatureStore
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace
from tests.waiting import PROGRAM_S

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
REQUESTS = 400

# As little training as makes every stage do its work.
QUICK = {
    "contrastive": {"epochs": 1},
    "kge": {"epochs": 1},
    "ranker": {"epochs": 1},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with `feature_repo/`, `var/` and `reports/`, after `facet demo` on every tenth customer."""
    home = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "feature_repo", home / "feature_repo")
    log = ROOT / "data" / "online_retail" / "events.parquet"
    duckdb.sql(f"COPY (FROM '{log}' WHERE CustomerID % 10 = 0) TO '{home / 'sample.parquet'}'")
    definition = yaml.safe_load((ROOT / "pipelines" / "datasets" / "online_retail.yaml").read_text())
    definition |= {"name": "retail_sample", "source": "sample.parquet"}
    (home / "sample.yaml").write_text(yaml.safe_dump(definition))
    (home / "quick.yaml").write_text(yaml.safe_dump(QUICK))
    done = run_demo(home)
    assert done.returncode == 0, done.stderr[-6000:]
    return home, done


def run_demo(home: Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "facet", "demo", "--dataset", "sample.yaml", "--config", "quick.yaml"]
    command += ["--seeds", "2", "--requests", str(REQUESTS)]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=PROGRAM_S, check=False)


@pytest.fixture(scope="module")
def summary(demo) -> dict:
    return json.loads((demo[0] / "reports" / "demo" / "summary.json").read_text())


def test_the_summary_has_every_figure(summary: dict) -> None:
    assert summary["dataset"] == "retail_sample"
    assert summary["events"] > 25_000
    assert summary["wall_s"] > 0
    assert set(summary["auc"]) == {"purchase", "repurchase_60d"}
    for arms in summary["auc"].values():
        assert list(arms) == ["scratch", "contrastive", "kge", "both"]
        for figures in arms.values():
            assert len(figures["seeds"]) == 2
            assert np.isclose(figures["mean"], np.mean(figures["seeds"]))
            assert 0 < figures["mean"] < 1
            assert figures["ci95"] >= 0
    assert set(summary["int4"]["auc_delta"]) == {"purchase", "repurchase_60d"}
    assert summary["int4"]["bytes_per_row"] == 20
    assert summary["int4"]["bytes_ratio_to_fp16"] == 20 / 64
    assert summary["materialize"]["rows_per_s"] > 0
    assert 0 < summary["lookup"]["p50_ms"] <= summary["lookup"]["p99_ms"]
    assert summary["lookup"]["batch"] == 512


def test_a_version_rolled_out_under_traffic_without_a_failed_or_mixed_answer(summary: dict) -> None:
    rollout = summary["rollout"]
    assert rollout["requests"] >= REQUESTS
    assert (rollout["failed"], rollout["mixed_version"]) == (0, 0)
    assert set(rollout["versions_seen"]) == {"1", "2"}
    assert sum(rollout["versions_seen"].values()) == rollout["requests"]


def test_every_published_row_was_audited(demo, summary: dict) -> None:
    versions = Workspace(demo[0] / "var").versions
    published = sum(spec.rows for manifest in versions.manifests() for spec in manifest.tables)
    assert versions.numbers() == [1, 2]
    assert versions.manifest(2).parents == (1,)
    assert summary["audit"] == {"rows_checked": published, "rows_different": 0}
    assert summary["materialize"]["rows"] == published


def test_the_page_needs_nothing_from_elsewhere(demo) -> None:
    page = (demo[0] / "reports" / "demo" / "index.html").read_text()
    assert page.count("<svg") == 6  # the flow, the data, AUC, curves, lookups, the rollout
    for fetched in ("<script", "<link", "<img", "url(http", "src="):
        assert fetched not in page


def test_feast_answers_a_thousand_random_ids_with_the_published_bytes(demo) -> None:
    workspace = Workspace(demo[0] / "var")
    manifest = workspace.versions.manifest(2)
    store = FeatureStore(str(demo[0] / "feature_repo"))
    random = np.random.default_rng(0)
    for spec in manifest.tables:
        published = pq.read_table(workspace.versions.path(2) / Manifest.table_path(spec.name), columns=["id", "row"])
        rows = dict(zip(published["id"].to_pylist(), published["row"].to_pylist(), strict=True))
        known = random.choice(published["id"].to_numpy(), 700)
        unknown = random.integers(2**61, 2**62, 300)
        ids = random.permutation(np.concatenate([known, unknown])).tolist()
        reference = f"{spec.view_name(2)}:row"
        response = store.get_online_features(features=[reference], entity_rows={spec.entity: ids})
        assert response.to_dict()["row"] == [rows.get(each) for each in ids]
        column = list(response.proto.metadata.feature_names.val).index("row")
        statuses = list(response.proto.results[column].statuses)
        assert statuses == [FieldStatus.PRESENT if each in rows else FieldStatus.NOT_FOUND for each in ids]


def test_the_stock_command_lists_a_view_per_table_and_version(demo) -> None:
    listed = subprocess.run(
        [BIN / "feast", "feature-views", "list"], cwd=demo[0] / "feature_repo", capture_output=True, text=True,
        check=True, env={**os.environ, "COLUMNS": "200"},
    ).stdout
    for version in (1, 2):
        for table in ("user_contrastive", "user_kge", "item_contrastive", "item_kge"):
            assert f"{table}__v{version}" in listed
    for view in ("user_context", "item_context", "user_item_context"):
        assert view in listed


def test_a_second_demo_repeats_no_stage(demo) -> None:
    again = run_demo(demo[0])
    assert again.returncode == 0
    assert again.stderr.count("done before") == 8
    assert again.stdout.splitlines()[1] == demo[1].stdout.splitlines()[1]
