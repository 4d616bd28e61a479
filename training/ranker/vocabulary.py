"""From entity ids to rows of a training table."""

import numpy as np

__all__ = ["DEFAULT_ROW", "Vocabulary"]

DEFAULT_ROW = 0
"""Row of every training table that unknown and dropped ids read; it is published as the table's default row."""


class Vocabulary:
    """Which ids of an entity have a row of their own: id `ids[i]` reads row `i + 1`, every other id row 0.

    >>> Vocabulary(np.array([30, 10, 20, 10])).rows(np.array([20, 99, 10])).tolist()
    [2, 0, 1]
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = np.unique(np.asarray(ids, np.int64))

    @property
    def table_rows(self) -> int:
        """Rows of a training table: the ids and the default row."""
        return len(self.ids) + 1

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 ids (N,) -> int64 row numbers (N,)."""
        if not len(self.ids):
            return np.full(len(ids), DEFAULT_ROW, np.int64)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place + 1, DEFAULT_ROW)
