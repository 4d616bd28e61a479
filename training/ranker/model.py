"""The ranker while it learns: TorchRec tables under the upper model that will serve."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_model import UpperModel
from training.tables import EmbeddingTables, TableShape

__all__ = ["Ranker", "masked_bce"]

class Ranker(nn.Module):
    """
    ```
    user rows (B,) ── user.contrastive, user.kge ──┐
    item rows (B,) ── item.contrastive, item.kge ──┼── UpperModel ── logits (B, T)
    context (B, F) ────────────────────────────────┘
    ```

    Args:
        config: shape of the upper model, which names the tables.
        table_rows: entity -> rows of its tables.
    """

    def __init__(self, config: UpperConfig, table_rows: Mapping[str, int]) -> None:
        super().__init__()
        self.entity_of = {name: name.partition(".")[0] for name in config.tables}
        self.tables = EmbeddingTables(
            [TableShape(name, table_rows[self.entity_of[name]], dim, (name,)) for name, dim in config.tables.items()]
        )
        self.upper = UpperModel(config)

    def forward(self, row_numbers: Mapping[str, Tensor], context: Tensor) -> Tensor:
        """
        Args:
            row_numbers: entity -> int64 (B,) of `Vocabulary.rows`.
            context: float32 (B, F), NaN where unknown.

        Returns:
            Logits, float32 (B, T).
        """
        rows = self.tables({name: row_numbers[entity] for name, entity in self.entity_of.items()})
        return self.upper(rows, context)


def masked_bce(logits: Tensor, labels: Tensor, *, weights: Tensor, rows: float | None = None) -> Tensor:
    """Multi-task binary cross-entropy in which every label counts once: sum of weight x loss, over the examples.

    A task that few examples have a label for has a small part in the loss. Taking each task's mean instead gave every
    label of a rare task many times the gradient, and its rows over-fitted within one epoch.

    Args:
        logits: (B, T).
        labels: (B, T) of 0, 1, or NaN for no label.
        weights: (T,).
        rows: what the sum is divided by; by default B. A process that holds a part of a step gives the step's examples
            over the number of processes, so that the mean over processes is the step's loss exactly.

    Returns:
        Scalar.
    """
    known = ~torch.isnan(labels)
    losses = binary_cross_entropy_with_logits(logits, torch.where(known, labels, 0.0), reduction="none")  # (B, T)
    return (torch.where(known, losses, 0.0) * weights).sum() / (len(logits) if rows is None else rows)
