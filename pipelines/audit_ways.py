"""The ways from ids to rows that an audit compares: a table's reader, the segment's index, Feast online and offline.

Each is a function of ascending, distinct ids, int64 (B,), to rows, uint8 (B, row_bytes), and found, bool (B,).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError, NotPrepared
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.segment import Segment
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import row_matrix

__all__ = ["Way", "by_position", "offline", "online", "shuffled"]

Way = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

ONLINE_ROWS = 10_000


def shuffled(lookup: Way, rng: np.random.Generator) -> Way:
    """A reader's lookup, asked in another order each time."""

    def ask(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(ids))
        back = np.argsort(order)
        rows, found = lookup(ids[order])
        return rows[back], found[back]

    return ask


def by_position(segment: Segment, reached: np.ndarray) -> Way:
    """Rows where the segment's index says that they lie; `reached`, bool (N,), is set where it said so."""

    def ask(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = segment.positions(ids)
        found = position >= 0
        reached[position[found]] = True
        rows = np.zeros((len(ids), segment.spec.row_bytes), np.uint8)
        rows[found] = segment.rows[position[found]]
        return rows, found

    return ask


def online(store: Any, manifest: Manifest, spec: TableSpec) -> Way:
    """Feast's get_online_features; raises `NotPrepared` or `IntegrityError` unless the view is this version's."""
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    reference = _reference(store, manifest, spec)

    def ask(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = []
        for start in range(0, len(ids), ONLINE_ROWS):
            some = ids[start : start + ONLINE_ROWS].tolist()
            answer = store.get_online_features(features=[reference], entity_rows={spec.entity: some}).proto
            # to_dict would also turn the ids into Python's numbers again, which takes as long as the rows
            row = answer.results[list(answer.metadata.feature_names.val).index(EmbeddingView.FEATURE)]
            read = [
                value.bytes_val if status == FieldStatus.PRESENT else None
                for value, status in zip(row.values, row.statuses, strict=True)
            ]
            values.append(pa.array(read, pa.large_binary()))
        return _as_rows(pa.chunked_array(values, pa.large_binary()), spec)

    return ask


def offline(store: Any, manifest: Manifest, spec: TableSpec) -> Way:
    """Feast's get_historical_features at the version's as_of; an id that it answers twice counts as not found.

    DuckDB reads only the row groups that can hold the ids: a table asked stretch by stretch is read about once.
    """
    import pandas as pd

    reference = _reference(store, manifest, spec)

    def ask(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moments = pd.DataFrame({spec.entity: ids, "event_timestamp": pd.Timestamp(manifest.as_of)})
        with _leaving_no_views():
            answer: pa.Table = store.get_historical_features(entity_df=moments, features=[reference]).to_arrow()
        answered, answered_found = _as_rows(answer[EmbeddingView.FEATURE], spec)
        place = np.searchsorted(ids, answer[spec.entity].to_numpy())  # they come in any order
        rows, found = np.zeros((len(ids), spec.row_bytes), np.uint8), np.zeros(len(ids), bool)
        rows[place], found[place] = answered, answered_found
        return rows, found & (np.bincount(place, minlength=len(ids)) == 1)

    return ask


@contextmanager
def _leaving_no_views() -> Iterator[None]:
    """Feast's offline store leaves two views with its DuckDB connection each time it is asked: a frame and a file.

    A frame holds an id and a moment, 16 bytes, for each row ever asked.
    """
    import ibis

    connection = ibis.get_backend().con

    def views() -> set[str]:
        named = "SELECT view_name FROM duckdb_views() WHERE temporary AND NOT internal"
        return {name for (name,) in connection.execute(named).fetchall()}

    before = views()
    try:
        yield
    finally:
        for name in views() - before:
            connection.unregister(name)  # only frames
            connection.execute(f'DROP VIEW IF EXISTS "{name}"')


def _reference(store: Any, manifest: Manifest, spec: TableSpec) -> str:
    from feast.errors import FeatureViewNotFoundException

    name = spec.view_name(manifest.version)
    try:
        tags = store.get_feature_view(name).tags
    except FeatureViewNotFoundException as error:
        raise NotPrepared(
            f"feature view {name}", expected="a view that Feast knows", got="none of that name",
            remedy="Run `feast apply` and `feast materialize` in feature_repo/ first.",
        ) from error
    if EmbeddingView.from_tags(tags) != EmbeddingView.of(manifest, spec):
        raise IntegrityError(
            f"feature view {name}", expected=f"tags of manifest {manifest.sha256}", got=str(tags),
            remedy="Run `feast apply`.",
        )
    return f"{name}:{EmbeddingView.FEATURE}"


def _as_rows(values: pa.ChunkedArray, spec: TableSpec) -> tuple[np.ndarray, np.ndarray]:
    """Bytes or null of each id -> uint8 (B, row_bytes), zeros where nothing of that width came, and which did."""
    column = values.combine_chunks()
    found = pc.fill_null(pc.equal(pc.binary_length(column), spec.row_bytes), False)
    whole = pc.if_else(found, column, pa.scalar(bytes(spec.row_bytes), column.type))
    return row_matrix(whole.cast(pa.binary(spec.row_bytes))), found.to_numpy(zero_copy_only=False)
