"""From entity ids to rows of a training table."""

import numpy as np

from pipelines.contracts.idrule import IdRule

__all__ = ["DEFAULT_ROW", "Vocabulary"]

DEFAULT_ROW = 0
"""Row of every training table that unknown and dropped ids read; it is published as the table's default row."""


class Vocabulary:
    """Which row of an entity's training tables an id reads: that of its stored id `ids[i]` is row `i + 1`.

    ```
    row 0                 the default row: ids that the rule gives no row of their own or of a bucket
    rows 1 to K           the K hash buckets, stored as -K to -1, if the id rule has any
    rows K + 1 to N       ids with a row of their own
    ```

    Args:
        ids: stored ids, any order, repeats allowed; all buckets of the rule are added.

    >>> Vocabulary(np.array([30, 10, 20, 10])).rows(np.array([20, 99, 10])).tolist()
    [2, 0, 1]
    >>> rule = IdRule("vocabulary+buckets", buckets=2)
    >>> Vocabulary(np.array([30, 10, 20]), rule).rows(np.array([20, 99, 10])).tolist()
    [4, 2, 3]
    """

    def __init__(self, ids: np.ndarray, rule: IdRule | None = None) -> None:
        self.rule = rule or IdRule()
        self.ids = np.unique(np.concatenate([self.rule.all_bucket_ids(), np.asarray(ids, np.int64)]))

    @property
    def table_rows(self) -> int:
        """Rows of a training table: the stored ids and the default row."""
        return len(self.ids) + 1

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers of ids, int64 (N,) -> int64 (N,)."""
        return self.stored_rows(self.rule.stored_ids(ids, vocabulary=self.ids[self.rule.buckets :]))

    def stored_rows(self, stored: np.ndarray) -> np.ndarray:
        """Row numbers of stored ids, int64 (N,) -> int64 (N,)."""
        if not len(self.ids):
            return np.full(len(stored), DEFAULT_ROW, np.int64)
        place = np.minimum(np.searchsorted(self.ids, stored), len(self.ids) - 1)
        return np.where(self.ids[place] == stored, place + 1, DEFAULT_ROW)

    def empty_buckets(self, *stored: np.ndarray) -> np.ndarray:
        """Row numbers of the buckets that are in none of these arrays of stored ids."""
        return self.stored_rows(np.setdiff1d(self.rule.all_bucket_ids(), np.concatenate([*stored])))
