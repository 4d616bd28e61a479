"""The dense part of the ranker: one definition for the trainer and for the server, so that they cannot differ."""

import torch
from torch import Tensor, nn

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.upper_config import UpperConfig

__all__ = ["LowRankCross", "UpperModel"]


class LowRankCross(nn.Module):
    """Low-rank deep crossing network v2 (arXiv 2008.13535, section 3.1).

    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l, element-wise product; shapes (B, D) throughout.
    """

    def __init__(self, dim: int, *, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(dim, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, dim) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        x = x0  # (B, D)
        for down, up in zip(self.down, self.up, strict=True):
            x = x0 * up(down(x)) + x
        return x


class UpperModel(nn.Module):
    """Rows and context features to one logit per task.

    ```
    rows (B, D_t) per table ──┬───────────────────────────┐
                              └─ <user, item> per facet ──┤
    context (B, F) ─ standardize, flag missing ───────────┴─ x0 (B, D) ─┬─ LowRankCross ─┐
                                                                        └─ MLP ──────────┴─ concat ─ linear (B, T)
    ```
    """

    def __init__(self, config: UpperConfig) -> None:
        super().__init__()
        self.config = config
        self.row_dropout = _dropout(config.row_dropout)
        self.register_buffer("context_mean", torch.zeros(len(config.context)))
        self.register_buffer("context_std", torch.ones(len(config.context)))
        dim = config.input_dim
        self.cross = LowRankCross(dim, layers=config.cross_layers, rank=config.cross_rank)
        layers: list[nn.Module] = []
        width = dim
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), _dropout(config.dropout)]
            width = hidden
        self.deep = nn.Sequential(*layers)
        self.heads = nn.Linear(dim + width, len(config.tasks))

    def set_context_statistics(self, context: Tensor) -> None:
        """Take mean and standard deviation of each column of (N, F), ignoring NaN, from the fine-tuning window."""
        present = ~torch.isnan(context)
        count = present.sum(0).clamp(min=1)
        mean = torch.where(present, context, 0.0).sum(0) / count
        variance = torch.where(present, (context - mean) ** 2, 0.0).sum(0) / count
        self.context_mean.copy_(mean)
        self.context_std.copy_(variance.sqrt().clamp(min=1e-3))

    def forward(self, rows: dict[str, Tensor], context: Tensor) -> Tensor:
        """
        Args:
            rows: table name -> float32 (B, D_t), the dequantized rows.
            context: float32 (B, F) of `context_matrix`; NaN where a view had no row.

        Returns:
            Logits, float32 (B, T), in the order of `config.tasks`.

        Raises:
            InvalidConfig: a table is missing or a shape is not the configuration's.
        """
        self._check(rows, context)
        missing = torch.isnan(context)
        standard = torch.where(missing, 0.0, (context - self.context_mean) / self.context_std)
        parts = [rows[name] for name in self.config.tables]
        parts += [(rows[user] * rows[item]).sum(1, keepdim=True) for user, item in self.config.facet_pairs]
        learned = self.row_dropout(torch.cat(parts, dim=1))  # (B, sum of D_t + pairs)
        x0 = torch.cat([learned, standard, missing.to(standard.dtype)], dim=1)  # (B, D)
        return self.heads(torch.cat([self.cross(x0), self.deep(x0)], dim=1))  # (B, T)

    def _check(self, rows: dict[str, Tensor], context: Tensor) -> None:
        batch = len(context)
        expected = {name: (batch, dim) for name, dim in self.config.tables.items()}
        got = {name: tuple(rows[name].shape) if name in rows else None for name in expected}
        if expected != got or context.shape != (batch, len(self.config.context)):
            raise InvalidConfig(
                "upper model input", expected=f"rows {expected}, context {(batch, len(self.config.context))}",
                got=f"rows {got}, context {tuple(context.shape)}",
                remedy="Look the rows up for the version that scores.",
            )


def _dropout(probability: float) -> nn.Module:
    """`nn.Dropout` draws random numbers even for a probability of 0."""
    return nn.Dropout(probability) if probability else nn.Identity()
