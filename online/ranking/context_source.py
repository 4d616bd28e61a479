"""Where a ranker reads context features: the interface, and Feast's online store behind it."""

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from online.ranking.combine import Combined
from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import NotPrepared

if TYPE_CHECKING:
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

__all__ = ["CombinedContext", "ContextSource", "FeastContext"]

_PRESENT = 1  # Feast's FieldStatus.PRESENT, part of its wire format; importing Feast takes seconds
_Asked = tuple[tuple[ContextFeature, ...], np.ndarray, np.ndarray]  # features, users and items of one request


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
    blocks it nor changes what it reads halfway; it is read again for a view or feature that was not there. One lock:
    Feast's SQLite store shares one connection.

    Raises:
        NotPrepared: there is no Feast repository, or the views are not applied or not materialized.
    """

    def __init__(self, feature_repo: Path, features: Sequence[ContextFeature]) -> None:
        from feast import FeatureStore
        from feast.errors import FeastError, FeastObjectNotFoundException

        self._lock = threading.Lock()
        self._not_found = (FeastObjectNotFoundException, KeyError)
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
        if not features:
            return {}
        with self._lock:
            try:
                answer = self._answer(features, users, items)
            except self._not_found:  # of a model that is newer than this process: its views were applied since
                self._store.refresh_registry()
                answer = self._answer(features, users, items)
        vectors = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
        numbers = _numbers([vectors[feature.key] for feature in features])
        return {feature.key: column for feature, column in zip(features, numbers, strict=True)}

    def _answer(
        self, features: Sequence[ContextFeature], users: np.ndarray, items: np.ndarray
    ) -> "GetOnlineFeaturesResponse":
        return self._store.get_online_features(
            features=[feature.reference for feature in features],
            entity_rows={"user": users.tolist(), "item": items.tolist()},
            full_feature_names=True,
        ).proto


class CombinedContext(ContextSource):
    """Another source, asked for the pairs of several requests at once: most of a small Feast call is the call.

    Args:
        max_pairs: most pairs in one call; beyond a few hundred, a call's time is that of its pairs.
        observe: told the number of requests in each call.
    """

    def __init__(
        self, source: ContextSource, *, max_pairs: int = 256, observe: Callable[[int], None] = lambda _: None
    ) -> None:
        self._source = source
        self._combined = Combined(
            self._read, max_size=max_pairs, size=lambda asked: len(asked[1]), observe=observe
        )

    def columns(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        return self._combined.submit((tuple(features), users, items))

    def _read(self, asked: list[_Asked]) -> list[dict[str, np.ndarray]]:
        if len(asked) == 1:
            features, users, items = asked[0]
            return [self._source.columns(features, users=users, items=items)]
        # Requests that pinned other models may want other features: every column is read for all of them.
        columns = self._source.columns(
            list(dict.fromkeys(feature for features, _, _ in asked for feature in features)),
            users=np.concatenate([users for _, users, _ in asked]),
            items=np.concatenate([items for _, _, items in asked]),
        )
        ends = np.cumsum([len(users) for _, users, _ in asked]).tolist()
        return [
            {feature.key: columns[feature.key][end - len(users) : end] for feature in features}
            for (features, users, _), end in zip(asked, ends, strict=True)
        ]


def _numbers(vectors: "Sequence[GetOnlineFeaturesResponse.FeatureVector]") -> np.ndarray:
    """float64 (F, B) of the answers to F features, NaN where there is none; several times as fast as `to_dict`."""
    numbers = np.array([[value.double_val for value in vector.values] for vector in vectors], np.float64)
    absent = np.array([list(vector.statuses) for vector in vectors]) != _PRESENT
    for feature, row in np.argwhere((numbers == 0) & ~absent).tolist():  # what nothing, or another type, reads as, too
        value = vectors[feature].values[row]
        kind = value.WhichOneof("val")
        numbers[feature, row] = np.nan if kind in (None, "null_val") else getattr(value, kind)
    numbers[absent] = np.nan
    return numbers
