"""One version's upper model on a device: packed rows and context in, probabilities out."""

import logging
import time
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  registers the dequantization operators
import numpy as np
import torch
from torch import Tensor

from online.row_source import VersionRows
from pipelines.contracts.context import ContextFeature, context_matrix
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.upper_model import UpperModel, load_upper_model
from pipelines.contracts.workspace import Workspace

__all__ = ["Scorer", "best_device", "dequantize"]

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
    """
    rows = torch.from_numpy(packed if packed.flags.writeable else packed.copy()).to(device)
    values = _DEQUANTIZE[spec.quantization](rows)
    return values if values.shape[1] == spec.dim else values[:, : spec.dim]


_DEQUANTIZE = {
    "int4": lambda rows: torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4),
    "int8": lambda rows: torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows),
    "fp16": lambda rows: rows.view(torch.float16).float(),
}


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
        """Verify and build the upper model of a published version, and run it once so that no request pays for that.

        Raises:
            VersionNotFound: it is not published in this workspace.
            IntegrityError: its bytes are not the manifest's, or model and tables do not fit together.
        """
        manifest = workspace.versions.manifest(version)
        directory = workspace.versions.path(version)
        manifest.verify(directory, only=(Manifest.UPPER_CONFIG, Manifest.UPPER_WEIGHTS))
        model = load_upper_model(directory / "upper", device=device)
        tables = {spec.name: spec for spec in manifest.tables}
        dims = {name: spec.dim for name, spec in tables.items()}
        if model.config.tables != dims:
            raise IntegrityError(
                f"upper model of version {version}", expected=f"the manifest's tables {dims}",
                got=f"{model.config.tables}", remedy="Publish the version again.",
            )
        scorer = cls(version, manifest.sha256, tables, model, device)
        scorer._warm_up()
        return scorer

    @property
    def context(self) -> tuple[ContextFeature, ...]:
        return self.model.config.context

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.config.tasks

    def score(
        self, rows: VersionRows, columns: dict[str, np.ndarray], *, candidates: int, now_seconds: float
    ) -> tuple[np.ndarray, float, float]:
        """Probabilities of candidates for one user.

        Args:
            rows: user tables with one row, item tables with C rows.
            columns: context, `ContextFeature.key` -> float64 (C,).
            candidates: C.
            now_seconds: moment of the request, seconds since 1970.

        Returns:
            float32 (C, T), and the milliseconds that dequantizing and the model took.
        """
        started = time.perf_counter()
        with torch.inference_mode():
            inputs = {
                name: dequantize(rows.rows[name], spec, device=self.device).expand(candidates, -1)
                for name, spec in self.tables.items()
            }
            dequantized = time.perf_counter()
            context = context_matrix(self.context, columns, np.full(candidates, now_seconds))
            logits = self.model(inputs, torch.from_numpy(context).to(self.device))
            scores = torch.sigmoid(logits).cpu().numpy()
        return scores, (dequantized - started) * 1e3, (time.perf_counter() - dequantized) * 1e3

    def _warm_up(self) -> None:
        for count in (1, 16):
            rows = {
                name: np.tile(np.frombuffer(spec.default_row_bytes, np.uint8), (repeats, 1))
                for name, spec in self.tables.items()
                for repeats in [1 if spec.entity == "user" else count]
            }
            found = {name: np.zeros(len(packed), bool) for name, packed in rows.items()}
            columns = {feature.key: np.full(count, np.nan) for feature in self.context}
            answer = VersionRows(self.version, self.manifest_sha256, rows, found)
            self.score(answer, columns, candidates=count, now_seconds=0.0)
