"""A minimal perfect hash: n distinct 64-bit hashes to the rows 0 .. n-1, in about three bits a key.

After R. Groot Koerkamp, "PtrHash: Minimal Perfect Hashing at RAM Throughput" (arXiv:2502.15539): keys fall into small
bins, and each bin has an 8-bit *pilot* that sends its keys to slots which no other bin uses. A bin that finds no such
pilot takes the slots of others, which then look again. There are a few percent more slots than keys; the keys beyond
slot n are remapped to the slots left free below it.

```
hash ─┬─ top bits ───► part      at most 65,535 keys, built alone: its arrays stay in the cache
      ├─ low 32 bits ► bin ───── pilot
      └─ all, pilot, salt ─────► slot ──(slot >= n: remap)──► row within the part
```
"""

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "BIN_KEYS", "LOAD", "MAX_PART_KEYS", "build_part", "fingerprint", "load64", "prefetch", "salted",
    "slot_of", "store64",
]

MAX_PART_KEYS = 65_535  # a row within its part is a uint16
BIN_KEYS = 3.0  # mean keys of a bin: fewer build faster and take more pilots
LOAD = 0.97  # keys over slots in the fullest part
_PILOTS = 256
_RECENT = 16  # bins placed last are not evicted, or two would chase one another
_SALTS = 256

_U32, _MASK_32 = np.uint64(32), np.uint64(0xFFFFFFFF)
_PILOT_FACTOR, _SLOT_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_FINGERPRINT_FACTOR = np.uint64(0xA0761D6478BD642F)


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]` (1-D) without waiting for it."""

    def code(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args)
        pointer = builder.bitcast(pointer, cgutils.ir.IntType(8).as_pointer())
        i32 = cgutils.ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, cgutils.ir.FunctionType(cgutils.ir.VoidType(), [pointer.type, i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # for reading, into every level, data
        return context.get_dummy_value()

    return types.void(array, index), code


@intrinsic
def load64(typing_context, array, index):
    """The eight bytes from `array[index]` on (uint8, 1-D, any alignment) as uint64; no bounds are checked."""

    def code(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args)
        return builder.load(builder.bitcast(pointer, cgutils.ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, index), code


@intrinsic
def store64(typing_context, array, index, value):
    """Write uint64 `value` to the eight bytes from `array[index]` on (uint8, 1-D); no bounds are checked."""

    def code(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args)
        builder.store(args[2], builder.bitcast(pointer, cgutils.ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, index, types.uint64), code


def _pointer(context, builder, signature, args):
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


def salted(salt):
    """The part of a pilot's term that is the same for all bins of a part: uint64, of a number or of an array."""
    with np.errstate(over="ignore"):
        return np.uint64(_PILOTS) * salt * _PILOT_FACTOR


@njit(nogil=True, cache=True)
def slot_of(hashed, pilot, salted_term, slots):
    """Slot in [0, slots) of a hash under a pilot (0..255) and its part's `salted(salt)`; all are uint64."""
    mixed = (hashed ^ (pilot * _PILOT_FACTOR + salted_term)) * _SLOT_FACTOR
    return ((mixed >> _U32) * slots) >> _U32


@njit(nogil=True, cache=True)
def fingerprint(hashed):
    """A hash, mixed once more (a bijection): its top bits are what a row is marked with."""
    return hashed * _FINGERPRINT_FACTOR


@njit(nogil=True, cache=True)
def build_part(hashes, slots, pilots, rows, remap):
    """Find the pilots of one part.

    Args:
        hashes: uint64 (n,), distinct, n <= MAX_PART_KEYS.
        slots: number of slots S >= n.
        pilots: uint8 (bins,), filled.
        rows: uint16 (n,), filled with the row within the part of each hash: a permutation of 0 .. n-1.
        remap: uint16 (S - n,), filled with the row of each slot from n on.

    Returns:
        The salt under which the pilots were found, or -1 if there is none (which a correct input does not see).
    """
    n, bins = len(hashes), len(pilots)
    starts = np.zeros(bins + 1, np.int64)
    for hashed in hashes:
        starts[np.int64(((hashed & _MASK_32) * np.uint64(bins)) >> _U32) + 1] += 1
    largest = 0
    for bin_ in range(bins):
        largest = max(largest, starts[bin_ + 1])
        starts[bin_ + 1] += starts[bin_]
    cursor = starts[:-1].copy()
    keys = np.empty(n, np.uint64)  # by bin
    sources = np.empty(n, np.int64)
    for i in range(n):
        bin_ = np.int64(((hashes[i] & _MASK_32) * np.uint64(bins)) >> _U32)
        keys[cursor[bin_]], sources[cursor[bin_]] = hashes[i], i
        cursor[bin_] += 1
    order = _by_size_descending(starts, largest)
    for salt in range(_SALTS):
        owner = np.full(slots, -1, np.int32)
        term = np.uint64(_PILOTS) * np.uint64(salt) * _PILOT_FACTOR
        if _find_pilots(keys, starts, order, largest, slots, term, pilots, owner):
            _assign_rows(keys, starts, sources, slots, term, pilots, owner, rows, remap)
            return salt
    return -1


@njit(nogil=True, cache=True)
def _by_size_descending(starts, largest):
    bins = len(starts) - 1
    place = np.zeros(largest + 2, np.int64)
    for bin_ in range(bins):
        place[largest - (starts[bin_ + 1] - starts[bin_]) + 1] += 1
    for size in range(largest + 1):
        place[size + 1] += place[size]
    order = np.empty(bins, np.int32)
    for bin_ in range(bins):
        size = largest - (starts[bin_ + 1] - starts[bin_])
        order[place[size]] = bin_
        place[size] += 1
    return order


@njit(nogil=True, cache=True)
def _find_pilots(keys, starts, order, largest, slots, salted_term, pilots, owner):
    """Fill `pilots` and `owner` (bin of each slot, -1: free); False if the evictions do not come to an end."""
    recent, waiting = np.full(_RECENT, -1, np.int32), np.empty(len(order) + 1, np.int32)
    chosen = np.empty(largest, np.int64)
    evictions, limit = 0, 20 * len(order) + 1_000
    for next_bin in order:
        if starts[next_bin + 1] == starts[next_bin]:
            pilots[next_bin] = 0
            continue
        waiting[0], waits = next_bin, 1
        while waits:
            waits -= 1
            bin_ = waiting[waits]
            first, size = starts[bin_], starts[bin_ + 1] - starts[bin_]
            pilot = _free_pilot(keys[first : first + size], slots, salted_term, owner, chosen)
            if pilot < 0:
                pilot = _cheapest_pilot(
                    keys[first : first + size], slots, salted_term, owner, starts, recent, (evictions * 37) % _PILOTS,
                    chosen,
                )
                if pilot < 0:
                    return False
                for i in range(size):
                    holder = owner[chosen[i]]
                    if holder >= 0:
                        for j in range(starts[holder], starts[holder + 1]):
                            owner[slot_of(keys[j], np.uint64(pilots[holder]), salted_term, np.uint64(slots))] = -1
                        waiting[waits] = holder
                        waits += 1
                        evictions += 1
                if evictions > limit:
                    return False
            pilots[bin_] = pilot
            for i in range(size):
                owner[chosen[i]] = bin_
            recent[(evictions + bin_) % _RECENT] = bin_
    return True


@njit(nogil=True, cache=True)
def _free_pilot(keys, slots, salted_term, owner, chosen):
    """The first pilot that sends all keys of a bin to free slots, put into `chosen`; -1 if there is none."""
    for pilot in range(_PILOTS):
        free = True
        for i in range(len(keys)):
            slot = np.int64(slot_of(keys[i], np.uint64(pilot), salted_term, np.uint64(slots)))
            if owner[slot] >= 0:
                free = False
                break
            chosen[i] = slot
        if free and _distinct(chosen, len(keys)):
            return pilot
    return -1


@njit(nogil=True, cache=True)
def _cheapest_pilot(keys, slots, salted_term, owner, starts, recent, first_pilot, chosen):
    """The pilot whose slots cost least to clear: the sum of squared sizes of the bins that must leave them.

    The search starts at a changing pilot, so that a bin does not take the same slots back from whom it lost them to.
    """
    best, best_pilot, taken = np.int64(2**62), -1, np.empty(len(keys), np.int64)
    for trial in range(_PILOTS):
        pilot, cost = (first_pilot + trial) % _PILOTS, np.int64(0)
        for i in range(len(keys)):
            taken[i] = slot_of(keys[i], np.uint64(pilot), salted_term, np.uint64(slots))
            holder = owner[taken[i]]
            if holder >= 0:
                size = starts[holder + 1] - starts[holder]
                cost += size * size
                for last in recent:
                    if last == holder:
                        cost = np.int64(2**62)
            if cost >= best:
                break
        if cost < best and _distinct(taken, len(keys)):
            best, best_pilot = cost, pilot
            chosen[: len(keys)] = taken
    return best_pilot


@njit(nogil=True, cache=True)
def _distinct(values, size):
    for i in range(1, size):
        for j in range(i):
            if values[i] == values[j]:
                return False
    return True


@njit(nogil=True, cache=True)
def _assign_rows(keys, starts, sources, slots, salted_term, pilots, owner, rows, remap):
    n, free = len(keys), 0
    for beyond in range(len(remap)):
        remap[beyond] = 0
        if owner[n + beyond] >= 0:
            while owner[free] >= 0:
                free += 1
            remap[beyond] = free
            free += 1
    for bin_ in range(len(starts) - 1):
        for i in range(starts[bin_], starts[bin_ + 1]):
            slot = np.int64(slot_of(keys[i], np.uint64(pilots[bin_]), salted_term, np.uint64(slots)))
            rows[sources[i]] = slot if slot < n else remap[slot - n]
