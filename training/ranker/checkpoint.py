"""A trained ranker as files, and the one way to score examples with it: fp32 or quantized rows, same upper model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pipelines.contracts.errors import IntegrityError, InvalidTable
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.upper_files import load_upper_model, save_upper_model
from pipelines.contracts.upper_model import UpperModel
from training.ranker.inputs import Fold
from training.ranker.vocabulary import Vocabulary

__all__ = ["RankerTable", "TrainedRanker", "score"]

SCORE_ROWS = 16_384


@dataclass(frozen=True)
class RankerTable:
    """One fine-tuned table.

    Attributes:
        ids: int64 (N,), ascending; the stored ids of `rule`, those of all its buckets among them.
        weight: float32 (N, D), row i belongs to ids[i].
        default: float32 (D,), the row of every other id.
        rule: which of `ids` an id reads.
    """

    ids: np.ndarray
    weight: np.ndarray
    default: np.ndarray
    rule: IdRule = field(default_factory=IdRule)

    def __post_init__(self) -> None:
        if self.weight.shape != (len(self.ids), len(self.default)) or (np.diff(self.ids) <= 0).any():
            raise InvalidTable(
                "ranker table", expected="ascending ids (N,), weight (N, D), default (D,)",
                got=f"{self.ids.shape}, {self.weight.shape}, {self.default.shape}", remedy="Fine-tune again.",
            )
        if self.rule.has_buckets and not np.array_equal(self.ids[self.ids < 0], self.rule.all_bucket_ids()):
            raise InvalidTable(
                "ranker table", expected=f"a row for each of {self.rule.buckets} hash buckets",
                got=f"{(self.ids < 0).sum()} rows of negative ids", remedy="Fine-tune again.",
            )

    def with_default(self) -> np.ndarray:
        """float32 (N + 1, D): the default row first, so that `Vocabulary.rows` numbers index it."""
        return np.concatenate([self.default[None], self.weight])


@dataclass(frozen=True)
class TrainedRanker:
    """What `facet finetune` leaves: tables, upper model, and how it went (with the tables' `id_rules`)."""

    tables: Mapping[str, RankerTable]
    upper: UpperModel
    metrics: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Write `tables/`, `upper/` and, last, `metrics.json` into an existing directory."""
        (directory / "tables").mkdir()
        for name, table in self.tables.items():
            save_file(
                {"ids": table.ids, "weight": np.ascontiguousarray(table.weight), "default": table.default},
                directory / "tables" / f"{name}.safetensors",
            )
        save_upper_model(self.upper, directory / "upper")
        (directory / "metrics.json").write_text(json.dumps(self.metrics, indent=1))

    @classmethod
    def load(cls, directory: Path) -> "TrainedRanker":
        """Read a ranker's directory; raises `IntegrityError` when a file is missing or broken."""
        try:
            metrics = json.loads((directory / "metrics.json").read_text())
            upper = load_upper_model(directory / "upper")
            # a ranker from before there were id rules tells none
            rules = {entity: IdRule(**raw) for entity, raw in metrics.get("id_rules", {}).items()}
            tables = {
                name: RankerTable(
                    **load_file(directory / "tables" / f"{name}.safetensors"),
                    rule=rules.get(name.partition(".")[0], IdRule()),
                )
                for name in upper.config.tables
            }
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise IntegrityError(
                f"ranker at {directory}", expected="metrics.json, upper/ and tables/ as `facet finetune` wrote them",
                got=repr(error), remedy="Delete the directory and fine-tune again.",
            ) from error
        return cls(tables, upper, metrics)


@torch.inference_mode()
def score(tables: Mapping[str, RankerTable], upper: UpperModel, fold: Fold) -> np.ndarray:
    """Probabilities of a fold's examples, by the computation that serves them: an id without a row of its own reads the
    row of its bucket, or the default row.

    Returns:
        float32 (N, T).
    """
    upper.eval()
    ids = {"user": fold.user, "item": fold.item}
    places = {
        name: torch.from_numpy(Vocabulary(table.ids, table.rule).rows(ids[name.partition(".")[0]]))
        for name, table in tables.items()
    }
    weights = {name: torch.from_numpy(table.with_default()) for name, table in tables.items()}
    context = torch.from_numpy(fold.context)
    parts = []
    for start in range(0, len(fold), SCORE_ROWS):
        here = slice(start, start + SCORE_ROWS)
        rows = {name: weights[name][place[here]] for name, place in places.items()}
        parts.append(torch.sigmoid(upper(rows, context[here])).numpy())
    return np.concatenate(parts) if parts else np.empty((0, len(upper.config.tasks)), np.float32)
