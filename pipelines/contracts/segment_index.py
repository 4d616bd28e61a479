"""Lookup of ids in the arrays of a segment: the compiled part of `pipelines.contracts.segment`."""

import numpy as np
from numba import njit

from pipelines.contracts.perfect_hash import fingerprint, load64, prefetch, salted, slot_of, store64

__all__ = [
    "MIN_ROW_BYTES", "PARAMETERS", "copy_words", "finalize", "gather", "gather_newer", "locate", "match_rows",
    "parts_table", "row_stride",
]

MIN_ROW_BYTES = 8
"""Stored rows are at least a machine word long, so that they can be copied by words."""
PARAMETERS = (
    "seed_mask", "bucket_mask", "part_shift", "pilots", "slots", "vocabulary_rows", "buckets", "fingerprint_shift",
)
"""Order of the numbers that the kernels take as one uint64 array.

seed_mask, bucket_mask: what ids are xored with before they are hashed, for the index and for the id rule's buckets;
part_shift: the part of a hash is `hash >> 1 >> part_shift`; pilots, slots: of each part; fingerprint_shift: how many
low bits of the word that ends with a row's fingerprint are not of the fingerprint.
"""

_BLOCK = 128  # ids under way at once: enough for their cache misses to overlap, few enough to stay in the first level

_U1, _U2, _U3, _U4, _U32, _MASK_32 = (np.uint64(n) for n in (1, 2, 3, 4, 32, 0xFFFFFFFF))
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def parts_table(parts: np.ndarray, *, slots: int, buckets: int) -> np.ndarray:
    """What lookups need to know of each part, side by side: uint64 (4 P,).

    Its first row, its number of rows, its salted term of a pilot (`perfect_hash.slot_of`), and what added to a slot
    beyond its rows gives the slot's place in the remap.

    Args:
        parts: uint64 (P + 1, 2), as a segment stores it.
    """
    first, rows = parts[:-1, 0], np.diff(parts[:, 0])
    remap = np.arange(len(rows), dtype=np.uint64) * np.uint64(slots) - first - rows
    return np.stack([first + np.uint64(buckets), rows, salted(parts[:-1, 1]), remap], axis=1).reshape(-1)


def row_stride(row_bytes: int, fingerprint_bytes: int) -> int:
    """Bytes from one stored row to the next."""
    return max(row_bytes, MIN_ROW_BYTES) + fingerprint_bytes


@njit(nogil=True, cache=True)
def finalize(x):
    """`pipelines.contracts.hashing._finalize`, for one number."""
    x ^= x >> np.uint64(30)
    x *= _MULTIPLY_1
    x ^= x >> np.uint64(27)
    x *= _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _find_block(ids, base, count, parameters, parts, pilots, remap, rows, stride, positions, hashes, waiting):
    """Candidate row of each of up to `_BLOCK` ids, whose cache lines are then on their way; nothing is compared yet."""
    seed_mask, part_shift = parameters[0], parameters[2]
    part_pilots, slots, buckets = parameters[3], parameters[4], parameters[6]
    stride, waits = np.uint64(stride), 0
    for i in range(count):
        hashed = finalize(np.uint64(ids[base + i]) ^ seed_mask)
        hashes[i] = hashed
        part = (hashed >> _U1) >> part_shift
        at = part * part_pilots + (((hashed & _MASK_32) * part_pilots) >> _U32)
        positions[i] = at
        prefetch(pilots, at)
    for i in range(count):
        hashed = hashes[i]
        part = (hashed >> _U1) >> part_shift
        at = part * _U4
        row = slot_of(hashed, np.uint64(pilots[positions[i]]), parts[at + _U2], slots)
        if row < parts[at + _U1]:
            positions[i] = parts[at] + row
            prefetch(rows, positions[i] * stride)
            prefetch(rows, positions[i] * stride + stride - _U1)
        else:  # one in twenty
            positions[i] = parts[at + _U3] + row
            prefetch(remap, positions[i])
            waiting[waits] = i
            waits += 1
    for i in waiting[:waits]:
        first = parts[((hashes[i] >> _U1) >> part_shift) * _U4]
        # a part without rows has none to point at
        positions[i] = min(first + np.uint64(remap[positions[i]]), buckets + parameters[5] - _U1)
        prefetch(rows, positions[i] * stride)
        prefetch(rows, positions[i] * stride + stride - _U1)


@njit(nogil=True, cache=True)
def _has_fingerprint(rows, end, hashed, fingerprint_shift):
    """Whether the row that ends, fingerprint and all, before byte `end` is marked with a hash's fingerprint."""
    return (load64(rows, end - 8) ^ fingerprint(hashed)) >> fingerprint_shift == 0


@njit(nogil=True, cache=True)
def _names_bucket(id_, parameters):
    """Whether an id is a bucket's stored id (`pipelines.contracts.idrule`), which no other id's row may shadow."""
    return id_ < 0 and id_ >= -np.int64(parameters[6])


@njit(nogil=True, cache=True)
def _bucket_row(id_, parameters):
    """Row of the hash bucket of an id: bucket b lies at row buckets - 1 - b, which is the order of the stored ids."""
    if _names_bucket(id_, parameters):
        return np.int64(parameters[6]) + id_
    hashed = finalize(np.uint64(id_) ^ parameters[1])
    return np.int64(parameters[6]) - 1 - np.int64(((hashed >> _U32) * parameters[6]) >> _U32)


@njit(nogil=True, cache=True)
def locate(ids, parameters, parts, pilots, remap, rows, stride, out):
    """Write the row number of each id, or -1, to `out` (int64, (B,))."""
    positions, hashes, waiting = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64)
    # read once: storing rows may change any array, as far as the compiler knows
    vocabulary_rows, buckets, fingerprint_shift = parameters[5], parameters[6], parameters[7]
    for base in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - base)
        if vocabulary_rows:
            _find_block(ids, base, count, parameters, parts, pilots, remap, rows, stride, positions, hashes, waiting)
        for i in range(count):
            position = np.int64(positions[i])
            end = (position + 1) * stride
            known = vocabulary_rows > 0 and _has_fingerprint(rows, end, hashes[i], fingerprint_shift)
            if known and not _names_bucket(ids[base + i], parameters):
                out[base + i] = position
            elif buckets:
                out[base + i] = _bucket_row(ids[base + i], parameters)
            else:
                out[base + i] = -1


@njit(nogil=True, cache=True)
def gather(ids, parameters, parts, pilots, remap, rows, stride, default, row_bytes, out, found):
    """Copy the row of each id, or the default row, to `out`, and say which were found.

    Where every id has a row the mask is True throughout.

    Args:
        default: uint8 (stored_row_bytes,).
        out: uint8, at least (B * row_bytes + MIN_ROW_BYTES,): a row shorter than that is copied with what follows it,
            which the next row overwrites.
    """
    size = max(row_bytes, MIN_ROW_BYTES)
    positions, hashes, waiting = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64)
    # read once: storing rows may change any array, as far as the compiler knows
    vocabulary_rows, buckets, fingerprint_shift = parameters[5], parameters[6], parameters[7]
    for base in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - base)
        if vocabulary_rows:
            _find_block(ids, base, count, parameters, parts, pilots, remap, rows, stride, positions, hashes, waiting)
        for i in range(count):
            start = np.int64(positions[i]) * stride
            known = vocabulary_rows > 0 and _has_fingerprint(rows, start + stride, hashes[i], fingerprint_shift)
            if buckets and (not known or _names_bucket(ids[base + i], parameters)):
                start, known = _bucket_row(ids[base + i], parameters) * stride, True
            found[base + i] = known
            if known:
                copy_words(rows, start, out, (base + i) * row_bytes, size)
            else:
                copy_words(default, 0, out, (base + i) * row_bytes, size)


@njit(nogil=True, cache=True)
def gather_newer(ids, base, replaced, overlay, default, row_bytes, out, found):
    """As `gather`, of a newer version: rows of `base` whose bit in `replaced` is not set, all others of `overlay`.

    Args:
        base, overlay: each (parameters, parts, pilots, remap, rows, stride).
        replaced: uint8, a bit for each row of `base`, lowest first.
    """
    parameters, parts, pilots, remap, rows, stride = base
    size = max(row_bytes, MIN_ROW_BYTES)
    positions, hashes, waiting = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64)
    asked, places, asks = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64), 0
    buckets = parameters[6]  # read once, as in `gather`
    for first in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - first)
        if parameters[5]:
            _find_block(ids, first, count, parameters, parts, pilots, remap, rows, stride, positions, hashes, waiting)
            for i in range(count):
                prefetch(replaced, positions[i] >> np.uint64(3))
        for i in range(count):
            start = np.int64(positions[i]) * stride
            known = parameters[5] > 0 and _has_fingerprint(rows, start + stride, hashes[i], parameters[7])
            if buckets and _names_bucket(ids[first + i], parameters):
                known = False
            if known and not _has_bit(replaced, positions[i]):
                found[first + i] = True
                copy_words(rows, start, out, (first + i) * row_bytes, size)
            else:
                asked[asks], places[asks] = ids[first + i], first + i
                asks += 1
    if not asks:
        return
    parameters, parts, pilots, remap, rows, stride = overlay
    others, others_found = np.empty(asks * row_bytes + MIN_ROW_BYTES, np.uint8), np.empty(asks, np.bool_)
    gather(
        asked[:asks], parameters, parts, pilots, remap, rows, stride, default, row_bytes, others, others_found
    )
    for i in range(asks):
        found[places[i]] = others_found[i]
        # not by words: what follows a short row is another's here, and is there already
        for byte in range(row_bytes):
            out[places[i] * row_bytes + byte] = others[i * row_bytes + byte]


@njit(nogil=True, cache=True)
def match_rows(ids, given, row_bytes, base, replaced, kept, changed):
    """Compare rows of a newer table with those that `base` has for their ids.

    Args:
        given: uint8 (B * row_bytes,), the rows of `ids`.
        base: (parameters, parts, pilots, remap, rows, stride).
        replaced, kept: uint8, a bit for each row of `base`. A row that is not yet replaced and has the same bytes is
            kept; one that has other bytes is replaced from now on.
        changed: bool (B,), filled: whether the id's row is not one that is kept.
    """
    parameters, parts, pilots, remap, rows, stride = base
    positions, hashes, waiting = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64)
    buckets = parameters[6]
    for first in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - first)
        if parameters[5]:
            _find_block(ids, first, count, parameters, parts, pilots, remap, rows, stride, positions, hashes, waiting)
        for i in range(count):
            changed[first + i] = True
            start = np.int64(positions[i]) * stride
            known = parameters[5] > 0 and _has_fingerprint(rows, start + stride, hashes[i], parameters[7])
            if buckets and _names_bucket(ids[first + i], parameters):
                known = False
            if not known or _has_bit(replaced, positions[i]):
                continue
            changed[first + i] = not _same(rows, start, given, (first + i) * row_bytes, row_bytes)
            bits = replaced if changed[first + i] else kept
            bits[positions[i] >> np.uint64(3)] |= np.uint8(1 << (np.int64(positions[i]) & 7))


@njit(nogil=True, cache=True)
def _has_bit(bits, number):
    return (bits[number >> np.uint64(3)] >> (number & np.uint64(7))) & np.uint64(1) != 0


@njit(nogil=True, cache=True)
def _same(left, start, right, to, size):
    """Whether `size` bytes from left[start] and right[to] on are the same."""
    same = True
    for word in range(size >> 3):
        same &= load64(left, start + 8 * word) == load64(right, to + 8 * word)
    for byte in range(size & ~7, size):
        same &= left[start + byte] == right[to + byte]
    return same


@njit(nogil=True, cache=True)
def copy_words(source, start, target, to, size):
    """Copy `size` >= 8 bytes by words; the last word overlaps the one before. A loop over bytes takes twice as long."""
    for word in range(size >> 3):
        store64(target, to + 8 * word, load64(source, start + 8 * word))
    store64(target, to + size - 8, load64(source, start + size - 8))
