"""Losses that tell a positive from sampled negatives; shared by the contrastive and the knowledge-graph facet.

Every loss has one signature, so that a configuration can name it:

    positive         (..., B)     score of each example's own candidate
    negative         (..., B, C)  scores of the pool's candidates
    positive_log_q   (..., B)     log of the expected number of times the pool holds that candidate
    negative_log_q   (..., B, C)  likewise; anything that broadcasts
    hidden           (..., B, C)  bool: this candidate is no negative for this example
    margin           float

and returns the mean over examples, a scalar. An example whose candidates are all hidden counts with loss 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.contracts.errors import InvalidConfig

__all__ = ["LOSSES", "find_loss", "log_expected_count", "logistic", "margin_ranking", "sampled_softmax"]

Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {}


def _loss(name: str) -> Callable[[Loss], Loss]:
    def register(function: Loss) -> Loss:
        LOSSES[name] = function
        return function

    return register


def find_loss(name: str) -> Loss:
    """The loss of that name; raises `InvalidConfig` if there is none."""
    if name not in LOSSES:
        raise InvalidConfig("loss", expected=f"one of {', '.join(LOSSES)}", got=repr(name), remedy="Choose one.")
    return LOSSES[name]


def log_expected_count(frequency: Tensor, *, in_batch: int, uniform: int, population: int) -> Tensor:
    """log of how often a candidate is expected in a pool of in-batch and uniform draws.

    The pool is the union of `in_batch` draws from the data's own distribution and `uniform` draws from all candidates.
    A candidate that came by one way could have come by the other, so both count whichever way it came (the balance
    heuristic of multiple importance sampling):

        E(i) = in_batch * frequency(i) + uniform / population,          Q(i) = E(i) / (in_batch + uniform)

    The difference between log E and log Q is the same for all candidates and cancels in a softmax.

    Args:
        frequency: (...,) share of the positives that are this candidate.
    """
    return torch.log(in_batch * frequency + uniform / population)


@_loss("sampled_softmax")
def sampled_softmax(
    positive: Tensor, negative: Tensor, *, positive_log_q: Tensor, negative_log_q: Tensor, hidden: Tensor, margin: float
) -> Tensor:
    """-log exp(s+ - log Q+) / (exp(s+ - log Q+) + sum exp(s- - log Q-)); arXiv 2509.04337. Ignores `margin`."""
    own = positive - positive_log_q  # (..., B)
    others = (negative - negative_log_q).masked_fill(hidden, -torch.inf)  # (..., B, C)
    return (torch.logsumexp(torch.cat([own.unsqueeze(-1), others], -1), -1) - own).mean()


@_loss("logistic")
def logistic(
    positive: Tensor, negative: Tensor, *, positive_log_q: Tensor, negative_log_q: Tensor, hidden: Tensor, margin: float
) -> Tensor:
    """-log sigmoid(s+) - mean log sigmoid(-s-); as PyTorch-BigGraph. Ignores log Q and `margin`."""
    return (functional.softplus(-positive) + _mean_visible(functional.softplus(negative), hidden)).mean()


@_loss("margin")
def margin_ranking(
    positive: Tensor, negative: Tensor, *, positive_log_q: Tensor, negative_log_q: Tensor, hidden: Tensor, margin: float
) -> Tensor:
    """mean max(0, margin - s+ + s-), with s = -d; as TransR (AAAI 2015). Ignores log Q."""
    return _mean_visible(torch.relu(margin - positive.unsqueeze(-1) + negative), hidden).mean()


def _mean_visible(values: Tensor, hidden: Tensor) -> Tensor:
    """Mean over the last axis of what is not hidden: (..., B, C) -> (..., B)."""
    visible = ~hidden
    return (values * visible).sum(-1) / visible.sum(-1).clamp(min=1)
