"""Where a ranker reads context features: the interface, and Feast's online store behind it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from online.ranking.batcher import Batcher
from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import NotPrepared

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

__all__ = ["BatchedContext", "ContextSource", "FeastContext"]

_PRESENT = 1  # Feast's FieldStatus.PRESENT, part of its wire format; importing Feast takes seconds
_NUMBERS = {"INT32", "INT64", "FLOAT", "DOUBLE", "BOOL", "UNIX_TIMESTAMP"}  # of feast.ValueType
_NOBODY = np.zeros(1, np.int64)
_COPIES_OF_A_CALL = 100  # a call of Feast takes as long as so many copies of a row in its answer
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

    def require(self, features: Sequence[ContextFeature], *, beside: Sequence[ContextFeature] = ()) -> None:
        """Read features once, for a pair without a row, before a model that takes them may score.

        Args:
            beside: features of models that score already, which must stay readable.

        Raises:
            NotPrepared: a feature cannot be read.
        """
        self.columns(features, users=_NOBODY, items=_NOBODY)


class FeastContext(ContextSource):
    """Context from `FeatureStore.get_online_features`, of views by user, by item, or by both.

    A registry is read once and kept, so that a `feast materialize` or `feast apply` beside this process neither blocks
    it nor changes what it reads halfway. Only `require` takes another, and only for features that this one does not
    have. One lock: Feast's SQLite store shares one connection.

    Args:
        features: required from the start.

    Raises:
        NotPrepared: there is no Feast repository, or a feature cannot be read.
    """

    def __init__(self, feature_repo: Path, features: Sequence[ContextFeature] = ()) -> None:
        self._feature_repo = feature_repo
        self._reading, self._requiring = threading.Lock(), threading.Lock()
        self._views = self._open()
        self.require(features)

    def columns(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        with self._reading:
            return self._views.read(features, users=users, items=items)

    def require(self, features: Sequence[ContextFeature], *, beside: Sequence[ContextFeature] = ()) -> None:
        """As `ContextSource.require`; reads the registry anew if it must. Requests go on with the one before."""
        with self._requiring:
            with self._reading:
                before = self._views.unreadable((*features, *beside))
            names = {feature.view for feature in features}
            if not names & before.keys():
                return
            views = self._open()
            after = views.unreadable((*features, *beside))
            if wrong := {view: why for view, why in after.items() if view in names or view not in before}:
                raise self._not_prepared("; ".join(f"{view}: {why}" for view, why in sorted(wrong.items())), [*wrong])
            with self._reading:
                self._views = views

    def _open(self) -> "_Views":
        from feast import FeatureStore
        from feast.errors import FeastError

        try:
            store = FeatureStore(repo_path=str(self._feature_repo))
            registry = store.config.registry
            registry.cache_ttl_seconds = 0  # never read again
            if registry.registry_type == "file":
                registry.cache_mode = "thread"  # "sync" reads a file again once it changes, whatever its age
        except (FeastError, OSError, ValueError) as error:
            raise self._not_prepared(f"{type(error).__name__}: {error}") from error
        return _Views(store)

    def _not_prepared(self, got: str, views: Sequence[str] = ()) -> NotPrepared:
        return NotPrepared(
            f"context features of {self._feature_repo}",
            expected=f"views {sorted(views)}, applied and readable" if views else "a Feast repository", got=got,
            remedy="Run `feast apply` and `feast materialize` there.",
        )


class _Views:
    """Feast's views, as one reading of the registry has them."""

    def __init__(self, store: "FeatureStore") -> None:
        self._store = store
        self._declared: dict[str, FeatureView] = {}  # Feast makes an object anew at each asking

    def read(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        """As `ContextSource.columns`. A request has one user: Feast would copy its row for every item."""
        asked, places = np.unique(users, return_inverse=True)
        apart = len(users) - len(asked) >= _COPIES_OF_A_CALL
        by_user = [f for f in features if apart and self._declaration(f.view).join_keys == ["user"]]
        others = [feature for feature in features if feature not in by_user]
        columns = {key: column[places] for key, column in self._answer(by_user, {"user": asked}).items()}
        columns |= self._answer(others, {"user": users, "item": items})
        return {feature.key: columns[feature.key] for feature in features}

    def unreadable(self, features: Sequence[ContextFeature]) -> dict[str, str]:
        """View -> why its features cannot be read, of those that cannot. Each view is read by itself."""
        by_view: dict[str, list[ContextFeature]] = {}
        for feature in features:
            by_view.setdefault(feature.view, []).append(feature)
        reasons = {}
        for view, its_features in by_view.items():
            try:
                self._require_numbers(view, its_features)
                self.read(its_features, users=_NOBODY, items=_NOBODY)
            except Exception as error:  # every online store has its own; this names the view and goes on to the next
                reasons[view] = f"{type(error).__name__}: {error}"
        return reasons

    def _require_numbers(self, view: str, features: Sequence[ContextFeature]) -> None:
        """Raise ValueError for a column of text, bytes or lists, which only a pair that has a row would show."""
        kinds = {field.name: field.dtype.to_value_type().name for field in self._declaration(view).features}
        for feature in features:
            if (kind := kinds.get(feature.column)) not in _NUMBERS:
                raise ValueError(f"column {feature.column}: expected a number, got {kind or 'no such column'}")

    def _declaration(self, view: str) -> "FeatureView":
        if view not in self._declared:
            self._declared[view] = self._store.registry.get_any_feature_view(
                view, self._store.project, allow_cache=True
            )
        return self._declared[view]

    def _answer(self, features: Sequence[ContextFeature], ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`ContextFeature.key` -> float64 (B,). `ids`: entity -> int64 (B,)."""
        # Two models may transform one column in two ways; Feast refuses to be asked for it twice.
        references = {feature.key: feature.reference for feature in features}
        if not references:
            return {}
        answer = self._store.get_online_features(
            features=list(references.values()),
            entity_rows={entity: values.tolist() for entity, values in ids.items()},
            full_feature_names=True,
        ).proto
        vectors = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
        return dict(zip(references, _numbers([vectors[key] for key in references]), strict=True))


class BatchedContext(ContextSource):
    """Another source, asked for the pairs of several requests at once: most of a small Feast call is the call.

    Args:
        max_pairs: most pairs in one call; beyond a few hundred, a call's time is that of its pairs.
        observe: told the number of requests in each call.
    """

    def __init__(
        self, source: ContextSource, *, max_pairs: int = 256, observe: Callable[[int], None] = lambda _: None
    ) -> None:
        self._source = source
        self._combined = Batcher(
            self._read, max_size=max_pairs, size=lambda asked: len(asked[1]), observe=observe
        )

    def columns(
        self, features: Sequence[ContextFeature], *, users: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        return self._combined.submit((tuple(features), users, items))

    def require(self, features: Sequence[ContextFeature], *, beside: Sequence[ContextFeature] = ()) -> None:
        self._source.require(features, beside=beside)

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
