"""Mappings, of YAML or JSON, become frozen dataclasses, or are refused.

No unknown, missing or repeated key, no value of another type.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

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
        raw = yaml.load(path.read_text(), _Loader)
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


class _Written(int):
    """A whole number of a YAML file, which is its text where text is expected."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2, of which PyYAML knows 1.1: `on` and `no` are text, `12:30` is no number, `1e-3` is one.

    Whole numbers are those whose text can be had back from them; `007`, `0x1F` and `1_000` are text. A key that stands
    twice in a mapping is refused, of which PyYAML would keep the last; keys are compared as the text that they become,
    so that `1` and `"1"` are the same.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of YAML 1.1's

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, known = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:  # as they are written, before `<<` is replaced by what it stands for
            plain = isinstance(key, yaml.ScalarNode) and key.tag not in _PLACEHOLDERS
            name = str(self.construct_object(key)) if plain else str(key.value)
            if name in known:
                raise _Repeated(name, key.start_mark.line + 1)
            known.add(name)
        return node


_PLACEHOLDERS = ("tag:yaml.org,2002:merge",)
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"0|-?[1-9][0-9]*", [*"-0123456789"]),
    "float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)", [*"-+.0123456789"],
    ),
    "timestamp": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", [*"0123456789"]),
    "merge": (r"<<", ["<"]),
}
"""What is written without quotes and is no text: the type, its pattern, and the characters that it begins with."""
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _Written(loader.construct_scalar(node)))


def build(section: type[Section], raw: Any, *, where: str, manual: str, secret: bool = False) -> Section:
    """Make the dataclass `section` from a mapping.

    Args:
        section: a dataclass of str, int, float, bool, `tuple[str, ...]`, `dict[str, str]`, other such dataclasses and
            optional fields. Its `__post_init__` may refuse values. What is such a dataclass already stays. A whole
            number of a YAML file is its text where text is expected, keys included.
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
        return tuple(_checked(each, get_args(hint)[0], f"{where}[{at}]", **told) for at, each in enumerate(value))
    if get_origin(hint) is dict and isinstance(value, Mapping):
        keys = [_checked(key, str, f"{where}: a key", **told) for key in value]
        return {
            key: _checked(each, get_args(hint)[1], f"{where}.{key}", **told)
            for key, each in zip(keys, value.values(), strict=True)
        }
    if isinstance(value, _Written):
        value = str(value) if hint is str else int(value)
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is not None or type(value) is not hint:
        name = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
        remedy = "Put it in quotes, or correct it." if hint is str else "Correct the value."
        raise InvalidConfig(where, expected=name, got=_shown(value, secret), remedy=remedy)
    return value
