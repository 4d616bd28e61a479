"""Which examples a step sees, and which candidates are no negatives for them."""

import numpy as np

__all__ = ["KnownPairs", "epoch_order", "generator"]

LISTED_PER_SEARCH = 8
"""Known values that can be listed in the time of one binary search; only speed depends on it."""


def generator(*parts: int) -> np.random.Generator:
    """Random numbers that depend on all parts (seed, epoch, step …) and nothing else."""
    # SeedSequence takes (0, 1) and (0, 1, 0) for the same: the number of parts tells them apart.
    return np.random.default_rng(np.random.SeedSequence((len(parts), *parts)))


def epoch_order(examples: int, *, per_step: int, random: np.random.Generator) -> np.ndarray:
    """Every example once in random order, cut into steps; the last step is filled from the beginning.

    Returns:
        int64, (steps, per_step), example numbers.
    """
    steps = -(-examples // per_step)
    return np.resize(random.permutation(examples), steps * per_step).reshape(steps, per_step)


class KnownPairs:
    """For each key (a user; or a head under a relation) the values (items; tails) that are known to belong to it.

    ```
    starts  [0, 2, 2, 5]            values of key k: values[starts[k]:starts[k + 1]]
    values  [7, 9, 1, 3, 7]
    ```

    >>> known = KnownPairs(np.array([0, 2]), np.array([7, 1]), keys=3)
    >>> known.hidden(np.array([0, 1]), np.array([1, 7, 7])).tolist()
    [[False, True, True], [False, False, False]]
    """

    def __init__(self, key: np.ndarray, value: np.ndarray, *, keys: int) -> None:
        self._span = int(value.max(initial=0)) + 1
        self._pairs = np.sort(key * self._span + value)
        self.values = self._pairs % self._span
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=keys))])

    def of(self, key: int) -> np.ndarray:
        """The values of one key."""
        return self.values[self.starts[key] : self.starts[key + 1]]

    def hidden(self, key: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which candidates are known for which key.

        Args:
            key: int64, (B,).
            candidates: int64, (C,).

        Returns:
            bool, (B, C).
        """
        counts = self.starts[key + 1] - self.starts[key]
        if counts.sum() > LISTED_PER_SEARCH * len(key) * len(candidates):
            return self._searched(key, candidates)
        row = np.repeat(np.arange(len(key)), counts)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        value = self.values[self.starts[key][row] + offset]
        distinct, column = np.unique(candidates, return_inverse=True)
        place = np.searchsorted(distinct, value)
        place[place == len(distinct)] = 0
        hit = distinct[place] == value
        known = np.zeros((len(key), len(distinct)), bool)
        known[row[hit], place[hit]] = True
        return known[:, column]

    def _searched(self, key: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """`hidden` by one binary search per pair: for keys such as a country, which know nearly everyone."""
        pairs = key[:, None] * self._span + candidates
        place = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        return (self._pairs[place] == pairs) & (candidates < self._span)
