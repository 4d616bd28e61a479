"""The training loop: mini-batches over the fine-tuning fold, stopped where validation is best."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import InvalidConfig, InvalidTable
from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_model import UpperModel
from training.ranker.checkpoint import RankerTable, TrainedRanker, score
from training.ranker.config import RankerConfig
from training.ranker.inputs import Fold
from training.ranker.metrics import task_aucs
from training.ranker.model import Ranker, masked_bce
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary
from training.tables import Processes, ShardedModel, TableOptions

__all__ = ["Batch", "batches", "fit"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """This process's share of one step.

    Attributes:
        row_numbers: entity -> int64 (B,).
        context: float32 (B, F).
        labels: float32 (B, T), NaN for no label.
        step_rows: examples of the whole step over the number of processes.
    """

    row_numbers: dict[str, Tensor]
    context: Tensor
    labels: Tensor
    step_rows: float


def batches(
    fold: Fold, vocabularies: Mapping[str, Vocabulary], *, batch_rows: int, id_dropout: float,
    generator: np.random.Generator, processes: Processes,
) -> Iterator[Batch]:
    """One pass over a fold in random order, in steps of about `batch_rows` examples over all processes.

    All processes must give generators of the same state; each gets its own part of the same steps. An id is replaced by
    the default row with probability `id_dropout` (so that the model learns to do without a row), the same for
    all tables of its entity.
    """
    ids = {"user": fold.user, "item": fold.item}
    places = {}
    for entity, vocabulary in vocabularies.items():
        kept = generator.random(len(fold)) >= id_dropout
        places[entity] = torch.from_numpy(np.where(kept, vocabulary.rows(ids[entity]), DEFAULT_ROW))
    context, labels = torch.from_numpy(fold.context), torch.from_numpy(fold.labels)
    order = torch.from_numpy(generator.permutation(len(fold)))
    for step in torch.tensor_split(order, max(1, len(fold) // batch_rows)):
        mine = step[processes.rank :: processes.size]
        rows = {entity: place[mine].to(processes.device) for entity, place in places.items()}
        yield Batch(
            rows, context[mine].to(processes.device), labels[mine].to(processes.device), len(step) / processes.size
        )


def fit(
    folds: Mapping[str, Fold], vocabularies: Mapping[str, Vocabulary], dims: Mapping[str, int],
    warm: Mapping[str, np.ndarray], *, tasks: tuple[str, ...], seed: int, config: RankerConfig,
    options: TableOptions, processes: Processes, empty: Mapping[str, np.ndarray] | None = None, label: str = "ranker",
) -> TrainedRanker:
    """Train on `folds["finetune"]`, keep the epoch whose mean validation AUC is best, measure it once on the test fold.

    Args:
        folds: `finetune`, `validation`, `test`.
        vocabularies: entity -> ids with a row.
        dims: table name -> dimension, in the upper model's order.
        warm: table name -> first rows, float32 (vocabulary.table_rows, D); the other tables start at random.
        empty: table name -> rows of hash buckets that no training id fell into: they end as copies of the default row,
            which has learned to stand for any id, where their own would be the random numbers they started as.
        label: shown with the progress bar.

    Returns:
        The same ranker on every process.

    Raises:
        InvalidConfig: a task weight for no task, or tables of several dimensions.
        InvalidTable: training diverged.
    """
    began = time.monotonic()
    if unknown := set(config.task_weights) - set(tasks):
        raise InvalidConfig(
            "ranker.task_weights", expected=f"some of {list(tasks)}", got=f"{sorted(unknown)}", remedy="Correct them."
        )
    if len(set(dims.values())) > 1:
        raise InvalidConfig(
            "dimensions of the facets", expected="one dimension: TorchRec keeps the tables in one collection",
            got=str(dict(dims)), remedy="Pretrain both facets with the same `dim`.",
        )
    upper_config = UpperConfig(
        tables=dict(dims), context=CONTEXT_FEATURES, tasks=tasks, cross_layers=config.cross_layers,
        cross_rank=config.cross_rank, hidden=config.hidden, dropout=config.dropout,
        row_dropout=config.row_dropout,
    )
    torch.manual_seed(seed)  # dense weights, the same on every process
    ranker = Ranker(upper_config, {entity: vocabulary.table_rows for entity, vocabulary in vocabularies.items()})
    ranker.upper.set_context_statistics(torch.from_numpy(folds["finetune"].context))
    model = ShardedModel(
        ranker, options, learning_rate=0.0 if config.freeze else config.table_learning_rate, processes=processes
    )
    for name in dims:
        if name in warm:
            model.load_rows(name, torch.from_numpy(warm[name]))
        else:
            model.init_rows(name, std=config.init_std, seed=seed)
    dense = torch.optim.AdamW(
        model.dense_parameters(), lr=config.dense_learning_rate, weight_decay=config.weight_decay
    )
    weights = torch.tensor([config.task_weights.get(task, 1.0) for task in tasks], device=processes.device)
    generator = np.random.default_rng(seed)
    validation = _sample(folds["validation"], config.validation_rows)
    watch = _BestEpoch(patience=config.patience)
    curve: list[dict[str, Any]] = []
    with tqdm(range(1, config.epochs + 1), desc=label, unit="epoch", disable=None, leave=False) as progress:
        for epoch in progress:
            steps = batches(
                folds["finetune"], vocabularies, batch_rows=config.batch_rows, id_dropout=config.id_dropout,
                generator=generator, processes=processes,
            )
            train_loss = _train_epoch(model, dense, steps, weights=weights, processes=processes)
            if not np.isfinite(train_loss):
                raise InvalidTable(
                    f"{label}, epoch {epoch}", expected="a finite loss", got=str(train_loss),
                    remedy="Lower ranker.table_learning_rate or ranker.dense_learning_rate.",
                )
            snapshot = _snapshot(model, ranker.upper, vocabularies, dims, empty=empty or {}, processes=processes)
            auc = task_aucs(tasks, validation.labels, score(*snapshot, validation))
            curve.append({"epoch": epoch, "train_loss": train_loss, "validation_auc": auc})
            progress.set_postfix(loss=f"{train_loss:.4f}", **{task: f"{value:.4f}" for task, value in auc.items()})
            if watch.stop_after(epoch, float(np.mean(list(auc.values()))), snapshot):
                break
    tables, upper = watch.best
    test = folds["test"]
    metrics = {
        "curve": curve,
        "best_epoch": watch.epoch,
        "auc": task_aucs(tasks, test.labels, score(tables, upper, test)),
        "id_rules": {entity: asdict(vocabulary.rule) for entity, vocabulary in vocabularies.items()},
        "wall_s": time.monotonic() - began,
    }
    _log.info(
        "%s: best epoch %d, test AUC %s, %.1f s", label, watch.epoch,
        ", ".join(f"{task} {value:.4f}" for task, value in metrics["auc"].items()), metrics["wall_s"],
    )
    return TrainedRanker(tables, upper, metrics)


def _train_epoch(
    model: ShardedModel, dense: torch.optim.Optimizer, steps: Iterator[Batch], *, weights: Tensor, processes: Processes
) -> float:
    """One pass; returns the mean loss of its steps over all processes."""
    model.train()
    total, count = torch.zeros((), device=processes.device), 0
    for batch in steps:
        logits = model(batch.row_numbers, batch.context)
        loss = masked_bce(logits, batch.labels, weights=weights, rows=batch.step_rows)
        dense.zero_grad()
        loss.backward()
        dense.step()
        total += loss.detach()
        count += 1
    dist.all_reduce(total)
    return total.item() / count / processes.size


class _BestEpoch:
    """Keeps the best epoch's model and tells when `patience` epochs have brought nothing better."""

    def __init__(self, *, patience: int) -> None:
        self.patience, self.epoch, self.value, self.best = patience, 0, -np.inf, None

    def stop_after(self, epoch: int, value: float, snapshot: tuple) -> bool:
        if value > self.value:
            self.epoch, self.value, self.best = epoch, value, snapshot
        return epoch - self.epoch >= self.patience


def _snapshot(
    model: ShardedModel, upper: UpperModel, vocabularies: Mapping[str, Vocabulary], dims: Mapping[str, int], *,
    empty: Mapping[str, np.ndarray], processes: Processes,
) -> tuple[dict[str, RankerTable], UpperModel]:
    """A copy of the ranker as it is now, on every process's CPU."""
    tables = {}
    for name, dim in dims.items():
        vocabulary = vocabularies[name.partition(".")[0]]
        rows = model.gather_rows(name)
        if rows is None:
            rows = torch.empty(vocabulary.table_rows, dim)
        rows = rows.to(processes.device)
        dist.broadcast(rows, src=0)
        rows = rows.cpu().numpy()
        if name in empty:
            rows[empty[name]] = rows[DEFAULT_ROW]
        tables[name] = RankerTable(
            vocabulary.ids, rows[DEFAULT_ROW + 1 :].copy(), rows[DEFAULT_ROW].copy(), vocabulary.rule
        )
    copy = UpperModel(upper.config)
    copy.load_state_dict({name: value.cpu() for name, value in upper.state_dict().items()})
    return tables, copy.eval()


def _sample(fold: Fold, rows: int) -> Fold:
    """At most `rows` labelled examples of each task, the same ones for every arm and seed."""
    generator = np.random.default_rng(0)
    kept = np.zeros(len(fold), bool)
    for labels in fold.labels.T:
        labelled = np.flatnonzero(~np.isnan(labels))
        kept[generator.permutation(labelled)[:rows]] = True
    return fold.take(np.flatnonzero(kept))
