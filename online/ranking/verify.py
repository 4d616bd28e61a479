"""Answers of a ranker, recomputed offline for the version each one names: the proof that no answer mixed versions.

Nothing of the serving path is used: rows come from the published Parquet files by the numpy codec, the model runs on
the CPU. Only the context is read where the ranker reads it, from the Feast online store.
"""

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from online.ranking.context_source import ContextSource
from pipelines.contracts.context import ContextFeature, context_matrix
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.upper_files import prove_published_model
from pipelines.contracts.workspace import Workspace

__all__ = ["Answers", "OfflineVersion", "Verdict", "verify"]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of a probability that rounding may cause: batches of other sizes, FBGEMM against numpy, CUDA."""

PAIRS_PER_BATCH = 4096


@dataclass(frozen=True)
class Answers:
    """R answered requests over P (user, candidate) pairs.

    Attributes:
        request: int64 (P,), ascending: which request a pair belongs to.
        users, items: int64 (P,).
        now_seconds: float64 (P,).
        scores: float32 (P, T).
        version: int64 (R,); manifest_sha256: R strings.
    """

    request: np.ndarray
    users: np.ndarray
    items: np.ndarray
    now_seconds: np.ndarray
    scores: np.ndarray
    version: np.ndarray
    manifest_sha256: list[str]


class OfflineVersion:
    """A published version, scored without any server."""

    def __init__(self, workspace: Workspace, version: int) -> None:
        self.manifest = workspace.versions.manifest(version)
        self._directory = workspace.versions.path(version)
        self.manifest.verify(self._directory)
        self.model = prove_published_model(self.manifest, self._directory).build()
        self._tables = {spec.name: self._read(spec) for spec in self.manifest.tables}

    @cached_property
    def sha256(self) -> str:
        return self.manifest.sha256

    def rows(self, spec: TableSpec, ids: np.ndarray) -> np.ndarray:
        """Dequantized rows, float32 (P, D), of ids int64 (P,) by the table's id rule: own, bucket's or default row."""
        known, packed = self._tables[spec.name]
        ids = spec.rule.stored_ids(ids, vocabulary=known[spec.buckets :])
        default = np.frombuffer(spec.default_row_bytes, np.uint8)
        if not len(known):
            return codec(spec.quantization).decode(np.tile(default, (len(ids), 1)), spec.dim)
        position = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        chosen = packed[position]
        chosen[known[position] != ids] = default
        return codec(spec.quantization).decode(chosen, spec.dim)

    def scores(self, users: np.ndarray, items: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (P, T), of pairs int64 (P,) with their context matrix (P, F)."""
        ids = {"user": users, "item": items}
        rows = {spec.name: torch.from_numpy(self.rows(spec, ids[spec.entity])) for spec in self.manifest.tables}
        with torch.inference_mode():
            return torch.sigmoid(self.model(rows, torch.from_numpy(context))).numpy()

    def _read(self, spec: TableSpec) -> tuple[np.ndarray, np.ndarray]:
        content = self.manifest.read_file(self._directory, Manifest.table_path(spec.name))
        table = pq.read_table(pa.BufferReader(content), columns=["id", "row"])
        rows = table["row"].combine_chunks()
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.chunk(0)
        packed = np.frombuffer(rows.buffers()[1], np.uint8, spec.row_bytes * spec.rows, rows.offset * spec.row_bytes)
        return table["id"].to_numpy(), packed.reshape(spec.rows, spec.row_bytes)


@dataclass(frozen=True)
class Verdict:
    """What recomputing found.

    Attributes:
        checked: requests recomputed; all of them.
        wrong_scores: requests whose scores are not those of the version they name.
        mixed_version: these, and requests that name a version by a number and a manifest that do not belong together.
        distinguishable: requests whose scores under some other seen version differ by more than the tolerance, so that
            a mix could not have gone unnoticed.
        max_difference: largest difference to the named version's score.
        tolerance: what was allowed.
    """

    checked: int
    wrong_scores: int
    mixed_version: int
    distinguishable: int
    max_difference: float
    tolerance: float


def verify(workspace: Workspace, answers: Answers, context: ContextSource, *, tolerance: float = TOLERANCE) -> Verdict:
    """Recompute every answer for the version it names, and for every other version seen: do they differ?"""
    versions = {number: OfflineVersion(workspace, int(number)) for number in np.unique(answers.version).tolist()}
    requests = len(answers.version)
    features = list(dict.fromkeys(f for version in versions.values() for f in version.model.config.context))
    named_difference = np.zeros(requests)
    other_difference = np.zeros(requests)
    pair_version = answers.version[answers.request]
    pairs = _ContextOfPairs(context, features, answers)
    for start in tqdm(range(0, len(answers.users), PAIRS_PER_BATCH), desc="recomputing answers", disable=None):
        part = slice(start, start + PAIRS_PER_BATCH)
        columns = pairs.columns(part)
        for number, version in versions.items():
            matrix = context_matrix(version.model.config.context, columns, answers.now_seconds[part])
            scores = version.scores(answers.users[part], answers.items[part], matrix)
            if scores.shape[1] == answers.scores.shape[1]:
                difference = np.abs(scores - answers.scores[part]).max(axis=1)
            else:
                difference = np.full(len(scores), np.inf)
            difference[np.isnan(difference)] = np.inf
            named = pair_version[part] == number
            requests_of = answers.request[part]
            np.maximum.at(named_difference, requests_of[named], difference[named])
            np.maximum.at(other_difference, requests_of[~named], difference[~named])
    manifests = np.array([versions[number].sha256 for number in answers.version.tolist()], dtype=object)
    wrong = named_difference > tolerance
    return Verdict(
        checked=requests,
        wrong_scores=int(wrong.sum()),
        mixed_version=int((wrong | (manifests != np.array(answers.manifest_sha256, dtype=object))).sum()),
        distinguishable=int((other_difference > tolerance).sum()),
        max_difference=float(named_difference.max(initial=0.0)),
        tolerance=tolerance,
    )


class _ContextOfPairs:
    """Context of the answers' pairs; each distinct pair is read once per batch of distinct pairs."""

    def __init__(self, source: ContextSource, features: list[ContextFeature], answers: Answers) -> None:
        pairs, self._inverse = np.unique(np.stack([answers.users, answers.items], axis=1), axis=0, return_inverse=True)
        self._inverse = self._inverse.reshape(-1)
        parts = [
            source.columns(features, users=pairs[start : start + PAIRS_PER_BATCH, 0],
                           items=pairs[start : start + PAIRS_PER_BATCH, 1])
            for start in tqdm(range(0, len(pairs), PAIRS_PER_BATCH), desc="reading context", disable=None)
        ]
        self._columns = {
            feature.key: np.concatenate([part[feature.key] for part in parts]) if parts else np.empty(0)
            for feature in features
        }

    def columns(self, part: slice) -> dict[str, np.ndarray]:
        return {key: column[self._inverse[part]] for key, column in self._columns.items()}
