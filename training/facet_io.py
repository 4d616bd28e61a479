"""What a facet's pretraining leaves on disk: rows by entity as safetensors, and how they came about."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.contracts.durable import creating_directory, replacing_file
from pipelines.contracts.errors import IntegrityError, InvalidConfig, InvalidTable

__all__ = [
    "EXPORTS", "METRICS_NAME", "load_partial", "load_rows", "require_export", "save_partial", "scaled", "write_facet",
]

METRICS_NAME = "metrics.json"
EXPORTS = ("unit_rows", "unit_mean", "raw")
Rows = tuple[np.ndarray, Tensor]
"""(ids int64 (N,), weight fp32 (N, D))"""


def require_export(mode: str, *, option: str) -> None:
    """Raise `InvalidConfig` unless `mode` is one of `EXPORTS`."""
    if mode not in EXPORTS:
        raise InvalidConfig(option, expected=f"one of {', '.join(EXPORTS)}", got=repr(mode), remedy="Choose one.")


def scaled(weight: Tensor, mode: str) -> Tensor:
    """Rows (N, D) at the scale of `mode`: every row, or the mean row, of length 1; or as they are."""
    if mode == "unit_rows":
        return torch.nn.functional.normalize(weight, dim=1)
    return weight / weight.norm(dim=1).mean().clamp(min=1e-12) if mode == "unit_mean" else weight


def write_facet(
    directory: Path, entities: Mapping[str, Rows], metrics: Mapping[str, Any], *,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a facet: whole or not at all; one that lies there already is replaced.

    Args:
        entities: entity -> (ids, weight); written in ascending order of ids to `<entity>.safetensors`.
        extra: file name -> named tensors, such as relation parameters.

    Raises:
        InvalidTable: no rows, repeated ids or numbers that are not finite.
    """
    for entity, (ids, weight) in entities.items():
        if not len(ids) or len(np.unique(ids)) != len(ids) or not torch.isfinite(weight).all():
            raise InvalidTable(
                f"rows of {entity}", expected="one finite row for each distinct id",
                got=f"{len(ids)} rows, {len(np.unique(ids))} distinct ids", remedy="Lower the learning rates.",
            )
    with creating_directory(directory) as staging:
        for entity, (ids, weight) in entities.items():
            order = np.argsort(ids)
            tensors = {"ids": torch.from_numpy(ids[order]), "weight": weight[order].float().contiguous()}
            save_file(tensors, staging / f"{entity}.safetensors")
        for name, tensors in (extra or {}).items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staging / name)
        (staging / METRICS_NAME).write_text(json.dumps(metrics, indent=1))
        if directory.exists():
            shutil.rmtree(directory)


def load_rows(path: Path) -> Rows:
    """(ids int64 (N,) ascending, weight fp32 (N, D)) of an entity's file; raises `IntegrityError` if it has no such."""
    try:
        tensors = load_file(path)
        return tensors["ids"].numpy(), tensors["weight"]
    except (SafetensorError, KeyError) as error:
        raise IntegrityError(
            f"{path} cannot be read", expected="safetensors with ids and weight", got=repr(error),
            remedy="Delete its folder and pretrain again.",
        ) from error


def save_partial(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Replace the checkpoint of a training that is under way."""
    with replacing_file(path) as staging:
        save_file({name: t.contiguous() for name, t in tensors.items()}, staging, {"progress": json.dumps(progress)})


def load_partial(path: Path, *, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and progress of a checkpoint; None if there is none, or it belongs to another training.

    Args:
        fingerprint: what the checkpoint's `progress["fingerprint"]` must be: a digest of configuration, seed and data.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            if progress["fingerprint"] != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None  # torn by a crash: training starts over, as without it
