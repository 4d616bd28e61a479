"""The training network: golden numbers for its loss, its gradients, and its vocabulary."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.upper_config import UpperConfig
from training.ranker.model import Ranker, masked_bce
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary
from training.tables import ShardedModel, TableOptions, process_group

TABLES = {"user.contrastive": 4, "item.contrastive": 4, "user.kge": 4, "item.kge": 4}


def reference_loss(logits, labels, weights, rows):
    """The same in numpy, one label at a time."""
    total = 0.0
    for logit_row, label_row in zip(logits, labels, strict=True):
        for logit, label, weight in zip(logit_row, label_row, weights, strict=True):
            if not np.isnan(label):
                probability = 1 / (1 + np.exp(-logit))
                total += -weight * (label * np.log(probability) + (1 - label) * np.log(1 - probability))
    return total / rows


@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_masked_loss_equals_numpy(batch, tasks, seed):
    generator = np.random.default_rng(seed)
    logits, weights = generator.normal(0, 2, (batch, tasks)), generator.random(tasks)
    labels = generator.choice([0.0, 1.0, np.nan], (batch, tasks))
    loss = masked_bce(torch.tensor(logits), torch.tensor(labels), weights=torch.tensor(weights))
    assert loss.item() == pytest.approx(reference_loss(logits, labels, weights, batch), abs=1e-9)


def test_masked_loss_golden_number():
    # -log sigmoid(0) = log 2 twice, and -2 log(1 - sigmoid(log 3)) = 2 log 4; divided by 2 examples
    logits, labels = torch.tensor([[0.0, 9.0], [0.0, np.log(3.0)]]), torch.tensor([[1.0, np.nan], [0.0, 0.0]])
    loss = masked_bce(logits, labels, weights=torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx((2 * np.log(2) + 2 * np.log(4)) / 2, rel=1e-6)


def test_what_has_no_label_gets_no_gradient():
    logits = torch.zeros(3, 2, requires_grad=True)
    labels = torch.tensor([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0]])
    masked_bce(logits, labels, weights=torch.ones(2)).backward()
    assert ((logits.grad != 0) == ~torch.isnan(labels)).all()


def test_the_mean_over_processes_is_the_loss_of_the_whole_step():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 2, generator=generator)
    labels = torch.randint(0, 2, (7, 2), generator=generator).float()
    labels[2, 0] = labels[5, 1] = np.nan
    weights = torch.tensor([1.0, 0.5])
    whole = masked_bce(logits, labels, weights=weights)
    parts = [masked_bce(logits[r::2], labels[r::2], weights=weights, rows=7 / 2) for r in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_every_table_and_every_layer_learns():
    config = UpperConfig(tables=TABLES, context=CONTEXT_FEATURES, tasks=("click", "convert"), hidden=(8,), cross_rank=4)
    torch.manual_seed(0)
    with process_group() as processes:
        ranker = Ranker(config, {"user": 5, "item": 7})
        model = ShardedModel(ranker, TableOptions(), learning_rate=0.1, processes=processes)
        for name in TABLES:
            model.init_rows(name, std=0.1, seed=0)
        before = {name: model.gather_rows(name) for name in TABLES}
        rows = {"user": torch.tensor([0, 1, 1, 4]), "item": torch.tensor([6, 2, 2, 0])}
        logits = model(rows, torch.randn(4, len(CONTEXT_FEATURES)))
        masked_bce(logits, torch.tensor([[1.0, 0.0]] * 4), weights=torch.ones(2)).backward()
        for name, old in before.items():
            moved = (model.gather_rows(name) != old).any(1)
            touched = torch.zeros(len(old), dtype=torch.bool)
            touched[rows[name.partition(".")[0]]] = True
            assert torch.equal(moved, touched), name
        gradients = {name: parameter.grad for name, parameter in ranker.upper.named_parameters()}
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values()), gradients


@given(st.lists(st.integers(-(2**62), 2**62), max_size=30), st.lists(st.integers(-(2**62), 2**62), max_size=30))
def test_known_ids_have_their_own_row_and_others_the_default(known, asked):
    vocabulary = Vocabulary(np.array(known, np.int64))
    rows = vocabulary.rows(np.array(known + asked, np.int64))
    place = {int(number): row + 1 for row, number in enumerate(sorted(set(known)))}
    assert rows.tolist() == [place.get(number, DEFAULT_ROW) for number in known + asked]
    assert vocabulary.table_rows == len(set(known)) + 1
