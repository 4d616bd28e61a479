"""Pretrained facets as the first rows of the ranker's tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipelines.contracts.errors import IntegrityError, InvalidTable
from pipelines.contracts.runspec import FACETS
from pipelines.contracts.workspace import Run, Workspace
from training.ids import ENTITIES, RunIds
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary

__all__ = ["ENTITIES", "PretrainedTable", "load_pretrained", "vocabularies_of", "warm_rows"]


@dataclass(frozen=True)
class PretrainedTable:
    """One facet of one entity: stored ids int64 (N,) and weight float32 (N, D).

    Raises:
        InvalidTable: shapes that do not fit, no rows, repeated ids, or numbers that are not finite.
    """

    name: str
    ids: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        fits = self.weight.ndim == 2 and len(self.ids) == len(self.weight) > 0
        if not fits or len(np.unique(self.ids)) != len(self.ids):
            raise InvalidTable(
                f"pretrained table {self.name}", expected="distinct ids (N,) and weight (N, D) with at least one row",
                got=f"ids {self.ids.shape}, weight {self.weight.shape}", remedy="Pretrain the facet again.",
            )
        finite = np.isfinite(self.weight).all(axis=1)
        if not finite.all():
            raise InvalidTable(
                f"pretrained table {self.name}", expected="finite numbers",
                got=f"NaN or infinity in {int((~finite).sum())} of {len(finite)} rows",
                remedy="Pretrain the facet again with a smaller learning rate.",
            )

    @property
    def entity(self) -> str:
        return self.name.partition(".")[0]

    @property
    def facet(self) -> str:
        return self.name.partition(".")[2]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]


def load_pretrained(workspace: Workspace, run: Run, *, seed: int) -> dict[str, PretrainedTable]:
    """The four tables of a run's facets, `user.contrastive` to `item.kge`.

    Every arm needs them, scratch too: they fix the vocabulary and the dimensions, so that all arms have the same shape.

    Raises:
        NotPrepared: a facet of this seed was not pretrained.
        IntegrityError: a file that cannot be read.
        InvalidTable: see `PretrainedTable`.
    """
    tables = {}
    for entity in ENTITIES:
        for facet in FACETS:
            stage = f"pretrain {facet} --run {run.name} --seed {seed}"
            path = workspace.require(run.facet(facet, seed) / f"{entity}.safetensors", stage)
            tables[f"{entity}.{facet}"] = PretrainedTable(f"{entity}.{facet}", **_read(path))
    return tables


def vocabularies_of(
    pretrained: Mapping[str, PretrainedTable], seen: Mapping[str, np.ndarray], ids: RunIds | None = None
) -> dict[str, Vocabulary]:
    """Stored ids with a row, by entity: those of any facet, those of ids `seen` while fine-tuning, and all buckets."""
    ids = ids or RunIds()
    return {
        entity: Vocabulary(
            np.concatenate([
                *(table.ids for table in pretrained.values() if table.entity == entity),
                ids.stored(entity, seen[entity]),
            ]),
            ids.rule(entity),
        )
        for entity in ENTITIES
    }


def warm_rows(table: PretrainedTable, vocabulary: Vocabulary, *, scale: float, std: float, seed: int) -> np.ndarray:
    """First rows of a warm table, float32 (vocabulary.table_rows, D).

    Pretrained rows are multiplied by one number, so that the root mean square of their elements is `scale` whatever the
    facet exported; an id the facet does not know starts at N(0, std^2), as in a table from scratch; the default row
    starts at the mean of the pretrained rows.
    """
    generator = np.random.default_rng([seed, len(vocabulary.ids), table.dim])
    rows = generator.normal(0.0, std, (vocabulary.table_rows, table.dim)).astype(np.float32)
    size = float(np.sqrt(np.mean(np.square(table.weight, dtype=np.float64))))
    scaled = table.weight * np.float32(scale / size if size else 1.0)
    rows[vocabulary.stored_rows(table.ids)] = scaled
    rows[DEFAULT_ROW] = scaled.mean(axis=0)
    return rows


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
        return {"ids": tensors["ids"], "weight": tensors["weight"].astype(np.float32)}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise IntegrityError(
            f"pretrained table {path}", expected="safetensors with `ids` and `weight`", got=repr(error),
            remedy="Pretrain the facet again.",
        ) from error
