"""Who is asked for: users and items of a version, the popular ones more often, and a few that no version knows."""

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts.errors import VersionNotFound
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace

__all__ = ["UNKNOWN_SHARE", "ZIPF_EXPONENT", "Population"]

UNKNOWN_SHARE = 0.02
ZIPF_EXPONENT = 1.1


class Population:
    """Users and items to ask for: zipfian over the ids of a version's tables, and a few that no version knows.

    Args:
        ids: entity -> int64 (N,), unique.
        unknown_share: probability that an id is drawn from outside.
        zipf_exponent: the id of popularity rank r is drawn in proportion to r ** -zipf_exponent; 0: all alike.

    >>> population = Population({"item": np.array([17, 42])}, seed=0, unknown_share=0.0)
    >>> set(population.draw("item", 100, np.random.default_rng(0)).tolist()) == {17, 42}
    True
    """

    def __init__(
        self, ids: dict[str, np.ndarray], *, seed: int, unknown_share: float = UNKNOWN_SHARE,
        zipf_exponent: float = ZIPF_EXPONENT,
    ) -> None:
        shuffle = np.random.default_rng(seed)
        self._ids = {entity: shuffle.permutation(values) for entity, values in ids.items()}
        self._cumulative = {}
        for entity, values in ids.items():
            weight = 1.0 / np.arange(1, len(values) + 1) ** zipf_exponent
            self._cumulative[entity] = np.cumsum(weight / weight.sum())
        self._unknown_share = unknown_share

    @classmethod
    def of_version(
        cls, workspace: Workspace, version: int, *, seed: int, unknown_share: float = UNKNOWN_SHARE,
        zipf_exponent: float = ZIPF_EXPONENT,
    ) -> "Population":
        """All ids that any table of the version has a row for."""
        manifest = workspace.versions.manifest(version)
        ids: dict[str, np.ndarray] = {}
        for spec in manifest.tables:
            path = workspace.versions.path(version) / Manifest.table_path(spec.name)
            known = pq.read_table(path, columns=["id"])["id"].to_numpy()
            ids[spec.entity] = np.union1d(ids.get(spec.entity, np.empty(0, np.int64)), known)
        if empty := [entity for entity, values in ids.items() if not len(values)]:
            raise VersionNotFound(
                f"ids of version {version}", expected="at least one per entity", got=f"none of {empty}",
                remedy="Publish a version with rows.",
            )
        return cls(ids, seed=seed, unknown_share=unknown_share, zipf_exponent=zipf_exponent)

    def draw(self, entity: str, size: int, random: np.random.Generator) -> np.ndarray:
        """int64 (size,), popular ids more often; unknown ones are negative."""
        rank = np.searchsorted(self._cumulative[entity], random.random(size))
        ids = self._ids[entity][np.minimum(rank, len(self._ids[entity]) - 1)]
        unknown = random.random(size) < self._unknown_share
        return np.where(unknown, -random.integers(1, 2**62, size), ids)
