import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts.hashing import hash64
from pipelines.contracts.perfect_hash import BIN_KEYS, LOAD, MAX_PART_KEYS, build_part, fingerprint, salted, slot_of


def build(hashes: np.ndarray, load: float = LOAD) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, int]:
    n = len(hashes)
    slots = max(1, int(np.ceil(n / load)))
    pilots = np.full(max(1, int(np.ceil(n / BIN_KEYS))), 255, np.uint8)
    rows, remap = np.full(n, 65_535, np.uint16), np.full(slots - n, 65_535, np.uint16)
    return build_part(hashes, slots, pilots, rows, remap), pilots, rows, remap, slots


@given(st.sets(st.integers(-(2**63), 2**63 - 1), max_size=300))
def test_any_distinct_ids_get_rows_without_gaps(ids: set[int]) -> None:
    salt, _, rows, _, _ = build(hash64(np.array(sorted(ids), np.int64)))
    assert salt >= 0 and sorted(rows.tolist()) == list(range(len(ids)))


@pytest.mark.parametrize("n", [1, 2, 1_000, 40_000, MAX_PART_KEYS])
@pytest.mark.parametrize("load", [0.9, LOAD, 0.99])
def test_the_arrays_alone_give_every_key_its_row(n: int, load: float) -> None:
    hashes = hash64(np.arange(n), seed=n)
    salt, pilots, rows, remap, slots = build(hashes, load)
    assert sorted(rows.tolist()) == list(range(n))
    for i in range(0, n, max(1, n // 500)):  # recomputed with Python's integers
        hashed = int(hashes[i])
        pilot = int(pilots[((hashed & 0xFFFFFFFF) * len(pilots)) >> 32])
        mixed = ((hashed ^ ((pilot + 256 * salt) * 0x9E3779B97F4A7C15)) * 0xD6E8FEB86659FD93) % 2**64
        slot = ((mixed >> 32) * slots) >> 32
        assert slot == slot_of(hashes[i], np.uint64(pilot), salted(np.uint64(salt)), np.uint64(slots))
        assert rows[i] == (slot if slot < n else remap[slot - n])


def test_hashes_that_share_their_bin_are_told_apart() -> None:
    """The low 32 bits choose the bin: here all keys have the same ones."""
    hashes = (hash64(np.arange(8)) >> np.uint64(32) << np.uint64(32)) | np.uint64(7)
    salt, _, rows, _, _ = build(hashes, load=0.5)
    assert salt >= 0 and sorted(rows.tolist()) == list(range(8))


def test_what_cannot_be_placed_is_reported_and_does_not_hang() -> None:
    """Two equal hashes have no perfect hash; a table's ids are checked to be distinct long before this."""
    assert build(np.array([5, 5, 9], np.uint64))[0] == -1


def test_fingerprints_are_spread_evenly() -> None:
    fingerprints = np.array([fingerprint(hashed) for hashed in hash64(np.arange(200_000))], np.uint64)
    counts = np.bincount((fingerprints >> np.uint64(56)).astype(int), minlength=256)
    assert 150 < ((counts - 781.25) ** 2 / 781.25).sum() < 380  # 255 degrees of freedom, standard deviation 23
