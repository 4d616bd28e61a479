"""The shape of an upper model: read strictly, and bounded before anything is built from it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.ids import ENTITIES
from pipelines.contracts.strict import build

__all__ = ["MAX_LAYERS", "MAX_WIDTH", "UpperConfig"]

MAX_WIDTH = 16_384
"""Most columns of a table, units of a layer, rank of a crossing layer, context features or tasks."""

MAX_LAYERS = 64
"""Most tables, crossing layers or hidden layers."""


@dataclass(frozen=True)
class UpperConfig:
    """Shape of an upper model; all that is needed to build it before its weights are loaded.

    Attributes:
        tables: name -> dimension, in the order in which rows are concatenated.
        context: features in the order of the context matrix's columns.
        tasks: one head each.
        cross_layers, cross_rank: depth and rank of the crossing network.
        hidden: widths of the deep network beside it.
        dropout: probability inside the deep network, training only.
        row_dropout: probability of each element of the rows and of their dot products, training only: rows that were
            fitted to an example say more about it than they will about a new one.

    Raises:
        InvalidConfig: a value is out of its range, a table is of an unknown entity, or a task is named twice.
    """

    tables: dict[str, int]
    context: tuple[ContextFeature, ...]
    tasks: tuple[str, ...]
    cross_layers: int = 2
    cross_rank: int = 32
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    row_dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_range("tables", len(self.tables), 1, MAX_LAYERS)
        for name, dim in self.tables.items():
            entity, _, facet = name.partition(".")
            if entity not in ENTITIES or not facet.isidentifier():
                raise InvalidConfig(
                    f"table {name}", expected=f"'entity.facet' with an entity of {ENTITIES}",
                    got=repr(name), remedy="Leave the table away: requests have no ids for it.",
                )
            _require_range(f"columns of {name}", dim, 1, MAX_WIDTH)
        _require_range("context features", len(self.context), 0, MAX_WIDTH)
        _require_range("tasks", len(self.tasks), 1, MAX_WIDTH)
        if not all(self.tasks) or len(set(self.tasks)) != len(self.tasks):
            raise InvalidConfig(
                "tasks", expected="distinct names", got=str(list(self.tasks)), remedy="Name each task once."
            )
        _require_range("cross_layers", self.cross_layers, 0, MAX_LAYERS)
        _require_range("cross_rank", self.cross_rank, 1, MAX_WIDTH)
        _require_range("hidden layers", len(self.hidden), 0, MAX_LAYERS)
        for width in self.hidden:
            _require_range("units of a hidden layer", width, 1, MAX_WIDTH)
        for name in ("dropout", "row_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidConfig(
                    name, expected="a probability from 0 to below 1", got=str(getattr(self, name)),
                    remedy="Correct it.",
                )

    @property
    def facet_pairs(self) -> list[tuple[str, str]]:
        """(user table, item table) of each facet that has both: their dot product is a feature."""
        facets = sorted({name.partition(".")[2] for name in self.tables})
        pairs = [(f"user.{facet}", f"item.{facet}") for facet in facets]
        return [(u, i) for u, i in pairs if u in self.tables and i in self.tables]

    @property
    def input_dim(self) -> int:
        return sum(self.tables.values()) + len(self.facet_pairs) + 2 * len(self.context)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "UpperConfig":
        """What `to_json` wrote; keys that have a default may be missing.

        Raises:
            InvalidConfig: it is no JSON, has an unknown, missing or repeated key, or a value of another type or range.
        """
        try:
            raw = json.loads(text, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(
                "configuration", expected="JSON that names each key once", got=repr(error), remedy="Correct the file."
            ) from error
        return build(cls, raw, where="configuration", manual="pipelines/contracts/upper_config.py")


def _require_range(what: str, got: int, least: int, most: int) -> None:
    if not least <= got <= most:
        raise InvalidConfig(
            what, expected=f"{least} to {most:,}", got=f"{got:,}", remedy="Build a model in this range."
        )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key is repeated among {[key for key, _ in pairs]}")
    return values
