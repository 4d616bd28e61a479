"""Golden numbers against references written out in numpy, and gradients that are there."""

import numpy as np
import pytest
import torch

from pipelines.contracts.errors import InvalidConfig
from training.losses import LOSSES, find_loss, log_expected_count

POSITIVE = np.array([1.0, -0.5])
NEGATIVE = np.array([[0.2, 0.9, -1.0], [0.4, -0.1, 0.3]])
HIDDEN = np.array([[False, True, False], [False, False, False]])
POSITIVE_LOG_Q = np.array([-1.0, -2.0])
NEGATIVE_LOG_Q = np.array([[-1.5, -0.5, -3.0], [-1.0, -1.0, -2.5]])
MARGIN = 0.7


def softmax_reference() -> float:
    total = 0.0
    for row in range(2):
        own = np.exp(POSITIVE[row] - POSITIVE_LOG_Q[row])
        others = sum(np.exp(NEGATIVE[row, c] - NEGATIVE_LOG_Q[row, c]) for c in range(3) if not HIDDEN[row, c])
        total -= np.log(own / (own + others))
    return total / 2


def logistic_reference() -> float:
    def log_sigmoid(x: float) -> float:
        return -np.log(1 + np.exp(-x))

    total = 0.0
    for row in range(2):
        seen = [log_sigmoid(-NEGATIVE[row, c]) for c in range(3) if not HIDDEN[row, c]]
        total -= log_sigmoid(POSITIVE[row]) + sum(seen) / len(seen)
    return total / 2


def margin_reference() -> float:
    total = 0.0
    for row in range(2):
        gaps = [max(0.0, MARGIN - POSITIVE[row] + NEGATIVE[row, c]) for c in range(3) if not HIDDEN[row, c]]
        total += sum(gaps) / len(gaps)
    return total / 2


REFERENCES = {"sampled_softmax": softmax_reference, "logistic": logistic_reference, "margin": margin_reference}


def evaluate(name: str, positive: torch.Tensor, negative: torch.Tensor, hidden: np.ndarray = HIDDEN) -> torch.Tensor:
    return find_loss(name)(
        positive, negative, positive_log_q=torch.tensor(POSITIVE_LOG_Q), negative_log_q=torch.tensor(NEGATIVE_LOG_Q),
        hidden=torch.tensor(hidden), margin=MARGIN,
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
class TestEveryLoss:
    def test_equals_the_reference(self, name: str) -> None:
        assert evaluate(name, torch.tensor(POSITIVE), torch.tensor(NEGATIVE)).item() == pytest.approx(
            REFERENCES[name](), abs=1e-12
        )

    def test_has_gradients_of_the_right_sign_and_none_for_what_is_hidden(self, name: str) -> None:
        positive = torch.tensor(POSITIVE, requires_grad=True)
        negative = torch.tensor(NEGATIVE, requires_grad=True)
        evaluate(name, positive, negative).backward()
        assert (positive.grad < 0).any() and (positive.grad <= 0).all()
        assert (negative.grad > 0).any() and (negative.grad >= 0).all()
        assert negative.grad[torch.tensor(HIDDEN)].abs().sum() == 0

    def test_is_finite_when_everything_is_hidden(self, name: str) -> None:
        positive = torch.tensor(POSITIVE, requires_grad=True)
        loss = evaluate(name, positive, torch.tensor(NEGATIVE), hidden=np.ones_like(HIDDEN))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(positive.grad).all()


def test_sampled_softmax_by_hand() -> None:
    # One negative, equal scores, the positive drawn e times as often: odds 1 : e, so -log(1 / (1 + e)).
    loss = find_loss("sampled_softmax")(
        torch.tensor([0.3]), torch.tensor([[0.3]]), positive_log_q=torch.tensor([1.0]),
        negative_log_q=torch.tensor([[0.0]]), hidden=torch.tensor([[False]]), margin=0.0,
    )
    assert loss.item() == pytest.approx(np.log(1 + np.e), rel=1e-6)


def test_expected_count_is_that_of_the_mixed_pool() -> None:
    random = np.random.default_rng(0)
    frequency = np.array([0.5, 0.3, 0.2, 0.0])
    pools = 4000
    drawn = random.choice(4, size=(pools, 6), p=frequency)
    uniform = random.integers(4, size=(pools, 10))
    seen = np.bincount(np.concatenate([drawn, uniform], 1).ravel(), minlength=4) / pools
    expected = log_expected_count(torch.tensor(frequency), in_batch=6, uniform=10, population=4).exp()
    np.testing.assert_allclose(seen, expected, rtol=0.05)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="sampled_softmax"):
        find_loss("hinge")
