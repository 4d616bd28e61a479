"""Mappings, of YAML or JSON, become frozen dataclasses, or are refused.

No unknown, missing or repeated key, no value of another type.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from pipelines.contracts.errors import InvalidConfig

__all__ = ["build", "read_yaml"]

Section = TypeVar("Section")


def read_yaml(path: Path, *, secret: bool = False) -> dict[str, Any]:
    """The mapping a YAML file holds; raises `InvalidConfig` if it cannot be read or is something else.

    Args:
        secret: whether errors are silent about what came, since a password might have been put there by mistake.
    """
    try:
        raw = yaml.load(path.read_text(), _EachKeyOnce)
    except _Repeated as error:
        raise InvalidConfig(
            f"{path}, line {error.line}", expected="each key of a mapping once",
            got=f"{'a key' if secret else repr(error.key)} again",
            remedy="Remove one of the two, or rename it.",
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date, or bytes that are none
        raise InvalidConfig(
            f"{path} cannot be read", expected="a YAML file",
            got=" ".join(str(error).split()) if not secret or isinstance(error, OSError) else "something else",
            remedy="Correct the path or the file.",
        ) from (None if secret else error)
    return _mapping(raw, str(path), secret)


class _Repeated(Exception):
    def __init__(self, key: str, line: int) -> None:
        super().__init__(key, line)
        self.key, self.line = key, line


class _EachKeyOnce(yaml.SafeLoader):
    """Of a key that stands twice in a mapping, PyYAML would keep the last.

    Keys are compared as text, which is what they become here: `1` and `"1"` are the same.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, known = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:  # as they are written, before `<<` is replaced by what it stands for
            plain = isinstance(key, yaml.ScalarNode) and key.tag not in _PLACEHOLDERS
            name = str(self.construct_object(key)) if plain else str(key.value)
            if name in known:
                raise _Repeated(name, key.start_mark.line + 1)
            known.add(name)
        return node


_PLACEHOLDERS = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")


def build(section: type[Section], raw: Any, *, where: str, manual: str, secret: bool = False) -> Section:
    """Make the dataclass `section` from a mapping.

    Args:
        section: a dataclass of str, int, float, bool, `tuple[str, ...]`, `dict[str, str]`, other such dataclasses and
            optional fields. Its `__post_init__` may refuse values. What is such a dataclass already stays.
        raw: what YAML or JSON gave.
        where: how an error names this place, such as `online_retail: graph.bought`.
        manual: the file that explains every key, for the remedy.
        secret: as for `read_yaml`.

    Raises:
        InvalidConfig: an unknown or missing key, or a value of the wrong type.
    """
    values = _mapping(raw, where, secret)
    known = [field.name for field in fields(section)]
    if unknown := [key for key in values if key not in known]:
        raise InvalidConfig(
            f"{where}: unknown key", expected=f"keys of {known}", got=_shown(unknown, secret),
            remedy=f"`{manual}` explains every key.",
        )
    required = [f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise InvalidConfig(
            f"{where}: missing key", expected=f"{missing}",
            got=_shown(sorted(map(str, values)), secret) if values else "nothing",
            remedy=f"Add it; `{manual}` explains every key.",
        )
    hints = get_type_hints(section)
    told = {"manual": manual, "secret": secret}
    return section(**{key: _checked(value, hints[key], f"{where}.{key}", **told) for key, value in values.items()})


def _shown(value: Any, secret: bool) -> str:
    return type(value).__name__ if secret else repr(value)


def _mapping(raw: Any, where: str, secret: bool) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise InvalidConfig(
            f"{where}", expected="a mapping of keys to values", got=_shown(raw, secret), remedy="Correct the file."
        )
    return dict(raw)


def _checked(value: Any, hint: Any, where: str, *, manual: str, secret: bool) -> Any:
    """`value` as the type `hint`; an int is a float, a list is a tuple, a mapping is a dataclass."""
    told = {"manual": manual, "secret": secret}
    if hint is Any:
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where=where, **told)
    if get_origin(hint) is UnionType:
        if value is None and NoneType in get_args(hint):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_checked(each, get_args(hint)[0], where, **told) for each in value)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return {
            str(key): _checked(each, get_args(hint)[1], f"{where}.{key}", **told) for key, each in value.items()
        }
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is not None or type(value) is not hint:
        name = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
        raise InvalidConfig(where, expected=name, got=_shown(value, secret), remedy="Correct the value.")
    return value
