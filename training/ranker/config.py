"""Section `ranker` of the configuration."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.contracts.errors import InvalidConfig

__all__ = ["RankerConfig"]


@dataclass(frozen=True)
class RankerConfig:
    """How the ranker is built and fine-tuned; `training/defaults.yaml` explains every key.

    Raises:
        InvalidConfig: a value out of its range.
    """

    epochs: int
    patience: int
    batch_rows: int
    dense_learning_rate: float
    weight_decay: float
    table_learning_rate: float
    freeze: bool
    row_scale: float
    init_std: float
    id_dropout: float
    cross_layers: int
    cross_rank: int
    hidden: tuple[int, ...]
    dropout: float
    row_dropout: float
    validation_rows: int
    task_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("epochs", "patience", "batch_rows", "cross_rank", "validation_rows"):
            self._require(key, getattr(self, key) >= 1, "at least 1")
        for key in ("dense_learning_rate", "row_scale", "init_std"):
            self._require(key, getattr(self, key) > 0, "more than 0")
        for key in ("weight_decay", "table_learning_rate", "cross_layers"):
            self._require(key, getattr(self, key) >= 0, "at least 0")
        for key in ("id_dropout", "dropout", "row_dropout"):
            self._require(key, 0 <= getattr(self, key) < 1, "a probability below 1")
        self._require("hidden", all(type(width) is int and width > 0 for width in self.hidden), "positive widths")
        weights = self.task_weights.values()
        self._require("task_weights", all(type(w) in (int, float) and w >= 0 for w in weights), "task: weight >= 0")

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidConfig(
                f"ranker.{key}", expected=expected, got=repr(getattr(self, key)), remedy="Correct the value."
            )
