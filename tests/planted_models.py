"""Upper models of which one thing is wrong: what publish and load must refuse.

A damage changes the folder of `config.json` and `model.safetensors`. Both files stay well-formed; `plant` makes a
published version of it whose every hash is right.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from pipelines.contracts.durable import sha256_of
from pipelines.contracts.workspace import Workspace

__all__ = ["DAMAGES", "configured", "plant"]

Damage = Callable[[Path], None]


def configured(change: Callable[[dict], object]) -> Damage:
    def apply(upper: Path) -> None:
        raw = json.loads((upper / "config.json").read_text())
        change(raw)
        (upper / "config.json").write_text(json.dumps(raw))

    return apply


def weighted(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def apply(upper: Path) -> None:
        weights = load_file(upper / "model.safetensors")
        change(weights)
        save_file(weights, upper / "model.safetensors")

    return apply


def filled(name: str, value: float) -> Damage:
    return weighted(lambda weights: weights[name].fill(value))


def plant(workspace: Workspace, version: int, damage: Damage) -> None:
    """Damage a published version and seal it again, as if it had been published before anybody proved models."""
    directory, manifest = workspace.versions.path(version), workspace.versions.manifest(version)
    damage(directory / "upper")
    replace(manifest, files={name: sha256_of(directory / name) for name in manifest.files}).write(directory)


def with_huge_header(upper: Path) -> None:
    """A header of 3 MB, which a safetensors file may have."""
    weights = load_file(upper / "model.safetensors")
    save_file(weights, upper / "model.safetensors", metadata={"note": "x" * 3_000_000})


DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights of another config": (
        configured(lambda raw: raw.update(hidden=[24])),
        r"deep\.0\.weight.*expected torch\.float32 of shape \(24, .*got torch\.float32 of shape \(16,",
    ),
    "a deeper config": (
        configured(lambda raw: raw.update(hidden=[16, 16])),
        r"deep\.3\.weight.*expected torch\.float32 of shape \(16, 16\), got nothing of this name",
    ),
    "no weights at all": (weighted(dict.clear), r"context_mean.*expected torch\.float32.*got nothing of this name"),
    "a missing parameter": (weighted(lambda w: w.pop("heads.bias")), r"heads\.bias.*got nothing of this name"),
    "a parameter too many": (
        weighted(lambda w: w.update(extra=np.zeros(3, np.float32))),
        r"parameter extra.*expected nothing of this name, got torch\.float32 of shape \(3,\)",
    ),
    "another dtype": (
        weighted(lambda w: w.update({"heads.bias": w["heads.bias"].astype(np.float64)})),
        r"heads\.bias.*expected torch\.float32 of shape \(2,\), got torch\.float64 of shape \(2,\)",
    ),
    "NaN weights": (filled("deep.0.bias", np.nan), r"deep\.0\.bias.*expected finite weights"),
    "context divided by nothing": (filled("context_std", 0.0), r"context_std.*expected numbers above 0.*got 0"),
    "an unknown transform": (
        configured(lambda raw: raw["context"][0].update(transform="sqrt")),
        r"context feature user_context:events_7d.*got 'sqrt'",
    ),
    "an unknown entity": (configured(lambda raw: raw["tables"].update({"shop.kge": 12})), r"table shop\.kge"),
    "another table's width": (
        configured(lambda raw: raw["tables"].update({"item.kge": 13})), r"tables.*'item\.kge': 12.*'item\.kge': 13"
    ),
    "a task twice": (configured(lambda raw: raw.update(tasks=["purchase"] * 2)), r"tasks.*expected distinct names"),
    "no task": (configured(lambda raw: raw.update(tasks=[])), r"tasks.*expected 1 to"),
    "an unknown key": (configured(lambda raw: raw.update(gates=4)), r"unknown key.*gates"),
    "layers of two million units": (
        configured(lambda raw: raw.update(hidden=[2_000_000, 2_000_000])), r"units of a hidden layer.*got 2,000,000"
    ),
    "layers that are too large together": (
        configured(lambda raw: raw.update(hidden=[16_384, 16_384])), r"parameters.*expected at most 67,108,864, got 26"
    ),
    "more weights than described": (
        weighted(lambda w: w.update(extra=np.zeros(1 << 20, np.float32))), r"too large.*expected at most 1,\d"
    ),
    "a huge header": (with_huge_header, r"too large.*expected at most 1,\d"),
    "a huge configuration": (configured(lambda raw: raw.update(note="x" * 2_000_000)), r"config\.json is too large"),
}
"""What is wrong -> how to make it so, and what the refusal says."""
