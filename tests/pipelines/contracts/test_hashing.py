import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.hashing import bucket_of, hash64

ids_64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64_finalizer(x: int) -> int:
    """Written out with Python's integers, independently of numpy's wrapping."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(ids=st.lists(ids_64, max_size=20), seed=st.integers(0, 2**63 - 1))
def test_hash_is_the_splitmix64_finalizer_of_the_id_and_the_hashed_seed(ids, seed):
    expected = [splitmix64_finalizer((id_ % 2**64) ^ splitmix64_finalizer(seed)) for id_ in ids]
    assert hash64(np.array(ids, np.int64), seed).tolist() == expected


@given(ids=st.lists(ids_64, max_size=50), buckets=st.integers(1, 2**31), seed=st.integers(0, 2**63 - 1))
def test_buckets_are_in_range_and_follow_the_top_bits(ids, buckets, seed):
    array = np.array(ids, np.int64)
    expected = [((int(h) >> 32) * buckets) >> 32 for h in hash64(array, seed)]
    assert bucket_of(array, buckets=buckets, seed=seed).tolist() == expected


def test_hashing_leaves_the_ids_alone():
    ids = np.array([1, 2, 3])
    hash64(ids, 5)
    assert ids.tolist() == [1, 2, 3]


def test_consecutive_ids_fill_buckets_evenly_under_every_seed():
    for seed in range(5):
        counts = np.bincount(bucket_of(np.arange(100_000), buckets=1_000, seed=seed), minlength=1_000)
        chi_square = ((counts - 100) ** 2 / 100).sum()
        assert 800 < chi_square < 1_200  # 999 degrees of freedom, standard deviation 45


def test_neighbouring_seeds_are_unrelated():
    ids = np.arange(100_000)
    same = np.mean(bucket_of(ids, buckets=64, seed=1) == bucket_of(ids, buckets=64, seed=2))
    assert abs(same - 1 / 64) < 0.002


@pytest.mark.parametrize("buckets", [0, -1, 2**31 + 1])
def test_impossible_numbers_of_buckets_are_refused(buckets):
    with pytest.raises(InvalidConfig, match="hash buckets"):
        bucket_of(np.arange(3), buckets=buckets, seed=0)
