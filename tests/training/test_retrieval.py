import numpy as np
import pytest
import torch

from training.retrieval import top_k_quality
from training.sampling import KnownPairs


def test_recall_and_hits_by_hand() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    known = KnownPairs(np.array([0]), np.array([0]), keys=2)  # user 0 had item 0: it is not ranked
    held = KnownPairs(np.array([0, 0, 0, 1]), np.array([1, 3, 2, 0]), keys=2)
    quality = top_k_quality(lambda users: scores[users], np.array([0, 1]), known=known, held=held, k=2)
    # User 0: first two of [1, 2, 3] are 1 and 2, both wanted, of at most 2. User 1: 3 and 2; wanted is 0.
    assert quality == {"recall@2": pytest.approx(0.5), "hit@2": pytest.approx(0.5), "users": 2}


def test_a_perfect_score_is_one_and_scores_are_not_changed() -> None:
    random = np.random.default_rng(0)
    held = KnownPairs(np.arange(300), random.integers(0, 50, 300), keys=300)  # more users than one block
    scores = torch.zeros(300, 50)
    for user in range(300):
        scores[user, held.of(user)] = 1.0
    before = scores.clone()
    known = KnownPairs(np.empty(0, np.int64), np.empty(0, np.int64), keys=300)
    quality = top_k_quality(lambda users: scores[users], np.arange(300), known=known, held=held, k=1)
    assert quality["recall@1"] == 1.0 and torch.equal(scores, before)
