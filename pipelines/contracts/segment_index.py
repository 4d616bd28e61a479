"""Lookup of ids in the arrays of a segment: the compiled part of `pipelines.contracts.segment`."""

import numpy as np
from numba import njit

from pipelines.contracts.perfect_hash import fingerprint, load64, prefetch, slot_of, store64

__all__ = ["FINGERPRINT_BYTES", "PARAMETERS", "gather", "locate"]

FINGERPRINT_BYTES = 2
PARAMETERS = ("seed_mask", "bucket_mask", "part_shift", "pilots", "slots", "vocabulary_rows", "buckets")
"""Order of the numbers that the kernels take as one uint64 array.

seed_mask, bucket_mask: what ids are xored with before they are hashed, for the index and for the buckets of the id rule;
part_shift: the part of a hash is `hash >> 1 >> part_shift`; pilots, slots: of each part.
"""

_BLOCK = 64  # ids under way at once: enough for their cache misses to overlap, few enough to stay in the first level

_U1, _U32, _MASK_32 = np.uint64(1), np.uint64(32), np.uint64(0xFFFFFFFF)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@njit(inline="always")
def _finalize(x):
    """`pipelines.contracts.hashing._finalize`, for one number."""
    x ^= x >> np.uint64(30)
    x *= _MULTIPLY_1
    x ^= x >> np.uint64(27)
    x *= _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


@njit(inline="always")
def _find_block(ids, base, count, parameters, parts, pilots, remap, rows, row_stride, positions, prints):
    """Candidate row of each of up to `_BLOCK` ids, whose cache lines are then on their way; nothing is compared yet."""
    seed_mask, part_shift = parameters[0], parameters[2]
    part_pilots, slots, vocabulary_rows, buckets = parameters[3], parameters[4], parameters[5], np.int64(parameters[6])
    for i in range(count):
        hashed = _finalize(np.uint64(ids[base + i]) ^ seed_mask)
        prints[i] = hashed
        part = np.int64((hashed >> _U1) >> part_shift)
        prefetch(pilots, part * np.int64(part_pilots) + np.int64(((hashed & _MASK_32) * part_pilots) >> _U32))
    for i in range(count):
        hashed = prints[i]
        part = np.int64((hashed >> _U1) >> part_shift)
        pilot = pilots[part * np.int64(part_pilots) + np.int64(((hashed & _MASK_32) * part_pilots) >> _U32)]
        first, part_rows = np.int64(parts[part, 0]), np.int64(parts[part + 1, 0] - parts[part, 0])
        row = slot_of(hashed, np.uint64(pilot), parts[part, 1], slots)
        if row >= part_rows and part_rows:
            row = np.int64(remap[part * np.int64(slots) - first + row - part_rows])
        position = buckets + first + row
        if not part_rows:
            position = buckets + np.int64(vocabulary_rows) - 1
        positions[i] = position
        prefetch(rows, position * row_stride)
        prefetch(rows, position * row_stride + row_stride - 1)


@njit(inline="always")
def _has_print(rows, at, hashed):
    return (np.uint16(rows[at]) | (np.uint16(rows[at + 1]) << np.uint16(8))) == fingerprint(hashed)


@njit(inline="always")
def _bucket_row(id_, parameters):
    """Row of the hash bucket of an id: bucket b lies at row buckets - 1 - b, which is the order of the stored ids."""
    hashed = _finalize(np.uint64(id_) ^ parameters[1])
    return np.int64(parameters[6]) - 1 - np.int64(((hashed >> _U32) * parameters[6]) >> _U32)


@njit(nogil=True, cache=True)
def locate(ids, parameters, parts, pilots, remap, rows, row_stride, out):
    """Write the row number of each id, or -1, to `out` (int64, (B,))."""
    positions, prints = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64)
    vocabulary_rows, buckets = parameters[5], parameters[6]
    for base in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - base)
        if vocabulary_rows:
            _find_block(ids, base, count, parameters, parts, pilots, remap, rows, row_stride, positions, prints)
        for i in range(count):
            if vocabulary_rows and _has_print(rows, (positions[i] + 1) * row_stride - FINGERPRINT_BYTES, prints[i]):
                out[base + i] = positions[i]
            elif buckets:
                out[base + i] = _bucket_row(ids[base + i], parameters)
            else:
                out[base + i] = -1


@njit(nogil=True, cache=True)
def gather(ids, parameters, parts, pilots, remap, rows, row_stride, default, out, found):
    """Copy the row of each id, or the default row, to `out` (uint8, (B * row_bytes,)), and say which were found.

    Where every id has a row the mask is True throughout.
    """
    row_bytes = row_stride - FINGERPRINT_BYTES
    positions, prints = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64)
    vocabulary_rows, buckets = parameters[5], parameters[6]
    for base in range(0, len(ids), _BLOCK):
        count = min(_BLOCK, len(ids) - base)
        if vocabulary_rows:
            _find_block(ids, base, count, parameters, parts, pilots, remap, rows, row_stride, positions, prints)
        for i in range(count):
            to = (base + i) * row_bytes
            if vocabulary_rows and _has_print(rows, positions[i] * row_stride + row_bytes, prints[i]):
                found[base + i] = True
                _copy(rows, positions[i] * row_stride, out, to, row_bytes)
            elif buckets:
                found[base + i] = True
                _copy(rows, _bucket_row(ids[base + i], parameters) * row_stride, out, to, row_bytes)
            else:
                found[base + i] = False
                _copy(default, 0, out, to, row_bytes)


@njit(inline="always")
def _copy(source, start, target, to, size):
    if size < 8:
        for i in range(size):
            target[to + i] = source[start + i]
        return
    i = 0
    while i + 8 <= size:
        store64(target, to + i, load64(source, start + i))
        i += 8
    if i < size:  # the last eight bytes again, rather than the rest one by one
        store64(target, to + size - 8, load64(source, start + size - 8))
