"""How well scores find what users came to later: recall@k and hit@k."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.sampling import KnownPairs

__all__ = ["top_k_quality"]

BLOCK_USERS = 256


def top_k_quality(
    score: Callable[[np.ndarray], Tensor], users: np.ndarray, *, known: KnownPairs, held: KnownPairs, k: int
) -> dict[str, float]:
    """Mean recall@k and hit@k over users: all items are ranked but those the user had in training.

    Args:
        score: int64 (B,) users -> fp32 (B, N), one score per item.
        users: int64 (U,), each with at least one held-out item.
        known: user -> items in training (left out of the ranking).
        held: user -> held-out items.

    Returns:
        `recall@k`: share of a user's held-out items (of at most k) among the first k; `hit@k`: share of users with any.
    """
    recall, hit = [], []
    for begin in range(0, len(users), BLOCK_USERS):
        block = users[begin : begin + BLOCK_USERS]
        scores = score(block).clone()
        for row, user in enumerate(block):
            scores[row, torch.from_numpy(known.of(user))] = -torch.inf
        best = scores.topk(min(k, scores.shape[1]), dim=1).indices.numpy()
        for row, user in enumerate(block):
            wanted = held.of(user)
            found = np.isin(best[row], wanted).sum()
            recall.append(found / min(len(wanted), k))
            hit.append(found > 0)
    return {f"recall@{k}": float(np.mean(recall)), f"hit@{k}": float(np.mean(hit)), "users": len(users)}
