"""What the ranker learns from: examples with their labels, joined point in time with Feast's offline context views."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.contracts.context import CONTEXT_FEATURES, ContextFeature, context_matrix
from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.prepared import prepared
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.workspace import Run, Workspace

__all__ = ["FOLDS", "Fold", "fold_lineages", "historical_context", "load_folds"]

FOLDS = ("finetune", "validation", "test")
JOIN_CHUNK_ROWS = 50_000
"""Entity rows per offline join: each meets every older row of its entity, so memory grows with this number."""

FORMAT = 1
"""Raised when the same examples and views lead to another context than before."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """Examples of one fold, in the order of `examples.parquet`.

    ```
    user (N,)  item (N,)  labels (N, T)  context (N, F)
    ```

    Attributes:
        user, item: int64 entity ids.
        labels: float32, 0 or 1; NaN where an example has no label for a task.
        context: float32 of `context_matrix`; NaN where a view has no row yet.
    """

    user: np.ndarray
    item: np.ndarray
    labels: np.ndarray
    context: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Fold":
        """The examples at `rows`."""
        return Fold(self.user[rows], self.item[rows], self.labels[rows], self.context[rows])


def load_folds(
    workspace: Workspace, run: Run, *, repo: Path | None = None, tasks: Sequence[str] | None = None
) -> dict[str, Fold]:
    """Examples of a run with their context, by fold.

    The join with the offline store is done once and kept beside the examples (`context.npz`), since every arm and seed
    reads the same one. It is done anew when its lineage says that the examples or a view are others now.

    Args:
        repo: the Feast repository; by default the workspace's.
        tasks: label columns; by default the run's.

    Raises:
        NotPrepared: no examples, no views, or a Feast repository without the views applied.
        StaleInput: examples or views that do not fit the events.
        InvalidConfig: a fold has no examples, or a task no label of each kind in the fine-tuning fold.
    """
    stage = f"prepare --run {run.name}"
    spec = RunSpec.read(workspace.require(run.spec, stage))
    tasks = tuple(tasks or spec.tasks)
    table = pq.read_table(workspace.require(run.examples, stage))
    context = _kept_context(workspace, run, table, repo=repo or workspace.feature_repo)
    labels = np.stack(
        [table[task].cast(pa.float32()).to_numpy() for task in tasks], axis=1
    )  # (N, T), null becomes NaN
    fold_of = table["fold"].to_pandas().to_numpy()
    everything = Fold(table["user"].to_numpy(), table["item"].to_numpy(), labels, context)
    folds = {name: everything.take(np.flatnonzero(fold_of == name)) for name in FOLDS}
    _require_labels(folds, tasks)
    return folds


def fold_lineages(workspace: Workspace, run: Run) -> dict[str, Lineage]:
    """What the folds were made from, once `load_folds` has returned them: `examples` and `context`.

    Raises:
        NotPrepared, StaleInput: as `load_folds`.
    """
    return {
        "examples": prepared(workspace, run, run.examples),
        "context": Lineage.read(lineage_of(run.context), stage=f"finetune --run {run.name}"),
    }


def historical_context(
    repo: Path, keys: pd.DataFrame, features: Sequence[ContextFeature] = CONTEXT_FEATURES
) -> np.ndarray:
    """Context features of (user, item, moment) rows as they were known then, from Feast's offline store.

    Each view is joined on the distinct values of its own keys and of the view's time that the moment sees: all moments
    between two stamps of a view see the same rows, so a user's context is fetched once a day, not once for every item.

    Args:
        repo: folder of `feature_store.yaml`, its views applied.
        keys: columns user, item (int64) and event_timestamp (UTC); any order, repeats allowed.

    Returns:
        float32, shape (N, F), row i for row i of `keys`; NaN where a view has no row at or before the moment.

    Raises:
        NotPrepared: the views are not in the registry, or their data is not there.
    """
    store, views = _open_store(repo, sorted({feature.view for feature in features}))
    moments = keys["event_timestamp"].dt.tz_convert("UTC").dt.tz_localize(None).to_numpy("datetime64[us]")
    columns: dict[str, np.ndarray] = {}
    for name, view in views.items():
        wanted = [feature for feature in features if feature.view == name]
        entities = keys[list(view.join_keys)].assign(event_timestamp=_last_stamp(view, moments))
        group = entities.groupby(list(entities.columns), sort=False).ngroup().to_numpy()
        distinct = entities.drop_duplicates().reset_index(drop=True)  # groups in the order of their first row
        # a row number is carried along: the offline store returns rows in any order
        distinct["example"] = np.arange(len(distinct))
        values = np.full((len(distinct), len(wanted)), np.nan)
        chunks = range(0, len(distinct), JOIN_CHUNK_ROWS)
        for start in tqdm(chunks, desc=f"join {name}", unit="chunk", disable=None, leave=False):
            joined = store.get_historical_features(
                entity_df=distinct.iloc[start : start + JOIN_CHUNK_ROWS],
                features=[feature.reference for feature in wanted],
                full_feature_names=True,
            ).to_arrow()
            rows = joined["example"].to_numpy()
            for position, feature in enumerate(wanted):
                values[rows, position] = joined[feature.key].cast(pa.float64()).to_numpy()
        columns |= {feature.key: values[group, position] for position, feature in enumerate(wanted)}
    return context_matrix(features, columns, moments.astype(np.float64) / 1e6)


def _open_store(repo: Path, names: list[str]) -> tuple:
    """The store, and its feature views by name."""
    from feast import FeatureStore
    from feast.errors import FeastObjectNotFoundException

    if not (repo / "feature_store.yaml").is_file():
        raise NotPrepared(
            f"{repo} is not a Feast repository", expected="feature_store.yaml", got="nothing",
            remedy="Keep feature_repo/ beside the workspace folder.",
        )
    store = FeatureStore(repo_path=str(repo))
    try:
        return store, {name: store.get_feature_view(name) for name in names}
    except FeastObjectNotFoundException as error:
        raise NotPrepared(
            f"the context views of {repo} are not applied", expected=f"views {names} in the registry", got=str(error),
            remedy=f"Run `feast apply` in {repo}.",
        ) from error


def _last_stamp(view, moments: np.ndarray) -> pd.DatetimeIndex:
    """The view's last time of change at or before each moment; the moment itself where there is none."""
    path, column = Path(view.batch_source.path), view.batch_source.timestamp_field
    if not path.is_file():
        raise NotPrepared(
            f"the data of view {view.name}", expected=str(path), got="nothing", remedy="Run `facet prepare`, then "
            "`feast apply` in the workspace's feature_repo.",
        )
    stamps = np.unique(pq.read_table(path, columns=[column])[column].to_numpy().astype("datetime64[us]"))
    place = np.searchsorted(stamps, moments, side="right") - 1
    last = np.where(place >= 0, stamps[np.maximum(place, 0)], moments) if len(stamps) else moments
    return pd.DatetimeIndex(last).tz_localize("UTC")


def _kept_context(workspace: Workspace, run: Run, examples: pa.Table, *, repo: Path) -> np.ndarray:
    views = sorted({feature.view for feature in CONTEXT_FEATURES})
    inputs = {"examples": prepared(workspace, run, run.examples)}
    inputs |= {view: prepared(workspace, run, workspace.view(view)) for view in views}
    settings = {"format": FORMAT, "features": [asdict(feature) for feature in CONTEXT_FEATURES]}
    path = run.context
    try:
        changes = Lineage.read(lineage_of(path), stage=f"finetune --run {run.name}").changes(
            settings=settings, inputs=inputs
        )
    except (NotPrepared, StaleInput) as error:
        changes = [str(error)]
    if not changes:
        with np.load(path, allow_pickle=False) as kept:
            return kept["context"]
    if path.is_file():
        _log.info("%s is joined anew: %s", path, "; ".join(changes))
    _log.info("joining %s examples with %s", f"{len(examples):,}", ", ".join(views))
    context = historical_context(repo, examples.select(["user", "item", "event_timestamp"]).to_pandas())
    with replacing_file(path) as staging, staging.open("wb") as file:
        np.savez(file, context=context)
    Lineage.record(f"context of run {run.name}", path, settings=settings, inputs=inputs)
    return context


def _require_labels(folds: dict[str, Fold], tasks: Sequence[str]) -> None:
    for name, fold in folds.items():
        for position, task in enumerate(tasks):
            found = {float(value) for value in np.unique(fold.labels[:, position]) if not np.isnan(value)}
            if found != {0.0, 1.0}:
                raise InvalidConfig(
                    f"task '{task}' cannot be learned and measured", expected=f"labels 0 and 1 in the fold '{name}'",
                    got=f"{len(fold)} examples with labels {sorted(found)}",
                    remedy="Widen the run's windows, or leave the task out of the dataset's file.",
                )
