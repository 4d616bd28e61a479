"""The training loop: it learns what is planted, its batches cover the fold, a seed gives one result."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import InvalidConfig
from training.ranker.inputs import Fold
from training.ranker.pretrained import PretrainedTable, vocabularies_of, warm_rows
from training.ranker.train import batches, fit
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary
from training.tables import Processes, TableOptions, process_group

TASKS = ("click", "convert")
NAMES = ("user.contrastive", "item.contrastive", "user.kge", "item.kge")


def planted(users: np.ndarray, items: np.ndarray, rows: int, seed: int) -> Fold:
    """Clicks where the hidden vectors agree; conversions of clicks where they agree strongly; no useful context."""
    generator = np.random.default_rng(seed)
    user, item = generator.integers(0, len(users), rows), generator.integers(0, len(items), rows)
    liking = (users[user] * items[item]).sum(1)
    click = (liking + generator.logistic(0, 0.3, rows) > 0).astype(np.float32)
    labels = np.stack([click, np.where(click == 1, liking > 1, np.nan)], axis=1).astype(np.float32)
    return Fold(user, item, labels, generator.normal(size=(rows, len(CONTEXT_FEATURES))).astype(np.float32))


@pytest.fixture(scope="module")
def truth():
    generator = np.random.default_rng(0)
    return generator.normal(size=(150, 8)) * 0.8, generator.normal(size=(150, 8)) * 0.8


@pytest.fixture(scope="module")
def folds(truth):
    sizes = {"finetune": 3_000, "validation": 1_500, "test": 3_000}
    return {name: planted(*truth, rows, seed) for seed, (name, rows) in enumerate(sizes.items())}


def train(folds, truth, config, *, warm, seed=0):
    hidden = dict(zip(("user", "item"), truth, strict=True))
    pretrained = {
        name: PretrainedTable(name, np.arange(150), hidden[name.partition(".")[0]].astype(np.float32)) for name in NAMES
    }
    vocabularies = vocabularies_of(pretrained, {"user": folds["finetune"].user, "item": folds["finetune"].item})
    first = {
        name: warm_rows(table, vocabularies[table.entity], scale=0.5, std=config.init_std, seed=seed)
        for name, table in pretrained.items()
        if warm
    }
    with process_group() as processes:
        return fit(
            folds, vocabularies, dict.fromkeys(NAMES, 8), first, tasks=TASKS, seed=seed, config=config,
            options=TableOptions(), processes=processes,
        )


def test_it_learns_and_warm_rows_that_know_the_truth_win(folds, truth, small):
    config = replace(small, epochs=4, row_dropout=0.0, id_dropout=0.02)
    warm, cold = (train(folds, truth, config, warm=warm) for warm in (True, False))
    assert warm.metrics["auc"]["click"] > 0.85 > cold.metrics["auc"]["click"]
    assert warm.metrics["auc"]["convert"] > 0.6
    losses = [point["train_loss"] for point in warm.metrics["curve"]]
    assert losses[-1] < losses[0]


def test_the_best_epoch_is_kept_and_training_stops_after_patience(folds, truth, small):
    config = replace(small, epochs=8, patience=1, table_learning_rate=0.5, dense_learning_rate=0.02)
    trained = train(folds, truth, config, warm=True)
    means = [np.mean(list(point["validation_auc"].values())) for point in trained.metrics["curve"]]
    best = trained.metrics["best_epoch"]
    assert means[best - 1] == max(means)
    assert len(means) == min(config.epochs, best + config.patience)


def test_frozen_rows_stay_and_others_move(folds, truth, small):
    frozen = train(folds, truth, replace(small, freeze=True, epochs=1), warm=True)
    tuned = train(folds, truth, replace(small, epochs=1), warm=True)
    scale = 0.5 / np.sqrt((truth[0] ** 2).mean())
    np.testing.assert_allclose(frozen.tables["user.kge"].weight, truth[0] * scale, rtol=1e-5)
    assert np.abs(tuned.tables["user.kge"].weight - truth[0] * scale).max() > 1e-3


def test_a_seed_gives_one_result_and_another_seed_another(folds, truth, small):
    first, again, other = (train(folds, truth, replace(small, epochs=1), warm=False, seed=seed) for seed in (3, 3, 4))
    for name in NAMES:
        np.testing.assert_array_equal(first.tables[name].weight, again.tables[name].weight)
        assert not np.array_equal(first.tables[name].weight, other.tables[name].weight)
    assert first.metrics["auc"] == again.metrics["auc"] != other.metrics["auc"]


def test_a_weight_for_no_task_or_tables_of_two_widths_are_refused(folds, truth, small):
    with pytest.raises(InvalidConfig, match="task_weights"):
        train(folds, truth, replace(small, task_weights={"clicks": 2.0}), warm=False)
    with process_group() as processes, pytest.raises(InvalidConfig, match="one dimension"):
        fit(
            folds, {"user": Vocabulary(np.arange(3)), "item": Vocabulary(np.arange(3))},
            {"user.kge": 4, "item.contrastive": 8}, {}, tasks=TASKS, seed=0, config=small, options=TableOptions(),
            processes=processes,
        )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_every_step_and_cover_the_fold_once(folds, size):
    fold = folds["finetune"]
    everyone = {"user": Vocabulary(np.arange(150)), "item": Vocabulary(np.arange(150))}
    shares = [
        list(
            batches(
                fold, everyone, batch_rows=250, id_dropout=0.0, generator=np.random.default_rng(5),
                processes=Processes(rank, size, torch.device("cpu")),
            )
        )
        for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    for step in zip(*shares, strict=True):
        assert sum(len(batch.labels) for batch in step) == pytest.approx(step[0].step_rows * size)
    seen = np.concatenate([batch.row_numbers["user"].numpy() for share in shares for batch in share]) - 1
    np.testing.assert_array_equal(np.sort(seen), np.sort(fold.user))
    context = np.concatenate([batch.context.numpy()[:, 0] for share in shares for batch in share])
    np.testing.assert_array_equal(np.sort(context), np.sort(fold.context[:, 0]))


def test_ids_are_dropped_as_often_as_asked(folds):
    everyone = {"user": Vocabulary(np.arange(150)), "item": Vocabulary(np.arange(150))}
    steps = batches(
        folds["finetune"], everyone, batch_rows=100, id_dropout=0.2, generator=np.random.default_rng(0),
        processes=Processes(0, 1, torch.device("cpu")),
    )
    dropped = {"user": [], "item": []}
    for batch in steps:
        for entity, rows in batch.row_numbers.items():
            dropped[entity].append((rows == DEFAULT_ROW).numpy())
    user, item = (np.concatenate(dropped[entity]) for entity in ("user", "item"))
    assert 0.17 < user.mean() < 0.23 and 0.17 < item.mean() < 0.23
    assert 0.02 < (user & item).mean() < 0.06  # independent of each other
