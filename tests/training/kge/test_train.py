import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines.contracts.errors import InvalidConfig, InvalidEvents, InvalidTable
from pipelines.contracts.workspace import Run
from tests.planted import CUT, ITEMS, USERS, WINDOW_END, item_ids, planted_run
from training.config import load_section
from training.facet_io import load_rows
from training.kge.graph import Graph
from training.kge.sampling import EdgeBatches
from training.kge.scorers import SCORERS
from training.kge.train import KgeConfig, KgeModel, train_kge
from training.tables import ShardedModel, TableOptions, process_group

CONFIG = replace(
    load_section("kge", KgeConfig), dim=8, epochs=12, groups=2, group_edges=32, uniform_negatives=16
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return planted_run(tmp_path_factory.mktemp("planted"))[1]


def train(run: Run, directory: Path, config: KgeConfig = CONFIG, *, seed: int = 0) -> dict:
    with process_group() as processes:
        train_kge(
            run.graph, directory, config, tables=TableOptions(), window_end=WINDOW_END, seed=seed, processes=processes
        )
    return json.loads((directory / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("facets") / "kge-s0"
    train(run, directory)
    return directory


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_it_predicts_planted_edges_that_degree_cannot(run: Run, tmp_path: Path, scorer: str) -> None:
    metrics = train(run, tmp_path / scorer, replace(CONFIG, scorer=scorer))
    quality = metrics["holdout"]["bought"]
    assert quality["mrr"] > 2 * metrics["holdout"]["by_degree"]["bought"]["mrr"]
    assert quality["hits@10"] > metrics["holdout"]["by_degree"]["bought"]["hits@10"] + 0.2
    assert metrics["curve"][-1]["loss"] < metrics["curve"][0]["loss"]


@pytest.mark.parametrize("loss", ["logistic", "margin"])
def test_the_other_losses_learn_too(run: Run, tmp_path: Path, loss: str) -> None:
    metrics = train(run, tmp_path / loss, replace(CONFIG, loss=loss))
    assert metrics["holdout"]["bought"]["mrr"] > 1.5 * metrics["holdout"]["by_degree"]["bought"]["mrr"]


def test_rows_are_those_of_trained_nodes_by_entity_id(run: Run, trained: Path) -> None:
    graph = Graph.read(run.graph, cut=CUT)
    ids, weight = load_rows(trained / "item.safetensors")
    kept = np.flatnonzero(graph.trained_nodes[USERS : USERS + ITEMS])
    assert ids.tolist() == item_ids()[kept].tolist() and weight.shape == (len(kept), CONFIG.dim)
    nodes = load_file(trained / "nodes.safetensors")
    raw = nodes["weight"][USERS + kept[3]]
    assert nodes["ids"].tolist() == graph.ids.tolist()
    assert weight[3].tolist() == pytest.approx((raw / raw.norm()).tolist(), abs=1e-6)


def test_relation_parameters_are_kept_and_the_anchor_s_projection_is_untouched(trained: Path) -> None:
    relations = load_file(trained / "relations.safetensors")
    assert relations["translation"].shape == (2, 8) and relations["translation"].abs().sum() > 0
    assert torch.equal(relations["matrix"][0], torch.eye(8))  # bought
    assert (relations["matrix"][1] - torch.eye(8)).abs().max() > 1e-3  # in_category


def test_what_happens_on_the_held_out_days_changes_no_row(run: Run, trained: Path, tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    shutil.copytree(run.graph, other.graph)
    edges = pq.read_table(other.graph / "edges.parquet")
    table = edges.to_pandas()
    late = table.event_timestamp >= CUT
    table.loc[late, "tail"] = np.random.default_rng(5).permutation(table.loc[late, "tail"].to_numpy())
    changed = pa.Table.from_pandas(table, preserve_index=False, schema=edges.schema)
    pq.write_table(changed, other.graph / "edges.parquet")
    train(other, tmp_path / "kge-s0")
    for name in ("user.safetensors", "item.safetensors", "relations.safetensors"):
        assert (tmp_path / "kge-s0" / name).read_bytes() == (trained / name).read_bytes()


def test_an_interrupted_training_ends_with_the_same_rows(run: Run, trained: Path, tmp_path: Path, monkeypatch) -> None:
    made = EdgeBatches.__call__

    def dies_in_epoch_six(self: EdgeBatches, epoch: int):
        if epoch == 5:
            raise KeyboardInterrupt
        return made(self, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EdgeBatches, "__call__", dies_in_epoch_six)
        train(run, tmp_path / "kge-s0")
    metrics = train(run, tmp_path / "kge-s0")
    assert [entry["epoch"] for entry in metrics["curve"]] == list(range(1, CONFIG.epochs + 1))
    for name in ("user.safetensors", "relations.safetensors"):  # with Adam's moments, or these would differ
        assert (tmp_path / "kge-s0" / name).read_bytes() == (trained / name).read_bytes()


def test_bad_input_is_refused_and_nothing_is_written(run: Run, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InvalidConfig, match="likes"):
        train(run, tmp_path / "f", replace(CONFIG, boost={"likes": 2.0}))
    with pytest.raises(InvalidConfig, match="multiple of 4"):
        train(run, tmp_path / "f", replace(CONFIG, dim=6))
    with pytest.raises(InvalidTable, match="finite"):
        train(run, tmp_path / "f", replace(CONFIG, unit_rows=False, init_std=1e30))
    (run.graph / "nodes.parquet").rename(tmp_path / "nodes.parquet")
    nodes = pq.read_table(tmp_path / "nodes.parquet")
    renamed = pa.array(["shop" if kind == "item" else kind for kind in nodes["type"].to_pylist()])
    relations = run.graph / "relations.json"
    before = relations.read_text()
    try:
        pq.write_table(nodes.set_column(0, "type", renamed), run.graph / "nodes.parquet")
        relations.write_text(before.replace('"item"', '"shop"'))
        with pytest.raises(InvalidEvents, match="no item"):
            train(run, tmp_path / "f")
    finally:
        relations.write_text(before)
        (tmp_path / "nodes.parquet").rename(run.graph / "nodes.parquet")
    assert not list(tmp_path.iterdir())


def test_the_model_s_loss_by_hand() -> None:
    """One group, one edge, one negative on either side: the loss is the mean of two binary softmaxes."""
    config = replace(CONFIG, dim=4, scorer="transe", unit_rows=False, temperature=0.5)
    rows = torch.tensor(np.random.default_rng(0).normal(size=(4, 4)) * 0.3, dtype=torch.float32)
    with process_group() as processes:
        module = KgeModel(config, nodes=4, anchor=[True], seed=0)
        model = ShardedModel(module, TableOptions(), learning_rate=0.1, processes=processes)
        model.load_rows("node", rows)
        one = torch.tensor([[True, False]]).unsqueeze(0)
        head, tail, bad_head, bad_tail = (torch.tensor([[node]]) for node in (0, 1, 2, 3))
        log_q = torch.zeros(1, 2)
        loss = model(torch.tensor([0]), head, tail, bad_head, bad_tail, log_q, log_q, one, one)
        loss.backward()
        assert (model.gather_rows("node") != rows).any(1).all()
        assert model.module.translation.grad.abs().sum() > 0
    h, t, other_h, other_t = rows.numpy().astype(float)

    def energy(a: np.ndarray, b: np.ndarray) -> float:
        return np.exp(-((a - b) ** 2).sum() / 0.5)

    expected = -np.mean([
        np.log(energy(h, t) / (energy(h, t) + wrong)) for wrong in (energy(other_h, t), energy(h, other_t))
    ])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
