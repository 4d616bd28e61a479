"""The contrastive facet: user and item rows whose cosine tells a user's items from others.

In-batch and uniform negatives as in arXiv 2508.05700 and 2508.18700; the logQ correction as in arXiv 2509.04337.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.contracts.errors import InvalidConfig, InvalidEvents
from training.config import require_positive
from training.epochs import Fitting, fingerprint_of
from training.facet_io import require_export, scaled, write_facet
from training.ids import RunIds
from training.losses import find_loss, log_expected_count
from training.retrieval import top_k_quality
from training.sampling import KnownPairs, epoch_order, generator
from training.tables import EmbeddingTables, Processes, ShardedModel, TableOptions, TableShape

__all__ = ["ContrastiveConfig", "ContrastiveModel", "Pairs", "train_contrastive"]

EVALUATED_AT = 20


@dataclass(frozen=True)
class ContrastiveConfig:
    """Section `contrastive` of the configuration; `training/defaults.yaml` explains every key."""

    dim: int
    epochs: int
    groups: int
    group_rows: int
    uniform_negatives: int
    loss: str
    logq: bool
    mask_known: bool
    temperature: float
    learn_temperature: bool
    margin: float
    table_learning_rate: float
    dense_learning_rate: float
    init_std: float
    holdout_days: int
    holdout_users: int
    export: str

    def __post_init__(self) -> None:
        find_loss(self.loss)
        require_export(self.export, option="contrastive.export")
        require_positive(
            self, "contrastive", "dim", "epochs", "groups", "group_rows", "temperature", "table_learning_rate",
            "init_std",
        )
        require_positive(
            self, "contrastive", "uniform_negatives", "holdout_days", "holdout_users", "dense_learning_rate",
            or_zero=True,
        )
        if self.group_rows == 1 and not self.uniform_negatives:
            raise InvalidConfig(
                "contrastive", expected="negatives", got="group_rows 1 and uniform_negatives 0", remedy="Raise one."
            )


@dataclass(frozen=True)
class Pairs:
    """Positive pairs as row numbers, split in time.

    Attributes:
        user_ids, item_ids: int64 (U,), (N,), ascending: the stored ids that occur before the cut: the tables' rows.
        user, item: int64 (P,): row numbers of each pair before the cut.
        held_user, held_item: int64 (H,): distinct pairs from the cut on that are new: not among those before it.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    user: np.ndarray
    item: np.ndarray
    held_user: np.ndarray
    held_item: np.ndarray

    @classmethod
    def read(cls, path: Path, *, cut: datetime | None, ids: RunIds | None = None) -> "Pairs":
        """Read `pairs.parquet`; pairs at `cut` or later are held out (None: none are).

        Pairs that became equal because their ids share a bucket all stay, as those of several days do: each was a day
        on which something happened.

        Args:
            ids: which ids share a row; by default none do.

        Raises:
            InvalidEvents: there is no pair before the cut.
        """
        table = pq.read_table(path, columns=["user", "item", "event_timestamp"])
        moments = table["event_timestamp"].to_numpy().astype("datetime64[us]")
        user, item = ((ids or RunIds()).stored(entity, table[entity].to_numpy()) for entity in ("user", "item"))
        early = np.ones(len(user), bool) if cut is None else moments < np.datetime64(cut.replace(tzinfo=None), "us")
        if not early.any():
            raise InvalidEvents(
                f"{path}", expected="at least one pair before the held-out days", got=f"{len(user)} pairs, all held out"
                if len(user) else "no pairs", remedy="Widen the pretraining window or lower holdout_days.",
            )
        user_ids, user_row = np.unique(user[early], return_inverse=True)
        item_ids, item_row = np.unique(item[early], return_inverse=True)
        late = ~early & np.isin(user, user_ids) & np.isin(item, item_ids)
        held = np.searchsorted(user_ids, user[late]) * len(item_ids) + np.searchsorted(item_ids, item[late])
        held = np.setdiff1d(held, user_row * len(item_ids) + item_row)  # also drops repeats
        return cls(user_ids, item_ids, user_row, item_row, held // len(item_ids), held % len(item_ids))


class ContrastiveModel(nn.Module):
    """Cosine of user and item rows over a temperature.

    ```
    users (G, B) ─ rows ─ u (G, B, D) ┐
    items (G, B) ─ rows ─ p (G, B, D) ┼─ u·p / t      (G, B)         positives
    pool  (G, K) ─ rows ─ n (G, K, D) ┴─ u·[p; n] / t (G, B, B + K)  negatives, own and known items hidden
    ```
    """

    def __init__(self, config: ContrastiveConfig, *, users: int, items: int) -> None:
        super().__init__()
        self.tables = EmbeddingTables(
            [TableShape("user", users, config.dim, ("user",)), TableShape("item", items, config.dim, ("item", "pool"))]
        )
        log_temperature = torch.tensor(math.log(config.temperature))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self._loss = find_loss(config.loss)
        self._margin = config.margin

    def forward(self, user: Tensor, item: Tensor, pool: Tensor, log_q: Tensor, hidden: Tensor) -> Tensor:
        """Mean loss of G groups of B pairs.

        Args:
            user, item: int64 (G, B).
            pool: int64 (G, K), uniform negatives.
            log_q: fp32 (G, B + K), of the items and the pool.
            hidden: bool (G, B, B + K).
        """
        rows = self.tables({"user": user, "item": item, "pool": pool})
        own = functional.normalize(rows["user"], dim=-1)  # (G, B, D)
        positive_row = functional.normalize(rows["item"], dim=-1)  # (G, B, D)
        candidates = torch.cat([positive_row, functional.normalize(rows["pool"], dim=-1)], 1)  # (G, B + K, D)
        scale = torch.exp(-self.log_temperature)
        return self._loss(
            (own * positive_row).sum(-1) * scale,
            torch.bmm(own, candidates.mT) * scale,
            positive_log_q=log_q[:, : item.shape[1]],
            negative_log_q=log_q.unsqueeze(1),
            hidden=hidden,
            margin=self._margin,
        )


class ContrastiveBatches:
    """The steps of an epoch, the same however many processes share their groups."""

    def __init__(self, pairs: Pairs, config: ContrastiveConfig, *, seed: int, processes: Processes) -> None:
        self._pairs, self._config, self._seed, self._device = pairs, config, seed, processes.device
        self._mine = processes.share(config.groups, option="contrastive.groups")
        items = len(pairs.item_ids)
        frequency = torch.from_numpy(np.bincount(pairs.item, minlength=items) / len(pairs.item))
        self._log_q = log_expected_count(
            frequency, in_batch=config.group_rows - 1, uniform=config.uniform_negatives, population=items
        ).float() if config.logq else torch.zeros(items)
        self._known = KnownPairs(pairs.user, pairs.item, keys=len(pairs.user_ids))
        self.steps = -(-len(pairs.user) // (config.groups * config.group_rows))

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        config, pairs = self._config, self._pairs
        random = generator(self._seed, 1, epoch)
        order = epoch_order(len(pairs.user), per_step=config.groups * config.group_rows, random=random)
        for chosen in order:
            groups = chosen.reshape(config.groups, config.group_rows)[self._mine]
            pool = random.integers(len(pairs.item_ids), size=(config.groups, config.uniform_negatives))[self._mine]
            user, item = pairs.user[groups], pairs.item[groups]
            candidates = np.concatenate([item, pool], 1)  # (G, B + K)
            hidden = np.stack([
                self._known.hidden(u, c) if config.mask_known else i[:, None] == c[None, :]
                for u, i, c in zip(user, item, candidates, strict=True)
            ])
            tensors = (torch.from_numpy(array) for array in (user, item, pool, hidden))
            user, item, pool, hidden = (tensor.to(self._device) for tensor in tensors)
            yield user, item, pool, self._log_q[torch.from_numpy(candidates)].to(self._device), hidden


def train_contrastive(
    pairs_path: Path, directory: Path, config: ContrastiveConfig, *, tables: TableOptions, window_end: datetime,
    seed: int, processes: Processes, ids: RunIds | None = None,
) -> None:
    """Train the facet and write it to `directory`: `user.safetensors`, `item.safetensors`, `metrics.json`.

    Args:
        ids: which ids share a row; by default none do.
        window_end: end of the pretraining window; the `holdout_days` before it are measured on, not trained on.

    Raises:
        InvalidEvents: no pairs.
        InvalidTable: the loss is not finite.
    """
    started = time.perf_counter()
    cut = window_end - timedelta(days=config.holdout_days) if config.holdout_days else None
    ids = ids or RunIds()
    pairs = Pairs.read(pairs_path, cut=cut, ids=ids)
    batches = ContrastiveBatches(pairs, config, seed=seed, processes=processes)
    module = ContrastiveModel(config, users=len(pairs.user_ids), items=len(pairs.item_ids))
    model = ShardedModel(module, tables, learning_rate=config.table_learning_rate, processes=processes)
    for table in ("user", "item"):
        model.init_rows(table, std=config.init_std, seed=seed)
    measure = _Holdout(pairs, config, model, seed=seed)
    settings = {
        "facet": "contrastive", "seed": seed, **asdict(config), "tables": asdict(tables), "ids": ids.describe(),
        "vocabularies": ids.vocabularies_sha256(),
    }
    fitting = Fitting(
        model, config.dense_learning_rate, directory.with_name(f"{directory.name}.partial.safetensors"),
        fingerprint_of({**settings, "epochs": None}, pairs.user, pairs.item),
    )
    fitting.run(config.epochs, batches=batches, steps=batches.steps, measure=measure, title=directory.name)
    user, item = model.gather_rows("user"), model.gather_rows("item")
    if processes.is_first:
        temperature = float(model.module.log_temperature.detach().exp())
        metrics = {
            "config": settings, "curve": fitting.curve,
            "holdout": fitting.curve[-1].get("holdout", {}) | {"popularity": measure.popularity} if cut else {},
            "pairs": len(pairs.user), "temperature": temperature, "wall_s": time.perf_counter() - started,
        }
        entities = {
            "user": (pairs.user_ids, scaled(user, config.export)), "item": (pairs.item_ids, scaled(item, config.export))
        }
        write_facet(directory, entities, metrics)
        fitting.partial.unlink(missing_ok=True)


class _Holdout:
    """Recall and hit rate on the held-out days, for the model and for popularity."""

    def __init__(self, pairs: Pairs, config: ContrastiveConfig, model: ShardedModel, *, seed: int) -> None:
        self._model = model
        users = np.unique(pairs.held_user)
        self._users = np.sort(generator(seed, 2).permutation(users)[: config.holdout_users])
        self._known = KnownPairs(pairs.user, pairs.item, keys=len(pairs.user_ids))
        self._held = KnownPairs(pairs.held_user, pairs.held_item, keys=len(pairs.user_ids))
        frequency = torch.from_numpy(np.bincount(pairs.item, minlength=len(pairs.item_ids))).float()
        self.popularity = self._quality(lambda users: frequency.expand(len(users), -1)) if len(self._users) else {}

    def __call__(self) -> dict[str, Any]:
        if not len(self._users):
            return {}
        user, item = self._model.gather_rows("user"), self._model.gather_rows("item")
        if user is None:
            return {"holdout": {}}
        user, item = functional.normalize(user, dim=1), functional.normalize(item, dim=1)
        quality = self._quality(lambda users: user[users] @ item.T)
        return {"holdout": quality} | quality

    def _quality(self, score) -> dict[str, float]:
        return top_k_quality(score, self._users, known=self._known, held=self._held, k=EVALUATED_AT)
