"""The knowledge-graph facet: model, training and export."""

import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.contracts.errors import InvalidConfig, InvalidEvents
from training.config import require_positive
from training.epochs import Fitting, fingerprint_of
from training.facet_io import require_export, scaled, write_facet
from training.ids import RunIds
from training.kge.evaluate import LinkPrediction
from training.kge.graph import Graph
from training.kge.sampling import EdgeBatches, relation_shares
from training.kge.scorers import find_scorer, pairwise_score, score
from training.losses import find_loss
from training.tables import EmbeddingTables, Processes, ShardedModel, TableOptions, TableShape

__all__ = ["KgeConfig", "KgeModel", "train_kge"]

EXPORTED = ("user", "item")


@dataclass(frozen=True)
class KgeConfig:
    """Section `kge` of the configuration; `training/defaults.yaml` explains every key."""

    dim: int
    scorer: str
    rank: int
    unit_rows: bool
    temperature: float
    epochs: int
    groups: int
    group_edges: int
    uniform_negatives: int
    loss: str
    logq: bool
    mask_known: bool
    margin: float
    balance: float
    table_learning_rate: float
    dense_learning_rate: float
    init_std: float
    holdout_days: int
    holdout_edges: int
    export: str
    boost: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_loss(self.loss)
        find_scorer(self.scorer)
        require_export(self.export, option="kge.export")
        require_positive(
            self, "kge", "dim", "rank", "temperature", "epochs", "groups", "group_edges", "table_learning_rate",
            "init_std",
        )
        require_positive(
            self, "kge", "uniform_negatives", "holdout_days", "holdout_edges", "dense_learning_rate", "balance",
            or_zero=True,
        )
        if self.group_edges == 1 and not self.uniform_negatives:
            raise InvalidConfig(
                "kge", expected="negatives", got="group_edges 1 and uniform_negatives 0", remedy="Raise one."
            )


class KgeModel(nn.Module):
    """One table of nodes of all types; per relation a translation r and what its scorer's projection needs.

    ```
    head (G, B), tail (G, B), pools (G, K)  ─ rows ─ P_r ─┬─ -|h + r - t|^2   (G, B)         positives
      group g has relation[g]                             ├─ tails corrupted  (G, B, B + K)
                                                          └─ heads corrupted  (G, B, B + K)
    ```
    """

    def __init__(self, config: KgeConfig, *, nodes: int, anchor: list[bool], seed: int) -> None:
        super().__init__()
        self.tables = EmbeddingTables(
            [TableShape("node", nodes, config.dim, ("head", "tail", "head_pool", "tail_pool"))]
        )
        scorer = find_scorer(config.scorer)
        generator = torch.Generator().manual_seed(seed)
        self.translation = nn.Parameter(torch.zeros(len(anchor), config.dim))  # (R, D)
        start = scorer.start(len(anchor), config.dim, config.rank, generator)
        self.projection = nn.ParameterDict({name: nn.Parameter(value) for name, value in start.items()})
        self.register_buffer("anchor", torch.tensor(anchor))  # (R,)
        self._project = scorer.project
        self._unit_rows = config.unit_rows
        self._temperature = config.temperature
        self._loss = find_loss(config.loss)
        self._margin = config.margin

    def project(self, rows: Tensor, relation: Tensor) -> Tensor:
        """P_r of rows as trained: (G, N, D), relations (G,) -> (G, N, D)."""
        if self._unit_rows:
            rows = functional.normalize(rows, dim=-1)
        return self._project(rows, {name: p[relation] for name, p in self.projection.items()}, self.anchor[relation])

    def forward(
        self, relation: Tensor, head: Tensor, tail: Tensor, head_pool: Tensor, tail_pool: Tensor, head_log_q: Tensor,
        tail_log_q: Tensor, head_hidden: Tensor, tail_hidden: Tensor,
    ) -> Tensor:
        """Mean loss of corrupting heads and tails; `EdgeBatches` documents the arguments."""
        rows = self.tables({"head": head, "tail": tail, "head_pool": head_pool, "tail_pool": tail_pool})
        edges = head.shape[1]
        # All rows of a group through its relation's projection at once.
        together = torch.cat([rows[name] for name in ("head", "head_pool", "tail", "tail_pool")], 1)
        projected = self.project(together, relation)
        heads, tails = projected.split([edges + head_pool.shape[1], edges + tail_pool.shape[1]], 1)  # (G, B + K, D)
        translation = self.translation[relation]  # (G, D)
        positive = score(heads[:, :edges], translation, tails[:, :edges]) / self._temperature  # (G, B)
        moved = heads + translation.unsqueeze(1)
        total = 0.0
        for negative, log_q, hidden in (
            (pairwise_score(moved[:, :edges], tails), tail_log_q, tail_hidden),
            (pairwise_score(tails[:, :edges], moved), head_log_q, head_hidden),
        ):
            total = total + self._loss(
                positive, negative / self._temperature, positive_log_q=log_q[:, :edges],
                negative_log_q=log_q.unsqueeze(1), hidden=hidden, margin=self._margin,
            )
        return total / 2


def train_kge(
    graph_path: Path, directory: Path, config: KgeConfig, *, tables: TableOptions, window_end: datetime, seed: int,
    processes: Processes, ids: RunIds | None = None,
) -> None:
    """Train the facet and write it to `directory`.

    Beside `user.safetensors`, `item.safetensors` (rows in the anchor space, nodes with an edge to train on) and
    `metrics.json` there are `nodes.safetensors` (all rows as trained, in the graph's node order) and
    `relations.safetensors` (translation (R, D) and the projection's parameters).

    Args:
        window_end: end of the pretraining window; edges of the `holdout_days` before it are ranked, not trained on.
        ids: which users and items share a row; by default none do.

    Raises:
        InvalidEvents: no edge to train on, or a graph without users or items.
        InvalidTable: the loss is not finite.
    """
    started = time.perf_counter()
    cut = window_end - timedelta(days=config.holdout_days) if config.holdout_days else None
    ids = ids or RunIds()
    graph = Graph.read(graph_path, cut=cut, ids=ids)
    if missing := set(EXPORTED) - set(graph.ranges):
        raise InvalidEvents(
            f"{graph_path}", expected="nodes of types user and item", got=f"no {' or '.join(sorted(missing))}",
            remedy="Prepare the run again.",
        )
    names = [relation.name for relation in graph.relations]
    shares = relation_shares(
        np.bincount(graph.relation, minlength=len(names)), names=names, balance=config.balance, boost=config.boost
    )
    batches = EdgeBatches(
        graph, groups=config.groups, group_edges=config.group_edges, uniform=config.uniform_negatives, shares=shares,
        logq=config.logq, mask_known=config.mask_known, seed=seed,
        mine=processes.share(config.groups, option="kge.groups"), device=processes.device,
    )
    module = KgeModel(config, nodes=len(graph.ids), anchor=[relation.anchor for relation in graph.relations], seed=seed)
    model = ShardedModel(module, tables, learning_rate=config.table_learning_rate, processes=processes)
    model.init_rows("node", std=config.init_std, seed=seed)
    settings = {
        "facet": "kge", "seed": seed, **asdict(config), "tables": asdict(tables), "ids": ids.describe(),
        "vocabularies": ids.vocabularies_sha256(),
    }
    fitting = Fitting(
        model, config.dense_learning_rate, directory.with_name(f"{directory.name}.partial.safetensors"),
        fingerprint_of({**settings, "epochs": None}, graph.relation, graph.head, graph.tail),
    )
    prediction = LinkPrediction(graph, edges=config.holdout_edges, seed=seed)
    fitting.run(
        config.epochs, batches=batches, steps=batches.steps, measure=lambda: _measure(model, prediction),
        title=directory.name,
    )
    rows = model.gather_rows("node")
    if rows is None:
        return
    baseline = {"by_degree": prediction.by_degree()} if len(prediction) else {}
    metrics: dict[str, Any] = {
        "config": settings, "curve": fitting.curve, "holdout": fitting.curve[-1].get("holdout", {}) | baseline,
        "edges": len(graph.head), "relations": dict(zip(names, shares.tolist(), strict=True)),
        "wall_s": time.perf_counter() - started,
    }
    trained = graph.trained_nodes
    entities = {}
    for entity in EXPORTED:
        begin, end = graph.ranges[entity]
        kept = np.flatnonzero(trained[begin:end]) + begin
        entities[entity] = graph.ids[kept], scaled(rows[torch.from_numpy(kept)], config.export)
    parameters = {"translation": model.module.translation.detach().cpu()}
    parameters |= {name: value.detach().cpu() for name, value in model.module.projection.items()}
    write_facet(directory, entities, metrics, extra={
        "nodes.safetensors": {"ids": torch.from_numpy(graph.ids), "weight": rows}, "relations.safetensors": parameters,
    })
    fitting.partial.unlink(missing_ok=True)


def _measure(model: ShardedModel, prediction: LinkPrediction) -> dict[str, Any]:
    if not len(prediction):
        return {}
    rows = model.gather_rows("node")
    if rows is None:
        return {"holdout": {}}
    module: KgeModel = model.module
    rows = rows.to(module.translation.device)

    def scores(relation: int, side: str, other: np.ndarray, begin: int, end: int) -> Tensor:
        number = torch.tensor([relation], device=rows.device)
        known = module.project(rows[torch.from_numpy(other).to(rows.device)].unsqueeze(0), number)  # (1, B, D)
        candidates = module.project(rows[begin:end].unsqueeze(0), number)  # (1, C, D)
        move = module.translation[relation]
        query = known + move if side == "tail" else known - move
        return pairwise_score(query, candidates)[0].cpu()

    with torch.no_grad():
        quality = prediction.quality(scores)
    return {"holdout": quality, "mrr": quality["all"]["mrr"], "hits@10": quality["all"]["hits@10"]}
