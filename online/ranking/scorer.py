"""One version's upper model on a device: packed rows and context in, probabilities out."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  registers the dequantization operators
import numpy as np
import torch
from torch import Tensor

from online.lookup.row_source import VersionRows
from online.rpc_error import Code, RpcError
from pipelines.contracts.context import ContextFeature, context_matrix
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.upper_files import prove_published_model
from pipelines.contracts.upper_model import UpperModel
from pipelines.contracts.workspace import Workspace

__all__ = ["Scored", "Scorer", "ToScore", "best_device", "dequantize"]

logger = logging.getLogger(__name__)


def best_device() -> str:
    """`cuda` when there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dequantize(packed: np.ndarray, spec: TableSpec, *, device: str) -> Tensor:
    """Packed rows to float32 on the device, with FBGEMM's operator of the table's quantization.

    The rows travel to the device packed: that is what the small rows are for.

    Args:
        packed: uint8 (B, row_bytes), as `pipelines.contracts.rowcodec` lays them out.

    Returns:
        float32 (B, D).

    Raises:
        RpcError: VERSION_MISMATCH, the rows are not as wide as those of the table.
    """
    if packed.shape[1] != spec.row_bytes:
        raise RpcError(
            Code.VERSION_MISMATCH, f"rows of {spec.name}", expected=f"{spec.row_bytes} bytes each, as in the manifest",
            got=f"{packed.shape[1]}", remedy="Check what answers as the CPU tier.",
        )
    values = _DEQUANTIZE[spec.quantization](_on_device(packed, device))
    return values if values.shape[1] == spec.dim else values[:, : spec.dim]


_DEQUANTIZE = {
    "int4": lambda rows: torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4),
    "int8": lambda rows: torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows),
    "fp16": lambda rows: rows.view(torch.float16).float(),
}


def _on_device(array: np.ndarray, device: str) -> Tensor:
    """The array on the device. To a GPU it travels from pinned memory without anybody waiting for it."""
    # PyTorch knows no read-only tensors, and the bytes of a message are read-only: those few kilobytes are copied.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class ToScore:
    """Candidates of one user, with all that a model needs.

    Attributes:
        rows: user tables with one row, item tables with C rows.
        columns: context, `ContextFeature.key` -> float64 (C,).
        candidates: C.
        now_seconds: moment of the request, seconds since 1970.
    """

    rows: VersionRows
    columns: Mapping[str, np.ndarray]
    candidates: int
    now_seconds: float


@dataclass(frozen=True)
class Scored:
    """Probabilities of one request's candidates.

    Attributes:
        scores: float32 (C, T).
        dequantize_ms, model_ms: what the forward pass took that it was part of.
    """

    scores: np.ndarray
    dequantize_ms: float
    model_ms: float


@dataclass(frozen=True)
class Scorer:
    """An upper model and what it needs to know of its version. Nothing in it changes: threads may share it."""

    version: int
    manifest_sha256: str
    tables: dict[str, TableSpec]
    model: UpperModel
    device: str

    @classmethod
    def load(cls, workspace: Workspace, version: int, *, device: str) -> "Scorer":
        """Prove and build the upper model of a published version, and run it once so that no request pays for that.

        Raises:
            VersionNotFound: it is not published in this workspace.
            IntegrityError: its bytes are not the manifest's, or it is no model of the manifest's tables that can run.
        """
        manifest = workspace.versions.manifest(version)
        model = prove_published_model(manifest, workspace.versions.path(version)).build(device=device)
        scorer = cls(version, manifest.sha256, {spec.name: spec for spec in manifest.tables}, model, device)
        scorer._warm_up()
        return scorer

    @property
    def context(self) -> tuple[ContextFeature, ...]:
        return self.model.config.context

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.config.tasks

    def score(self, requests: Sequence[ToScore]) -> list[Scored]:
        """Probabilities of several requests' candidates, in one forward pass; the rows are all of this version.

        Rows of a user are dequantized once and repeated for the candidates. A row's score depends on the other rows of
        the pass by rounding only, since nothing in the model mixes rows: `online.ranking.verify.TOLERANCE` covers it.
        """
        started = time.perf_counter()
        counts = [request.candidates for request in requests]
        with torch.inference_mode():
            inputs = {name: self._values(spec, requests, counts) for name, spec in self.tables.items()}
            dequantized = time.perf_counter()
            columns = {
                feature.key: _joined([request.columns[feature.key] for request in requests]) for feature in self.context
            }
            now = np.repeat([request.now_seconds for request in requests], counts)
            logits = self.model(inputs, _on_device(context_matrix(self.context, columns, now), self.device))
            scores = torch.sigmoid(logits).cpu().numpy()
        dequantize_ms = (dequantized - started) * 1e3
        model_ms = (time.perf_counter() - dequantized) * 1e3
        ends = np.cumsum(counts).tolist()
        return [
            Scored(scores[end - count : end], dequantize_ms, model_ms) for count, end in zip(counts, ends, strict=True)
        ]

    def _values(self, spec: TableSpec, requests: Sequence[ToScore], counts: list[int]) -> Tensor:
        """float32 (sum of C, D): the dequantized rows of a table, one for each candidate of each request."""
        values = dequantize(_joined([request.rows.rows[spec.name] for request in requests]), spec, device=self.device)
        if spec.entity == "item":
            return values
        if len(counts) == 1:
            return values.expand(counts[0], -1)
        repeats = torch.tensor(counts, device=self.device)
        return torch.repeat_interleave(values, repeats, dim=0, output_size=sum(counts))

    def _warm_up(self) -> None:
        """Run once alone and once combined, at several sizes: kernels are chosen, memory is taken, by size."""
        for counts in ((1,), (4,), (16, 4), (500,)):
            self.score([self._default_request(count) for count in counts])

    def _default_request(self, count: int) -> ToScore:
        rows = {
            name: np.tile(np.frombuffer(spec.default_row_bytes, np.uint8), (repeats, 1))
            for name, spec in self.tables.items()
            for repeats in [1 if spec.entity == "user" else count]
        }
        found = {name: np.zeros(len(packed), bool) for name, packed in rows.items()}
        columns = {feature.key: np.full(count, np.nan) for feature in self.context}
        return ToScore(VersionRows(self.version, self.manifest_sha256, rows, found), columns, count, 0.0)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
