import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from pipelines.contracts.errors import InvalidConfig, InvalidEvents, InvalidTable
from pipelines.contracts.workspace import Run
from tests.planted import CLUSTERS, CUT, WINDOW_END, item_ids, planted_run, user_ids
from training import contrastive
from training.config import load_section
from training.contrastive import ContrastiveBatches, ContrastiveConfig, ContrastiveModel, Pairs, train_contrastive
from training.facet_io import load_rows
from training.losses import find_loss
from training.tables import Processes, ShardedModel, TableOptions, process_group

CONFIG = replace(
    load_section("contrastive", ContrastiveConfig), dim=8, epochs=12, groups=2, group_rows=32, uniform_negatives=16
)
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return planted_run(tmp_path_factory.mktemp("planted"))[1]


def train(run: Run, directory: Path, config: ContrastiveConfig = CONFIG, *, seed: int = 0) -> dict:
    with process_group() as processes:
        train_contrastive(
            run.pairs, directory, config, tables=TableOptions(), window_end=WINDOW_END, seed=seed, processes=processes
        )
    return json.loads((directory / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("facets") / "contrastive-s0"
    train(run, directory)
    return directory


def test_it_finds_the_planted_structure_that_popularity_cannot(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["holdout"]["recall@20"] > metrics["holdout"]["popularity"]["recall@20"] + 0.3
    losses = [entry["loss"] for entry in metrics["curve"]]
    assert losses[-1] < losses[0] and len(losses) == CONFIG.epochs
    users, user = load_rows(trained / "user.safetensors")
    items, item = load_rows(trained / "item.safetensors")
    of_user = {int(key): number % CLUSTERS for number, key in enumerate(user_ids())}
    of_item = {int(key): number % CLUSTERS for number, key in enumerate(item_ids())}
    same = np.array([[of_user[int(u)] == of_item[int(i)] for i in items] for u in users])
    cosine = (functional.normalize(user, dim=1) @ functional.normalize(item, dim=1).T).numpy()
    assert cosine[same].mean() > cosine[~same].mean() + 0.5


def test_rows_are_those_of_trained_ids_at_the_scale_that_was_asked(trained: Path, run: Run) -> None:
    pairs = pq.read_table(run.pairs).to_pandas()
    early = pairs[pairs.event_timestamp < CUT]
    for entity in ("user", "item"):
        ids, weight = load_rows(trained / f"{entity}.safetensors")
        assert ids.tolist() == sorted(early[entity].unique())
        assert weight.norm(dim=1).tolist() == pytest.approx([1.0] * len(ids), abs=1e-5)


def test_held_out_pairs_are_new_and_never_trained_on(run: Run) -> None:
    pairs = Pairs.read(run.pairs, cut=CUT)
    every = pq.read_table(run.pairs).to_pandas()
    early = every[every.event_timestamp < CUT]
    trained = set(zip(pairs.user_ids[pairs.user], pairs.item_ids[pairs.item], strict=True))
    assert trained == set(zip(early.user, early.item, strict=True)) and len(pairs.user) == len(early)
    held = set(zip(pairs.user_ids[pairs.held_user], pairs.item_ids[pairs.held_item], strict=True))
    late = every[every.event_timestamp >= CUT]
    assert held and held <= set(zip(late.user, late.item, strict=True)) and not held & trained


def test_what_happens_on_the_held_out_days_changes_no_row(run: Run, trained: Path, tmp_path: Path) -> None:
    table = pq.read_table(run.pairs).to_pandas()
    late = table.event_timestamp >= CUT
    table.loc[late, "item"] = np.random.default_rng(5).permutation(table.loc[late, "item"].to_numpy())
    other = Run(tmp_path / "other")
    other.directory.mkdir()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False, schema=pq.read_schema(run.pairs)), other.pairs)
    train(other, tmp_path / "contrastive-s0")
    for entity in ("user", "item"):
        name = f"{entity}.safetensors"
        assert (tmp_path / "contrastive-s0" / name).read_bytes() == (trained / name).read_bytes()


def test_the_seed_decides(run: Run, tmp_path: Path) -> None:
    short = replace(CONFIG, epochs=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run, tmp_path / name, short, seed=seed)
    rows = [(tmp_path / name / "user.safetensors").read_bytes() for name in "abc"]
    assert rows[0] == rows[1] != rows[2]


def test_without_held_out_days_everything_is_trained_on(run: Run, tmp_path: Path) -> None:
    metrics = train(run, tmp_path / "f", replace(CONFIG, epochs=1, holdout_days=0))
    assert metrics["holdout"] == {} and metrics["pairs"] == pq.read_metadata(run.pairs).num_rows


def test_an_interrupted_training_ends_with_the_same_rows(run: Run, trained: Path, tmp_path: Path, monkeypatch) -> None:
    directory = tmp_path / "contrastive-s0"
    made = ContrastiveBatches.__call__

    def dies_in_epoch_six(self: ContrastiveBatches, epoch: int):
        if epoch == 5:
            raise KeyboardInterrupt
        return made(self, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ContrastiveBatches, "__call__", dies_in_epoch_six)
        train(run, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["contrastive-s0.partial.safetensors"]
    epochs = []


    def counted(self: ContrastiveBatches, epoch: int):
        epochs.append(epoch)
        return made(self, epoch)

    monkeypatch.setattr(ContrastiveBatches, "__call__", counted)
    metrics = train(run, directory)
    assert epochs == list(range(5, CONFIG.epochs)) and len(metrics["curve"]) == CONFIG.epochs
    assert (directory / "user.safetensors").read_bytes() == (trained / "user.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["contrastive-s0"]


def test_a_loss_that_is_not_finite_stops_and_writes_nothing(run: Run, tmp_path: Path, monkeypatch) -> None:
    init = ShardedModel.init_rows

    def overflowing(self: ShardedModel, table: str, *, std: float, seed: int) -> None:
        init(self, table, std=1e30, seed=seed)

    monkeypatch.setattr(ShardedModel, "init_rows", overflowing)  # lengths overflow: as from a rate far too high
    monkeypatch.setattr(contrastive.functional, "normalize", lambda rows, dim: rows)
    with pytest.raises(InvalidTable, match="finite"):
        train(run, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_no_pairs_are_refused(run: Run, tmp_path: Path) -> None:
    empty = Run(tmp_path / "v1")
    empty.directory.mkdir()
    pq.write_table(pq.read_table(run.pairs).slice(0, 0), empty.pairs)
    with pytest.raises(InvalidEvents, match="at least one pair"):
        Pairs.read(empty.pairs, cut=None)
    with pytest.raises(InvalidEvents, match="all held out"):
        Pairs.read(run.pairs, cut=CUT - timedelta(days=400))


def test_groups_that_do_not_divide_are_refused(run: Run) -> None:
    pairs = Pairs.read(run.pairs, cut=CUT)
    with pytest.raises(InvalidConfig, match=r"contrastive\.groups"):
        ContrastiveBatches(pairs, CONFIG, seed=0, processes=Processes(0, 3, torch.device("cpu")))


class TestBatches:
    @pytest.fixture
    def pairs(self, run: Run) -> Pairs:
        return Pairs.read(run.pairs, cut=CUT)

    def test_two_processes_share_one_process_s_steps(self, pairs: Pairs) -> None:
        whole = ContrastiveBatches(pairs, CONFIG, seed=3, processes=ALONE)(1)
        halves = [
            ContrastiveBatches(pairs, CONFIG, seed=3, processes=Processes(rank, 2, torch.device("cpu")))(1)
            for rank in range(2)
        ]
        for one, first, second in zip(whole, *halves, strict=True):
            for tensor, a, b in zip(one, first, second, strict=True):
                assert torch.equal(tensor, torch.cat([a, b]))

    @pytest.mark.parametrize("mask_known", [True, False])
    def test_no_visible_candidate_is_the_pairs_own_item(self, pairs: Pairs, mask_known: bool) -> None:
        known = set(zip(pairs.user, pairs.item, strict=True))
        config = replace(CONFIG, mask_known=mask_known)
        user, item, pool, _, hidden = next(ContrastiveBatches(pairs, config, seed=0, processes=ALONE)(0))
        candidates = torch.cat([item, pool], 1)
        for group, row, column in np.ndindex(*hidden.shape):
            u, own, other = int(user[group, row]), int(item[group, row]), int(candidates[group, column])
            assert bool(hidden[group, row, column]) == (((u, other) in known) if mask_known else (other == own))

    def test_log_q_is_how_often_the_pool_holds_an_item(self, pairs: Pairs) -> None:
        batches = ContrastiveBatches(pairs, replace(CONFIG, group_rows=33), seed=0, processes=ALONE)
        seen, pools = np.zeros(len(pairs.item_ids)), 0
        expected = np.zeros(len(pairs.item_ids))
        for epoch in range(60):
            for _, item, pool, log_q, _ in batches(epoch):
                # What one pair sees: the items of the 32 others, and the uniform pool.
                seen += np.bincount(torch.cat([item[:, 1:], pool], 1).ravel(), minlength=len(seen))
                pools += len(item)
                expected[torch.cat([item, pool], 1).ravel()] = log_q.ravel().exp()
        np.testing.assert_allclose(seen / pools, expected, rtol=0.15)


@pytest.mark.parametrize("learned", [True, False])
def test_the_model_is_cosine_over_temperature(learned: bool) -> None:
    config = replace(CONFIG, dim=4, temperature=0.25, learn_temperature=learned)
    random = np.random.default_rng(0)
    users, items = random.normal(size=(4, 4)), random.normal(size=(5, 4))
    user, item, pool = np.array([[0, 1]]), np.array([[2, 3]]), np.array([[4]])
    log_q = np.log(np.array([[0.2, 0.3, 0.5]]))
    hidden = np.array([[[True, False, False], [False, True, False]]])
    with process_group() as processes:
        model = ShardedModel(
            ContrastiveModel(config, users=4, items=5), TableOptions(), learning_rate=0.1, processes=processes
        )
        model.load_rows("user", torch.tensor(users, dtype=torch.float32))
        model.load_rows("item", torch.tensor(items, dtype=torch.float32))
        loss = model(*(torch.tensor(a) for a in (user, item, pool)), torch.tensor(log_q).float(), torch.tensor(hidden))
        loss.backward()
        gradients = [parameter.grad.abs().item() for parameter in model.dense_parameters()]
        moved = (model.gather_rows("user").numpy() - users).any(1), (model.gather_rows("item").numpy() - items)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
    score = unit(users[[0, 1]]) @ unit(items[[2, 3, 4]]).T / 0.25  # (2, 3)
    expected = find_loss("sampled_softmax")(
        torch.tensor(np.diag(score).copy()), torch.tensor(score), positive_log_q=torch.tensor(log_q[0, :2]),
        negative_log_q=torch.tensor(log_q), hidden=torch.tensor(hidden[0]), margin=0.0,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(gradient > 1e-6 for gradient in gradients) and len(gradients) == learned
    assert np.abs(moved[1][[2, 3, 4]]).min(1).max() > 1e-3 and np.abs(moved[1][[0, 1]]).max() < 1e-6
