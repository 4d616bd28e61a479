"""What a caller of Feast's API may ask of our online store, and the refusal of everything else.

Feast converts ids with Python's `int` before a store is asked to read: 7.9 and true would answer with the rows of 7
and 1, and 2**63 would end as an error of the server. They are looked at before that.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from feast import FeatureService, FeatureView, ValueType
from feast.errors import FeastError
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.Value_pb2 import Value

from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import InvalidConfig

__all__ = ["EntityRows", "RequestRefused", "ids_of", "refuse_search", "refuse_write", "require_ids"]

EntityRows = list[dict[str, Any]] | Mapping[str, Any]

_IDS = np.iinfo(np.int64)


class RequestRefused(InvalidConfig, FeastError):
    """A request that nothing would make possible; Feast's HTTP server answers with 422."""

    def http_status_code(self) -> int:
        return 422


def require_ids(
    entity_rows: EntityRows, *, features: list[str] | FeatureService, registry: BaseRegistry, project: str
) -> None:
    """Raise `RequestRefused` for an id of an integer entity that is not a 64-bit integer.

    An integer may come as decimal text, which callers send whose numbers are floating point, such as JavaScript.
    """
    columns = _columns(entity_rows)
    doubtful = {name: values for name, values in columns.items() if not _plainly_ids(values)}
    if not doubtful:
        return
    keys = _integer_keys(features, registry, project)
    for name in doubtful.keys() & keys:
        for row, value in enumerate(doubtful[name]):
            if not _is_id(value):
                raise _refused(f"cannot read ids of {name}", row, "null" if value is None else repr(value))


def ids_of(view: str, values: Sequence[Value]) -> np.ndarray:
    """int64 (B,); raises `RequestRefused` for a value that is not one."""
    ids = np.fromiter((value.int64_val for value in values), np.int64, len(values))
    for row in np.flatnonzero(ids == 0).tolist():  # which is also what a value of another type reads as
        if (kind := values[row].WhichOneof("val")) != "int64_val":
            raise _refused(f"cannot read {view}", row, (kind or "null").removesuffix("_val"))
    return ids


def refuse_write(table: FeatureView) -> None:
    if view := EmbeddingView.from_tags(table.tags):
        raise RequestRefused(
            f"cannot write into {table.name}", expected="a view whose rows may change",
            got=f"table {view.table} of version {view.version}, which is immutable",
            remedy="Publish a new version; `feast materialize` makes its rows readable.",
        )


def refuse_search(table: FeatureView) -> None:
    if EmbeddingView.from_tags(table.tags):
        raise RequestRefused(
            f"cannot search {table.name}", expected="a view with a vector index",
            got="packed rows, which are read by id", remedy="Read rows with `get_online_features`.",
        )


def _columns(entity_rows: EntityRows) -> dict[str, Sequence[Any]]:
    """Values by key; those that came as protobuf keep their type, and are looked at when they are read."""
    if isinstance(entity_rows, Mapping):
        return {name: values for name, values in entity_rows.items() if isinstance(values, Sequence)}
    names = dict.fromkeys(name for row in entity_rows for name in row)
    return {name: [row[name] for row in entity_rows if name in row] for name in names}


def _plainly_ids(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == {int} and _IDS.min <= min(values) and max(values) <= _IDS.max


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            return False
        return str(number) == value and _in_range(number)
    return isinstance(value, Integral) and not isinstance(value, bool) and _in_range(int(value))


def _in_range(number: int) -> bool:
    return _IDS.min <= number <= _IDS.max


def _integer_keys(features: list[str] | FeatureService, registry: BaseRegistry, project: str) -> set[str]:
    """Under which names a request may carry ids of integer entities: join keys, entities, and a service's aliases."""
    entities = [
        each for each in registry.list_entities(project, allow_cache=True) if each.value_type == ValueType.INT64
    ]
    keys = {each.join_key for each in entities}
    aliases: Iterable[tuple[str, str]] = (
        alias
        for projection in getattr(features, "feature_view_projections", ())
        for alias in projection.join_key_map.items()
    )
    return keys | {each.name for each in entities} | {alias for key, alias in aliases if key in keys}


def _refused(problem: str, row: int, got: str) -> RequestRefused:
    return RequestRefused(
        problem, expected="ids that are 64-bit integers", got=f"{got} at row {row}",
        remedy="Send every id as an integer.",
    )
