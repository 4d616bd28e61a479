"""The one hash of ids: which bucket an id falls into, and where an index looks for it. Recorded by its seed."""

import numpy as np

from pipelines.contracts.errors import InvalidConfig

__all__ = ["bucket_of", "hash64", "seed_mask"]

MAX_BUCKETS = 2**31

# The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
# constants: Stafford's variant 13). A bijection of 64 bits: distinct ids never share a hash.
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def hash64(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Hash of each id: int64 (N,) -> uint64 (N,), a bijection for every seed (0 <= seed < 2**64).

    >>> hash64(np.array([0, 1, -1]), seed=7).tolist()
    [13225839796362995591, 7091162075535606283, 11222819077850215821]
    """
    hashed = np.array(ids, np.int64).view(np.uint64)
    hashed ^= seed_mask(seed)
    return _finalize(hashed)


def bucket_of(ids: np.ndarray, *, buckets: int, seed: int) -> np.ndarray:
    """Bucket of each id, int64 (N,) in [0, buckets): the top 32 bits of its hash, scaled.

    Raises:
        InvalidConfig: `buckets` is not in 1 .. 2**31.
    """
    if not 1 <= buckets <= MAX_BUCKETS:
        raise InvalidConfig(
            "hash buckets", expected=f"1 to {MAX_BUCKETS}", got=str(buckets), remedy="Choose another number."
        )
    return (((hash64(ids, seed) >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def seed_mask(seed: int) -> np.uint64:
    """What ids are xored with: the seed, hashed itself, so that neighbouring seeds have nothing in common."""
    return _finalize(np.array([seed], np.uint64))[0]


def _finalize(x: np.ndarray) -> np.ndarray:
    x ^= x >> _SHIFT_1
    x *= _MULTIPLY_1
    x ^= x >> _SHIFT_2
    x *= _MULTIPLY_2
    x ^= x >> _SHIFT_3
    return x
