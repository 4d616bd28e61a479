"""Whether every way to a row gives the bytes that were published.

For each table of a version, the published Parquet file is compared with

```
segment      the rows of the memory-mapped segment, in order
lookup       Segment.lookup in batches of shuffled ids: what the CPU tier answers with
online       Feast's get_online_features
offline      Feast's get_historical_features at the version's as_of
```

Each way is reduced to SHA-256 over (id, row) in the order of ids; a row differs if any way gives other bytes for it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError, NotPrepared
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.segment import Segment
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.workspace import Workspace

__all__ = ["WAYS", "audit"]

logger = logging.getLogger(__name__)

WAYS = ("segment", "lookup", "online", "offline")
BATCH_ROWS = 5_000

# ids int64 (B,) -> rows uint8 (B, row_bytes) and found bool (B,), in the order of the ids
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def audit(workspace: Workspace, version: int, *, sample: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Compare every published row of a version, or `sample` of each table, with what each way answers.

    Returns:
        version, manifest_sha256, rows_checked, rows_different, wall_s, and per table: rows_checked, rows_different,
        differing ids by way (the first ten), and the SHA-256 of `published` and of each way. The same is written to
        `<workspace>/audit/<version>.json`.

    Raises:
        VersionNotFound: the version is not published or not materialized.
        IntegrityError: a file of the version is not what its manifest names.
        NotPrepared: Feast does not know the version's views.
    """
    started = time.perf_counter()
    manifest = workspace.versions.manifest(version)
    manifest.verify(workspace.versions.path(version))
    store = _feast_store(workspace)
    tables = {}
    for spec in manifest.tables:
        segment = Segment.open(workspace.segment(version, spec.name))
        readers = {
            "segment": _in_order(segment),
            "lookup": _shuffled(segment, seed),
            "online": _online(store, manifest, spec),
            "offline": _offline(store, manifest, spec),
        }
        tables[spec.name] = _compare(_published(workspace, manifest, spec, sample, seed), readers, spec)
    report = {
        "version": version,
        "manifest_sha256": manifest.sha256,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sample": sample,
        "rows_checked": sum(table["rows_checked"] for table in tables.values()),
        "rows_different": sum(table["rows_different"] for table in tables.values()),
        "wall_s": time.perf_counter() - started,
        "tables": tables,
    }
    with replacing_file(workspace.root / "audit" / f"{version}.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _compare(
    batches: Iterator[tuple[np.ndarray, np.ndarray]], readers: dict[str, Reader], spec: TableSpec
) -> dict[str, Any]:
    hashes = {way: hashlib.sha256() for way in ("published", *readers)}
    different: dict[str, list[int]] = {way: [] for way in readers}
    checked = wrong = 0
    with tqdm(total=spec.rows, desc=f"audit {spec.name}", unit="row", unit_scale=True, disable=None) as progress:
        for ids, published in batches:
            differs = np.zeros(len(ids), bool)
            hashes["published"].update(_id_row_bytes(ids, published))
            for way, read in readers.items():
                rows, found = read(ids)
                bad = ~found | (rows != published).any(axis=1)
                differs |= bad
                different[way] += ids[bad][: 10 - len(different[way])].tolist()
                hashes[way].update(_id_row_bytes(ids[found], rows[found]))
            checked, wrong = checked + len(ids), wrong + int(differs.sum())
            progress.update(len(ids))
    return {
        "rows_checked": checked,
        "rows_different": wrong,
        "first_different": {way: ids for way, ids in different.items() if ids},
        "sha256": {way: digest.hexdigest() for way, digest in hashes.items()},
    }


def _id_row_bytes(ids: np.ndarray, rows: np.ndarray) -> bytes:
    """id (8 bytes, little-endian) and row of each, one after the other."""
    return np.concatenate([ids.astype("<i8").view(np.uint8).reshape(-1, 8), rows], axis=1).tobytes()


def _published(
    workspace: Workspace, manifest: Manifest, spec: TableSpec, sample: int | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of ids and rows from the version's Parquet file, ascending; all of them or a random sample."""
    chosen = None
    if sample is not None and sample < spec.rows:
        chosen = np.sort(np.random.default_rng(seed).choice(spec.rows, sample, replace=False))
    path, start = workspace.versions.path(manifest.version) / manifest.table_path(spec.name), 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["id", "row"]):
            ids, rows = batch.column("id").to_numpy(), _as_rows(batch.column("row").to_pylist(), spec)[0]
            if chosen is not None:
                inside = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(ids))] - start
                ids, rows = ids[inside], rows[inside]
                start += batch.num_rows
            if len(ids):
                yield ids, rows


def _in_order(segment: Segment) -> Reader:
    """The segment's own arrays, read without its lookup."""

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, end = np.searchsorted(segment.ids, ids[0]), np.searchsorted(segment.ids, ids[-1], side="right")
        stretch = segment.ids[first:end]
        found = np.isin(ids, stretch, assume_unique=True)
        rows = np.zeros((len(ids), segment.spec.row_bytes), np.uint8)
        rows[found] = segment.rows[first:end][np.isin(stretch, ids, assume_unique=True)]
        return rows, found

    return read


def _shuffled(segment: Segment, seed: int) -> Reader:
    rng = np.random.default_rng(seed)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(ids))
        back = np.argsort(order)
        rows, found = segment.lookup(ids[order])
        return rows[back], found[back]

    return read


def _feast_store(workspace: Workspace) -> Any:
    from feast import FeatureStore

    workspace.require(workspace.feature_repo / "feature_store.yaml", "init: it comes with the project")
    return FeatureStore(repo_path=str(workspace.feature_repo))


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
    view = EmbeddingView.from_tags(tags)
    if view is None or view.manifest_sha256 != manifest.sha256:
        raise IntegrityError(
            f"feature view {name}", expected=f"tags of manifest {manifest.sha256}", got=str(tags),
            remedy="Run `feast apply`.",
        )
    return f"{name}:{EmbeddingView.FEATURE}"


def _online(store: Any, manifest: Manifest, spec: TableSpec) -> Reader:
    reference = _reference(store, manifest, spec)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        response = store.get_online_features(features=[reference], entity_rows={spec.entity: ids.tolist()})
        return _as_rows(response.to_dict()[EmbeddingView.FEATURE], spec)

    return read


def _offline(store: Any, manifest: Manifest, spec: TableSpec) -> Reader:
    import pandas as pd

    reference = _reference(store, manifest, spec)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moments = pd.DataFrame({spec.entity: ids, "event_timestamp": pd.Timestamp(manifest.as_of)})
        answer: pa.Table = store.get_historical_features(entity_df=moments, features=[reference]).to_arrow()
        answer = answer.sort_by(spec.entity)  # the ids came ascending; the join returns them in any order
        return _as_rows(answer[EmbeddingView.FEATURE].to_pylist(), spec)

    return read


def _as_rows(values: list[bytes | None], spec: TableSpec) -> tuple[np.ndarray, np.ndarray]:
    """Bytes or None of each id -> uint8 (B, row_bytes), zeros where nothing of that width came, and which did."""
    found = np.array([value is not None and len(value) == spec.row_bytes for value in values], bool)
    empty = bytes(spec.row_bytes)
    joined = b"".join(value if known else empty for value, known in zip(values, found, strict=True))
    return np.frombuffer(joined, np.uint8).reshape(len(values), spec.row_bytes), found
