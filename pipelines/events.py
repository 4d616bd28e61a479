"""Canonical events: the one shape every log becomes, and the facts written beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import BaseBackend

from pipelines.backend import write_parquet
from pipelines.contracts.durable import replacing_file, require_writable
from pipelines.contracts.errors import InvalidEvents, NotPrepared
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.workspace import Workspace

__all__ = [
    "SCHEMA", "TIME", "TIMESTAMP", "EventFacts", "events_lineage", "events_schema", "read_events", "read_facts",
    "write_events",
]

TIME = pa.timestamp("us", tz="UTC")
"""Type of every time in a file."""

TIMESTAMP = "timestamp('UTC')"
"""The same in Ibis's words; its `truncate` forgets the zone."""

SCHEMA = pa.schema(
    [
        pa.field("user", pa.int64(), nullable=False),
        pa.field("item", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("surface", pa.string(), nullable=False),
        pa.field("event_timestamp", TIME, nullable=False),
        pa.field("value", pa.float64()),
    ]
)
"""Columns of every events file. After them come `session` (int64) and side attributes (string or double), all nullable,
if the log has them. Rows are sorted by time, then by every other column, so equal logs make equal files."""


@dataclass(frozen=True)
class EventFacts:
    """What `events.json` says of the events beside it.

    Attributes:
        dataset: the data set's name.
        reference: how its definition is found again: a name that comes with the project, or the path of a YAML file.
        rows_read: rows of the log.
        dropped: reason -> rows left out.
        rows, users, items: what was kept, and its distinct ids.
        kinds: kind -> rows.
        first, last: times of the first and the last event, ISO 8601.
        columns: names of the columns of the events.
    """

    dataset: str
    reference: str
    rows_read: int
    dropped: dict[str, int]
    rows: int
    users: int
    items: int
    kinds: dict[str, int]
    first: str
    last: str
    columns: list[str]


def events_schema(*, session: bool, text: list[str], number: list[str]) -> pa.Schema:
    """`SCHEMA` and the optional columns of one log."""
    fields = [pa.field("session", pa.int64())] if session else []
    fields += [pa.field(name, pa.string()) for name in text] + [pa.field(name, pa.float64()) for name in number]
    return pa.schema([*SCHEMA, *fields])


def _facts_path(workspace: Workspace) -> Path:
    return workspace.events.with_suffix(".json")


def write_events(
    events: pa.Table, facts: EventFacts, workspace: Workspace, *, log: Lineage, settings: Mapping[str, Any]
) -> None:
    """Write `events.parquet`, `events.json` and, last, their lineage; without it they do not count as whole.

    Args:
        log: lineage of the log's files.
        settings: how the log was read.
    """
    require_writable(workspace.root)
    lineage_of(workspace.events).unlink(missing_ok=True)
    write_parquet(events, workspace.events, events.schema)
    with replacing_file(_facts_path(workspace)) as staging:
        staging.write_text(json.dumps(asdict(facts), indent=1))
    Lineage.record("the events", workspace.events, settings=settings, inputs={"log": log})


def events_lineage(workspace: Workspace) -> Lineage:
    """What the workspace's events were made from.

    Raises:
        NotPrepared: no ingestion finished here.
        StaleInput: the file is not the one that was written.
    """
    return Lineage.read(lineage_of(workspace.events), stage="ingest")


def read_facts(workspace: Workspace) -> EventFacts:
    """Facts of the workspace's events; raises `NotPrepared` if no ingestion finished here."""
    path = _facts_path(workspace)
    if not all(each.is_file() for each in (path, workspace.events, lineage_of(workspace.events))):
        raise NotPrepared(
            f"no events in {workspace.root}", expected=f"{workspace.events.name} and {path.name}", got="nothing",
            remedy="Run `facet ingest` first.",
        )
    raw: dict[str, Any] = json.loads(path.read_text())
    return EventFacts(**raw)


def read_events(backend: BaseBackend, workspace: Workspace) -> ibis.Table:
    """The workspace's events as an expression.

    Raises:
        NotPrepared: there are none.
        InvalidEvents: the file lacks a column of `SCHEMA` or has it in another type.
    """
    _require_schema(pq.read_schema(workspace.require(workspace.events, "ingest")), str(workspace.events))
    return backend.read_parquet(str(workspace.events))


def _require_schema(schema: pa.Schema, where: str) -> None:
    """Raise `InvalidEvents` unless `schema` starts as `SCHEMA` does, name by name and type by type."""
    got = {name: str(schema.field(name).type) for name in schema.names if name in SCHEMA.names}
    expected = {field.name: str(field.type) for field in SCHEMA}
    if got != expected:
        raise InvalidEvents(
            f"events of {where}", expected=f"columns {expected}", got=str(got), remedy="Run `facet ingest` again."
        )
