import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.idrule import IdRule

VOCABULARY = np.array([3, 8, 2**62])


def test_vocabulary_keeps_every_id_as_it_is():
    ids = np.array([8, -5, 9])
    assert IdRule().stored_ids(ids, vocabulary=VOCABULARY).tolist() == [8, -5, 9]


def test_hash_sends_every_id_to_a_bucket_the_vocabulary_notwithstanding():
    stored = IdRule("hash", buckets=7, seed=2).stored_ids(np.arange(1_000), vocabulary=VOCABULARY)
    assert sorted(set(stored.tolist())) == [-7, -6, -5, -4, -3, -2, -1]


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30), seed=st.integers(0, 2**63 - 1))
def test_buckets_take_what_the_vocabulary_does_not_know(ids, seed):
    rule = IdRule("vocabulary+buckets", buckets=5, seed=seed)
    array = np.array([*ids, 8, 3], np.int64)
    stored = rule.stored_ids(array, vocabulary=VOCABULARY)
    known = np.isin(array, VOCABULARY) | np.isin(array, rule.all_bucket_ids())
    assert (stored[known] == array[known]).all()
    assert set(stored[~known].tolist()) <= set(rule.all_bucket_ids().tolist())
    assert (stored[~known] == rule.bucket_ids(array[~known])).all()


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9), max_size=30), seed=st.integers(0, 2**63 - 1),
    name=st.sampled_from(["vocabulary", "vocabulary+buckets", "hash"]),
)
def test_a_stored_id_is_its_own_stored_id(ids, seed, name):
    rule = IdRule(name, buckets=0 if name == "vocabulary" else 5, seed=seed)
    stored = rule.stored_ids(np.array(ids, np.int64), vocabulary=VOCABULARY)
    assert rule.stored_ids(stored, vocabulary=VOCABULARY).tolist() == stored.tolist()
    buckets = rule.all_bucket_ids()
    assert rule.stored_ids(buckets, vocabulary=VOCABULARY).tolist() == buckets.tolist()


def test_an_empty_vocabulary_leaves_the_buckets():
    rule = IdRule("vocabulary+buckets", buckets=3)
    assert (rule.stored_ids(np.arange(9), vocabulary=np.array([], np.int64)) < 0).all()


def test_a_negative_id_beside_buckets_is_refused():
    with pytest.raises(InvalidConfig, match="negative ones name buckets"):
        IdRule("vocabulary+buckets", buckets=3).stored_ids(np.arange(3), vocabulary=np.array([-4, 2]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "modulo"},
        {"name": "vocabulary", "buckets": 4},
        {"name": "hash"},
        {"name": "hash", "buckets": -1},
        {"name": "vocabulary+buckets"},
        {"name": "hash", "buckets": 4, "seed": -1},
        {"name": "hash", "buckets": 4, "seed": 2**63},
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidConfig):
        IdRule(**wrong)
