"""Where a ranker reads context features: the interface, and Feast's online store behind it."""

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import NotPrepared

__all__ = ["ContextSource", "FeastContext"]


class ContextSource(ABC):
    """Raw context columns of (user, item) pairs, as `pipelines.contracts.context.context_matrix` takes them."""

    @abstractmethod
    def columns(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        """
        Args:
            users, items: int64, shape (B,) each: one pair per row.

        Returns:
            `ContextFeature.key` -> float64 (B,); NaN where the view has no row.
        """


class FeastContext(ContextSource):
    """Context from `FeatureStore.get_online_features`, all views in one call: Feast reads a user's row only once.

    The registry is read once and kept, so that a `feast materialize` or `feast apply` beside this process neither
    blocks it nor changes what it reads halfway. One lock: Feast's SQLite store shares one connection.

    Raises:
        NotPrepared: there is no Feast repository, or the views are not applied or not materialized.
    """

    def __init__(self, feature_repo: Path, features: Sequence[ContextFeature]) -> None:
        from feast import FeatureStore
        from feast.errors import FeastError

        self._lock = threading.Lock()
        try:
            self._store = FeatureStore(repo_path=str(feature_repo))
            self._store.config.registry.cache_ttl_seconds = 0  # never refreshed
            self.columns(features, users=np.zeros(1, np.int64), items=np.zeros(1, np.int64))
        except (FeastError, OSError, KeyError, ValueError, sqlite3.Error) as error:
            raise NotPrepared(
                f"context features of {feature_repo}", expected="the context views, applied and materialized",
                got=f"{type(error).__name__}: {error}", remedy="Run `feast apply` and `feast materialize` there.",
            ) from error

    def columns(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        with self._lock:
            answer = self._store.get_online_features(
                features=[feature.reference for feature in features],
                entity_rows={"user": users.tolist(), "item": items.tolist()},
                full_feature_names=True,
            ).to_dict()
        return {feature.key: np.array(answer[feature.key], np.float64) for feature in features}
