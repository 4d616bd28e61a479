"""Whether every way to a row gives the bytes that were published.

For each table of a version, the published Parquet file is compared with

```
lookup       the table's reader, in batches of shuffled ids: what the CPU tier answers with, from segments or Redis
segment      the row that lies where a segment's index says; over all ids: each row is reached by exactly one
online       Feast's get_online_features
offline      Feast's get_historical_features at the version's as_of
unknown ids  ids that the file does not have: the default row or their bucket's, and the same answer from Feast
```

Each way is reduced to SHA-256 over (id, row) in the order of ids; a row differs if any way gives other bytes for it.
The file is read once, by row groups; memory is bounded by a batch, and by a byte for each row of the largest segment.
"""

import hashlib
import json
import math
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pipelines import audit_ways
from pipelines.audit_ways import Way
from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.row_store import SEGMENTS, RowReader, RowStore, row_store
from pipelines.contracts.segment import Segment
from pipelines.contracts.workspace import Workspace
from pipelines.published_table import FEW_IDS, PublishedTable, UnknownIds

__all__ = ["WAYS", "audit"]

WAYS = ("lookup", "segment", "online", "offline")
FALSE_POSITIVE_RATE = 2.0**-16
"""At most how often an unknown id may pass for a known one: what row readers promise."""
NAMED = 10


def audit(
    workspace: Workspace, version: int, *, sample: int | None = None, seed: int = 0, rows: RowStore | None = None
) -> dict[str, Any]:
    """Compare every published row of a version, or `sample` of each table, with what each way answers.

    Args:
        rows: where the materialized rows lie; by default what `online_store:` of `feature_store.yaml` names.

    Returns:
        version, manifest_sha256, rows_checked, rows_different, rows_per_s, wall_s, problems (a sentence for each thing
        that is not as published; empty if all is), and per table what `_audit_table` returns. The same is written to
        `<workspace>/audit/<version>.json`.

    Raises:
        VersionNotFound: the version is not published or not materialized.
        IntegrityError: a file of the version is not what its manifest names, or a table belongs to another manifest.
        NotPrepared: Feast does not know the version's views.
    """
    started = time.perf_counter()
    manifest = workspace.versions.manifest(version)
    directory = workspace.versions.path(version)
    paths = {manifest.table_path(spec.name): spec.name for spec in manifest.tables}
    manifest.verify(directory, only=tuple(name for name in manifest.files if name not in paths))
    with ExitStack() as stack:  # what is compared is what was hashed
        files = {table: stack.enter_context(manifest.open_file(directory, name)) for name, table in paths.items()}
        return _audit(workspace, manifest, files, sample=sample, seed=seed, rows=rows, started=started)


def _audit(
    workspace: Workspace, manifest: Manifest, files: dict[str, BinaryIO], *, sample: int | None, seed: int,
    rows: RowStore | None, started: float,
) -> dict[str, Any]:
    """The audit of the tables' open files."""
    version = manifest.version
    feast = _feast_store(workspace)
    rows = rows or row_store(getattr(feast.config.online_store, "rows", SEGMENTS), workspace)
    tables = {}
    for spec in manifest.tables:
        reader = (rows.check if sample is None else rows.open)(version, spec.name)
        if reader.manifest_sha256 != manifest.sha256 or reader.spec != spec:
            raise IntegrityError(
                rows.describe(version, spec.name), expected=f"manifest {manifest.sha256}", got=reader.manifest_sha256,
                remedy="Delete it and materialize the version again.",
            )
        tables[spec.name] = _audit_table(
            PublishedTable(files[spec.name], spec), reader,
            online=audit_ways.online(feast, manifest, spec), offline=audit_ways.offline(feast, manifest, spec),
            sample=sample, rng=np.random.default_rng(seed),
        )
    wall_s, checked = time.perf_counter() - started, sum(table["rows_checked"] for table in tables.values())
    report = {
        "version": version,
        "manifest_sha256": manifest.sha256,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sample": sample,
        "rows_checked": checked,
        "rows_different": sum(table["rows_different"] for table in tables.values()),
        "rows_per_s": round(checked / wall_s),
        "wall_s": wall_s,
        "problems": [f"{name}: {problem}" for name, table in tables.items() for problem in table["problems"]],
        "tables": tables,
    }
    with replacing_file(workspace.root / "audit" / f"{version}.json") as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def _audit_table(
    table: PublishedTable, reader: RowReader, *, online: Way, offline: Way, sample: int | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Compare one table.

    Returns:
        rows_checked, rows_different, first_different (way -> the first ids), sha256 (of `published` and of each way),
        unknown_ids (how many were asked, how many passed for known and how many may), problems.
    """
    total = table.spec.rows
    chosen = None if sample is None or sample >= total else np.sort(rng.choice(total, sample, replace=False))
    reached = np.zeros(total if isinstance(reader, Segment) else 0, bool)
    ways = {"lookup": audit_ways.shuffled(reader.lookup, rng), "online": online, "offline": offline}
    if isinstance(reader, Segment):
        ways["segment"] = audit_ways.by_position(reader, reached)
    published, tallies = _Tally(), {way: _Tally() for way in ways}
    unknown, checked, different = UnknownIds(table, rng), 0, 0
    with tqdm(
        total=total if chosen is None else len(chosen), desc=f"audit {table.spec.name}", unit="row", unit_scale=True,
        disable=None,
    ) as progress:
        for ids, rows in table.batches(chosen, unknown):
            published.add(ids, rows, np.ones(len(ids), bool), published=rows)
            wrong = [tallies[way].add(ids, *ask(ids), published=rows) for way, ask in ways.items()]
            checked, different = checked + len(ids), different + int(np.any(wrong, axis=0).sum())
            progress.update(len(ids))
    problems = [
        f"{way} gives other bytes than were published, or none, for {tally.different:,} rows, ids {tally.first} first"
        for way, tally in tallies.items()
        if tally.different
    ]
    if chosen is None and not reached.all():
        problems.append(f"{np.count_nonzero(~reached):,} rows of the segment are reached by no id")
    asked = unknown.ids()
    passed, allowed = _ask_unknown(asked, table, reader, problems)
    _ask_feast_unknown(np.unique(asked[:FEW_IDS]), reader, online=online, offline=offline, problems=problems)
    return {
        "rows_checked": checked,
        "rows_different": different,
        "first_different": {way: tally.first for way, tally in tallies.items() if tally.first},
        "sha256": {way: tally.sha256 for way, tally in {"published": published, **tallies}.items()},
        "unknown_ids": {"asked": len(asked), "passed_for_known": passed, "at_most": allowed},
        "problems": problems,
    }


def _ask_unknown(
    ids: np.ndarray, table: PublishedTable, reader: RowReader, problems: list[str]
) -> tuple[int, int]:
    """Look up ids that the table does not have; returns how many passed for known, and how many may by bad luck."""
    spec, (rows, found) = table.spec, reader.lookup(ids)
    if spec.buckets:
        buckets, place = np.unique(spec.rule.bucket_ids(ids), return_inverse=True)
        expected = table.rows_at(buckets + spec.buckets)[place]  # the file begins with the rows of all buckets
    else:
        expected = np.frombuffer(spec.default_row_bytes, np.uint8)
    other = (rows != expected).any(axis=1)
    # beside buckets an id that passes for known shows by its row, and where there is no vocabulary none can
    passed = {"vocabulary": found, "vocabulary+buckets": other, "hash": np.zeros(len(ids), bool)}[spec.id_rule]
    wrong = (other | (found != bool(spec.buckets))) & ~passed
    allowed = _most_by_chance(len(ids) * FALSE_POSITIVE_RATE)
    if passed.sum() > allowed:
        problems.append(f"{_some(ids, passed)} pass for known; by chance it would be {allowed} at most")
    if wrong.any():
        problems.append(f"{_some(ids, wrong)} get neither the default row nor their bucket's")
    return int(passed.sum()), allowed


def _ask_feast_unknown(
    ids: np.ndarray, reader: RowReader, *, online: Way, offline: Way, problems: list[str]
) -> None:
    """Feast must say online what the reader says, and offline that there is nothing."""
    if not len(ids):
        return
    (rows, found), (online_rows, online_found) = reader.lookup(ids), online(ids)
    other = (online_found != found) | (found & (online_rows != rows).any(axis=1))
    if other.any():
        problems.append(f"online, {_some(ids, other)} are answered otherwise than by lookup")
    if (invented := offline(ids)[1]).any():
        problems.append(f"offline, {_some(ids, invented)} have rows")


def _some(ids: np.ndarray, which: np.ndarray) -> str:
    return f"{which.sum():,} of {len(ids):,} unknown ids, {ids[which][:NAMED].tolist()} first,"


def _most_by_chance(expected: float) -> int:
    """What a sum of independent rare events exceeds with probability under 1e-9 (Bernstein's inequality)."""
    odds = math.log(1e9)
    return math.floor(expected + odds / 3 + math.sqrt(odds * odds / 9 + 2 * odds * expected))


class _Tally:
    """What one way answered: the hash of it, and where it is not what was published."""

    def __init__(self) -> None:
        self._digest, self.different, self.first = hashlib.sha256(), 0, []

    def add(self, ids: np.ndarray, rows: np.ndarray, found: np.ndarray, *, published: np.ndarray) -> np.ndarray:
        """Take up the answer for ascending ids; returns which rows differ, bool (B,)."""
        bad = ~found | (rows != published).any(axis=1)
        self.different += int(bad.sum())
        self.first += ids[bad][: NAMED - len(self.first)].tolist()
        if not found.all():
            ids, rows = ids[found], rows[found]
        self._digest.update(np.concatenate([ids.astype("<i8").view(np.uint8).reshape(-1, 8), rows], axis=1))
        return bad

    @property
    def sha256(self) -> str:
        """Over id (8 bytes, little-endian) and row of each id that has one."""
        return self._digest.hexdigest()


def _feast_store(workspace: Workspace) -> Any:
    from feast import FeatureStore

    workspace.require(workspace.feature_repo / "feature_store.yaml", "init: it comes with the project")
    return FeatureStore(repo_path=str(workspace.feature_repo))
