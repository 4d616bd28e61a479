"""How good a ranker is, and how sure we are of it."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata, t

__all__ = ["mean_interval", "roc_auc", "task_aucs"]


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney U / (P N)).

    Args:
        labels: (N,), 0 or 1; NaN rows are left out.
        scores: (N,), any monotone score.

    Returns:
        NaN if one of the classes is absent.

    >>> roc_auc(np.array([0, 1, 1, np.nan]), np.array([0.2, 0.2, 0.9, 0.0]))
    0.75
    """
    known = ~np.isnan(labels)
    labels, scores = labels[known], scores[known]
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(scores)  # equal scores share their mean rank
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def task_aucs(tasks: Sequence[str], labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """ROC-AUC of each task; labels and scores are (N, T)."""
    return {task: roc_auc(labels[:, column], scores[:, column]) for column, task in enumerate(tasks)}


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float | None]:
    """Mean of independent runs and the half-width of its Student-t interval; None with fewer than two runs.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return mean, None
    return mean, float(t.ppf((1 + level) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
