"""The training configuration. `defaults.yaml` is the manual; a user's file overrides some of it; all of it is checked."""

from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from pipelines.contracts.errors import InvalidConfig

__all__ = ["load_section"]

Section = TypeVar("Section")


def load_section(name: str, section: type[Section], override: Path | None = None) -> Section:
    """Build the frozen dataclass `section` from `defaults.yaml`'s mapping `name`, with a user's file laid over it.

    Args:
        name: top-level key of the YAML files, such as `contrastive`.
        section: a dataclass whose fields are the keys; its `__post_init__` may refuse values.
        override: a YAML file of the same shape, with only what differs.

    Raises:
        InvalidConfig: an unknown key, a missing key or a value of the wrong type.
    """
    values = dict(_read(Path(str(files("training") / "defaults.yaml"))).get(name, {}))
    if override is not None:
        values |= _read(override).get(name, {}) or {}
    known = {field.name for field in fields(section)}
    required = {f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING}
    if unknown := set(values) - known:
        raise InvalidConfig(
            f"section '{name}' of the configuration", expected=f"keys of {sorted(known)}", got=f"{sorted(unknown)}",
            remedy="`training/defaults.yaml` explains every key.",
        )
    if missing := required - set(values):
        raise InvalidConfig(
            f"section '{name}' of the configuration", expected=f"{sorted(missing)}", got="nothing", remedy="Add them."
        )
    hints = get_type_hints(section)
    return section(**{key: _checked(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidConfig(
            f"configuration {path}", expected="a YAML file", got=str(error), remedy="Correct the path or the file."
        ) from error
    if not isinstance(raw, dict):
        raise InvalidConfig(
            f"configuration {path}", expected="sections with keys", got=type(raw).__name__,
            remedy="Start from `training/defaults.yaml`.",
        )
    return raw


def _checked(key: str, value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list) and getattr(kind, "__origin__", None) is tuple:
        return tuple(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise InvalidConfig(
            f"configuration key {key}", expected=kind.__name__, got=f"{value!r}", remedy="Correct the value."
        )
    return value
