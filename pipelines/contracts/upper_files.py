"""The two files of an upper model: written together, and proved before memory is taken for a model.

```
config.json        ──read once, hash──► UpperConfig ──built without memory──► name -> shape and dtype
model.safetensors  ──at most that large? read once, hash──► the same names, shapes and dtypes, finite ──► model
```

Each file is opened once. What was hashed and proved are bytes that this process holds: the model is made of them, and
not of what lies at the same path a moment later.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from pipelines.contracts.errors import IntegrityError, InvalidConfig
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_model import UpperModel
from pipelines.contracts.verified import read_verified

__all__ = [
    "MAX_PARAMETERS", "ProvedModel", "load_upper_model", "prove_published_model", "prove_upper_model",
    "save_upper_model",
]

MAX_PARAMETERS = 1 << 26
"""Most numbers in an upper model: 256 MiB of float32."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: names, shapes and offsets
REMEDY = "Publish a version whose upper model has both files of one training."


@dataclass(frozen=True)
class ProvedModel:
    """An upper model whose files fit together.

    Attributes:
        weights: name -> float32 tensor on the CPU, finite: exactly those of `UpperModel(config)`.
    """

    config: UpperConfig
    weights: Mapping[str, Tensor]

    def build(self, *, device: str = "cpu") -> UpperModel:
        """The model, in evaluation mode."""
        model = _without_memory(self.config).to_empty(device=device)
        model.load_state_dict(self.weights)
        return model.eval()


def save_upper_model(model: UpperModel, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(model.config.to_json())
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / WEIGHTS)


def load_upper_model(directory: Path) -> UpperModel:
    """The model that was saved into `directory`, proved, in evaluation mode; raises as `prove_upper_model`."""
    return prove_upper_model(directory, name=f"upper model at {directory}").build()


def prove_published_model(manifest: Manifest, directory: Path) -> ProvedModel:
    """The upper model of the published version in `directory`; raises as `prove_upper_model`."""
    hashes = {
        Path(name).name: manifest.files.get(name, "of a file of this version")
        for name in (Manifest.UPPER_CONFIG, Manifest.UPPER_WEIGHTS)
    }
    folder = (directory / Manifest.UPPER_CONFIG).parent
    return prove_upper_model(
        folder, name=f"upper model of version {manifest.version}", tables=manifest.tables, sha256=hashes
    )


def prove_upper_model(
    directory: Path, *, name: str, tables: Iterable[TableSpec] | None = None, sha256: Mapping[str, str] | None = None
) -> ProvedModel:
    """Show that a ranker can run the model of `directory`.

    Takes no memory for a model. Of the weights, no more is read than the configuration describes, and never more than
    `MAX_PARAMETERS`.

    Args:
        name: how errors name the model.
        tables: those it must take rows of; None for those of its configuration.
        sha256: of each of the two files, by its name; None for files that nobody has hashed.

    Raises:
        IntegrityError: a file is missing or has other bytes; the configuration cannot be understood, is out of range,
            or is for other tables; a parameter is missing, not finite, unknown, of another shape or dtype.
    """
    hashes = sha256 or {}
    content = read_verified(
        directory / CONFIG, hashes.get(CONFIG), at_most_bytes=MAX_CONFIG_BYTES, remedy=REMEDY
    )
    try:
        config = UpperConfig.from_json(content)
    except InvalidConfig as error:
        raise _unfit(name, error.problem, expected=error.expected, got=error.got) from error
    if tables is not None and (dims := {spec.name: spec.dim for spec in tables}) != config.tables:
        raise _unfit(name, "tables", expected=f"the published ones {dims}", got=str(config.tables))
    described = _without_memory(config).state_dict()
    parameters = sum(tensor.numel() for tensor in described.values())
    if parameters > MAX_PARAMETERS:
        raise _unfit(name, "parameters", expected=f"at most {MAX_PARAMETERS:,}", got=f"{parameters:,}")
    described_bytes = sum(tensor.nbytes for tensor in described.values())
    content = read_verified(
        directory / WEIGHTS, hashes.get(WEIGHTS), at_most_bytes=described_bytes + MAX_HEADER_BYTES, remedy=REMEDY
    )
    try:
        weights = load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _unfit(name, WEIGHTS, expected="tensors that fill a safetensors file", got=repr(error)) from error
    _check_weights(name, weights, described)
    return ProvedModel(config, weights)


def _without_memory(config: UpperConfig) -> UpperModel:
    with torch.device("meta"):
        return UpperModel(config)


def _check_weights(name: str, weights: Mapping[str, Tensor], described: Mapping[str, Tensor]) -> None:
    """Refuse the first parameter that is not as described, or that no score could be computed with."""
    for parameter in (*described, *sorted(weights.keys() - described.keys())):
        expected, got = _form(described.get(parameter)), _form(weights.get(parameter))
        if expected != got:
            raise _unfit(name, f"parameter {parameter}", expected=expected, got=got)
        if not torch.isfinite(weights[parameter]).all():
            raise _unfit(name, f"parameter {parameter}", expected="finite weights", got="NaN or infinity")
    if not (weights["context_std"] > 0).all():
        least = weights["context_std"].min().item()
        raise _unfit(name, "parameter context_std", expected="numbers above 0, to divide by", got=f"{least:g}")


def _form(tensor: Tensor | None) -> str:
    return "nothing of this name" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _unfit(name: str, part: str, *, expected: str, got: str) -> IntegrityError:
    return IntegrityError(f"{name}: {part}", expected=expected, got=got, remedy=REMEDY)
