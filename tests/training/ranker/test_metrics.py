"""ROC-AUC against scikit-learn and by hand; intervals against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import t
from sklearn.metrics import roc_auc_score

from training.ranker.metrics import mean_interval, roc_auc, task_aucs


@given(
    hnp.arrays(np.float64, st.integers(2, 60), elements=st.sampled_from([0.0, 1.0])),
    st.integers(1, 5), st.integers(0, 2**32 - 1),
)
def test_auc_is_scikit_learns_ties_included(labels, distinct_scores, seed):
    scores = np.random.default_rng(seed).integers(0, distinct_scores, len(labels)).astype(np.float32)
    if labels.min() == labels.max():
        assert math.isnan(roc_auc(labels, scores))
    else:
        assert roc_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_by_hand_and_what_has_no_label_is_left_out():
    labels, scores = np.array([1, 0, 1, 0, np.nan]), np.array([0.9, 0.9, 0.5, 0.1, 0.0])
    # pairs: .9 against .9 (half), .9 against .1, .5 against .9 (lost), .5 against .1
    assert roc_auc(labels, scores) == pytest.approx((0.5 + 1 + 0 + 1) / 4)


def test_each_task_has_its_own_column():
    labels = np.array([[1, np.nan], [0, 1], [0, 0]])
    scores = np.array([[0.9, 0.5], [0.1, 0.2], [0.2, 0.8]])
    assert task_aucs(["click", "convert"], labels, scores) == {"click": 1.0, "convert": 0.0}


def test_interval_is_students():
    values = [0.71, 0.74, 0.72]
    mean, half = mean_interval(values)
    assert mean == pytest.approx(np.mean(values))
    low, high = t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / np.sqrt(3))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_one_run_has_no_interval():
    assert mean_interval([0.7]) == (0.7, None)
