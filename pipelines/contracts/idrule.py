"""From an entity id to the id whose row it reads: the same function in pretraining, ranker, publishing and serving."""

from dataclasses import dataclass

import numpy as np

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.hashing import MAX_BUCKETS, bucket_of

__all__ = ["ID_RULES", "IdRule"]

ID_RULES = ("vocabulary", "vocabulary+buckets", "hash")


@dataclass(frozen=True)
class IdRule:
    """How ids of a table find their rows.

    ```
    vocabulary           an id of the vocabulary reads its own row; any other is unknown (the default row)
    vocabulary+buckets   an id of the vocabulary reads its own row; any other shares the row of its hash bucket
    hash                 every id shares the row of its hash bucket
    ```

    Bucket b is stored under the id `-1 - b`, so that a table with buckets is a table like any other: ids, ascending,
    with a row each. Where there are buckets beside a vocabulary, ids of the vocabulary are therefore not negative. A
    stored id is its own stored id (-1 to -buckets name their bucket and are not hashed again), so that it may be asked
    for wherever an id may: `stored_ids` before an offline join, which knows stored ids only, changes no online answer.

    Attributes:
        buckets: how many; 0 for `vocabulary`.
        seed: of the hash, 0 <= seed < 2**63.

    >>> rule = IdRule("vocabulary+buckets", buckets=4, seed=1)
    >>> rule.stored_ids(np.array([20, 99, 10]), vocabulary=np.array([10, 20])).tolist()
    [20, -2, 10]
    """

    name: str = "vocabulary"
    buckets: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ID_RULES:
            raise InvalidConfig(
                "id rule", expected=f"one of {ID_RULES}", got=repr(self.name),
                remedy="Publish with a rule that this Facet knows.",
            )
        if not (self.buckets == 0 if self.name == "vocabulary" else 1 <= self.buckets <= MAX_BUCKETS):
            raise InvalidConfig(
                f"buckets of id rule {self.name}",
                expected="0" if self.name == "vocabulary" else f"1 to {MAX_BUCKETS}", got=str(self.buckets),
                remedy="Set the rule and its buckets together.",
            )
        if not 0 <= self.seed < 2**63:
            raise InvalidConfig(
                "seed of the id hash", expected="0 to 2**63 - 1", got=str(self.seed), remedy="Choose another seed."
            )

    @property
    def has_buckets(self) -> bool:
        return self.buckets > 0

    def bucket_ids(self, ids: np.ndarray) -> np.ndarray:
        """Stored ids of the buckets that `ids` fall into, int64 (N,) in [-buckets, -1]."""
        return -1 - bucket_of(ids, buckets=self.buckets, seed=self.seed)

    def all_bucket_ids(self) -> np.ndarray:
        """Stored ids of all buckets, ascending: int64 (buckets,)."""
        return np.arange(-self.buckets, 0, dtype=np.int64)

    def stored_ids(self, ids: np.ndarray, *, vocabulary: np.ndarray) -> np.ndarray:
        """The id under which the row of each id is stored; an unknown id of `vocabulary` stays as it is.

        Args:
            ids: int64 (N,).
            vocabulary: int64 (V,), ascending, distinct; ignored by `hash`.

        Raises:
            InvalidConfig: a negative id in a vocabulary that has buckets beside it.
        """
        ids = np.asarray(ids, np.int64)
        if self.name == "vocabulary":
            return ids
        stored = (ids < 0) & (ids >= -self.buckets)
        if self.name != "hash" and len(vocabulary):
            if vocabulary[0] < 0:
                raise InvalidConfig(
                    "vocabulary with hash buckets", expected="ids of 0 and more: negative ones name buckets",
                    got=str(vocabulary[0]), remedy="Map the log's ids to 63 bits, or use another id rule.",
                )
            stored |= vocabulary[np.minimum(np.searchsorted(vocabulary, ids), len(vocabulary) - 1)] == ids
        return np.where(stored, ids, self.bucket_ids(ids))
