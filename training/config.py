"""The training configuration: `defaults.yaml` is the manual, a user's file overrides part of it, all is checked."""

import math
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.strict import build, read_yaml

__all__ = ["load_section", "require_positive"]

Section = TypeVar("Section")

MANUAL = "training/defaults.yaml"


def load_section(name: str, section: type[Section], override: Path | None = None) -> Section:
    """Build the frozen dataclass `section` from `defaults.yaml`'s mapping `name`, with a user's file laid over it.

    Args:
        name: top-level key of the YAML files, such as `contrastive`.
        section: a dataclass whose fields are the keys; its `__post_init__` may refuse values.
        override: a YAML file of the same shape, with only what differs.

    Raises:
        InvalidConfig: an unknown section or key, a missing key or a value of the wrong type.
    """
    defaults = read_yaml(Path(str(files("training") / "defaults.yaml")))
    values = dict(defaults.get(name, {}))
    if override is not None:
        changes = read_yaml(override)
        if unknown := set(changes) - set(defaults):
            raise InvalidConfig(
                f"configuration {override}", expected=f"sections of {sorted(defaults)}",
                got=f"{sorted(map(str, unknown))}", remedy=f"`{MANUAL}` explains every section.",
            )
        change = changes.get(name) or {}
        if not isinstance(change, dict):
            raise InvalidConfig(
                f"section '{name}' of {override}", expected="keys and values", got=repr(change),
                remedy=f"Start from `{MANUAL}`.",
            )
        values |= change
    return build(section, values, where=name, manual=MANUAL)


def require_positive(section: Any, name: str, *keys: str, or_zero: bool = False) -> None:
    """Raise `InvalidConfig` unless `keys` of the dataclass `section`, called `name`, are finite and above 0 (or 0)."""
    for key in keys:
        value = getattr(section, key)
        if not (math.isfinite(value) and (value > 0 or (value == 0 and or_zero))):
            raise InvalidConfig(
                f"configuration key {name}.{key}", expected="0 or more" if or_zero else "more than 0", got=str(value),
                remedy="Correct the value.",
            )
