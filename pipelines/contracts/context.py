"""Context features: which column of which Feast view the ranker reads, and how it becomes a number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipelines.contracts.errors import InvalidConfig

__all__ = ["CONTEXT_FEATURES", "TRANSFORMS", "ContextFeature", "context_matrix"]

SECONDS_PER_DAY = 86_400.0


def _log1p(raw: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(raw, 0.0))


TRANSFORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "log1p": lambda raw, now_seconds: _log1p(raw),
    "identity": lambda raw, now_seconds: raw,
    "log_days_since": lambda raw, now_seconds: _log1p((now_seconds - raw) / SECONDS_PER_DAY),
}
"""Name -> how a column, float64 (B,), becomes a number at the moments `now_seconds`, float64 (B,)."""


@dataclass(frozen=True)
class ContextFeature:
    """One column of a Feast feature view.

    `log1p` is for counts, `identity` for what is already a small number, `log_days_since` for a time in seconds since
    1970, turned into log(1 + days) before the moment of the request.
    """

    view: str
    column: str
    transform: str

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise InvalidConfig(
                f"context feature {self.reference}", expected=f"a transform of {tuple(TRANSFORMS)}",
                got=repr(self.transform), remedy="Correct the transform.",
            )

    @property
    def reference(self) -> str:
        """Feast's feature reference, `view:column`."""
        return f"{self.view}:{self.column}"

    @property
    def key(self) -> str:
        """The column's name in Feast's answers with full feature names, `view__column`."""
        return f"{self.view}__{self.column}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


CONTEXT_FEATURES = (
    ContextFeature("user_context", "events_7d", "log1p"),
    ContextFeature("user_context", "events_30d", "log1p"),
    ContextFeature("user_context", "active_days_30d", "log1p"),
    ContextFeature("user_context", "last_event", "log_days_since"),
    ContextFeature("item_context", "events_7d", "log1p"),
    ContextFeature("item_context", "events_30d", "log1p"),
    ContextFeature("item_context", "active_days_30d", "log1p"),
    ContextFeature("item_context", "first_event", "log_days_since"),
    ContextFeature("user_item_context", "events", "log1p"),
    ContextFeature("user_item_context", "active_days", "log1p"),
    ContextFeature("user_item_context", "last_event", "log_days_since"),
)
"""The context every dataset has: windows of activity by user and by item, and the pair's own history."""


def context_matrix(
    features: Sequence[ContextFeature], columns: Mapping[str, np.ndarray], now_seconds: np.ndarray
) -> np.ndarray:
    """Turn raw view columns into the upper model's context input.

    Training (from Feast's offline join) and serving (from its online store) call this same function.

    Args:
        columns: `ContextFeature.key` -> numbers, shape (B,); NaN where the view has no row.
        now_seconds: float64, shape (B,): the moment of each request, seconds since 1970.

    Returns:
        float32, shape (B, F); NaN stays NaN (the model has a flag for it).
    """
    matrix = np.empty((len(now_seconds), len(features)), np.float32)
    for position, feature in enumerate(features):
        raw = np.asarray(columns[feature.key], np.float64)
        matrix[:, position] = TRANSFORMS[feature.transform](raw, now_seconds)
    return matrix
