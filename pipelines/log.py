"""The way in: any log, described by a data set's YAML, becomes canonical events, or is refused.

This is the one place that runs DuckDB's own SQL, because the YAML's expressions are written in it
(`pipelines.row_expressions` says what they may be). They reach the log's files and no other. Every refusal comes
before anything is written.
"""

import glob
import logging
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.contracts.errors import InvalidConfig, InvalidEvents
from pipelines.contracts.ids import as_ids
from pipelines.contracts.lineage import Lineage
from pipelines.dataset import Dataset
from pipelines.events import SCHEMA, EventFacts, events_schema
from pipelines.row_expressions import BARE_WORD, what_is_cast
from pipelines.text_log import CSV_SUFFIXES, TypedColumn, csv_error, quoted, read_csv_files, text, typed_column

__all__ = ["canonical_events", "log_lineage"]

logger = logging.getLogger(__name__)

ABOUT_IDS = (
    "Correct `ids` or, for a CSV log, `types` in the data set's YAML. Ids stored as floating point numbers are no "
    "longer those that they were, from 2^53 on: export the log with whole numbers or text, or keep a CSV column text."
)
DUPLICATE = "duplicate row"
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT"}
NO_EXTENSIONS = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
"""DuckDB would otherwise fetch and load code for a function or a file that it knows by name only."""
IDS = ("user", "item", "session")
TYPES = {"kind": "VARCHAR", "event_timestamp": "TIMESTAMP WITH TIME ZONE", "value": "DOUBLE"}


def canonical_events(dataset: Dataset, source: Path | None = None) -> tuple[pa.Table, EventFacts]:
    """Read a log, leave out what the data set's rules name, check the rest.

    Args:
        source: the log, if not the one the data set names.

    Returns:
        Events of schema `pipelines.events.events_schema`, sorted; and the facts.

    Raises:
        InvalidConfig: no source was given, or an expression cannot be understood.
        InvalidEvents: a missing column, a wrong type, a null id, an unknown kind, a time out of range, duplicate rows,
            or no rows at all.
    """
    with duckdb.connect(config=NO_EXTENSIONS) as database:
        database.execute("SET TimeZone = 'UTC'")
        database.execute("SET preserve_insertion_order = false")
        log = _Log(database, dataset, _source(dataset, source))
        log.open()
        log.confine()
        log.cast()
        dropped = log.apply_rules()
        log.check()
        events = log.events()
        rows_read = log.rows_read
    layout = dataset.log
    schema = events_schema(session="session" in layout.columns, text=list(layout.text), number=list(layout.number))
    times = events["event_timestamp"]
    kinds = events["kind"].value_counts()
    facts = EventFacts(
        dataset=dataset.name,
        reference=dataset.reference,
        rows_read=rows_read,
        dropped=dropped,
        rows=events.num_rows,
        users=len(events["user"].unique()),
        items=len(events["item"].unique()),
        kinds=dict(sorted((pair["values"], pair["counts"]) for pair in kinds.to_pylist())),
        first=times[0].as_py().isoformat(),
        last=times[-1].as_py().isoformat(),
        columns=schema.names,
    )
    return events.cast(schema), facts


def log_lineage(dataset: Dataset, source: Path | None = None) -> Lineage:
    """The files of a log, by their content; raises as `canonical_events` does if there are none."""
    path = _source(dataset, source)
    files = _files(path)
    return Lineage.of(f"the log {path}", files, within=path if path.is_dir() else path.parent)


def _source(dataset: Dataset, source: Path | None) -> Path:
    path = source if source is not None else dataset.source
    if path is None:
        raise InvalidConfig(
            f"the log of {dataset.name}", expected="its path", got="none",
            remedy="Give it with --source; this data set does not come with the project.",
        )
    return path


class _Log:
    """The steps, in the order of `canonical_events`, over one DuckDB connection.

    ```
    source  ──cast──►  typed: __reason, canonical columns  ──rules──►  kept  ──check, ids, sort──►  events
    ```
    """

    def __init__(self, database: duckdb.DuckDBPyConnection, dataset: Dataset, path: Path) -> None:
        self.database, self.dataset, self.layout = database, dataset, dataset.log
        self.path = path
        self.types: dict[str, str] = {}
        self.rows_read = 0
        self.expressions = {**self.layout.columns, **self.layout.text, **self.layout.number}

    # ---- Reading ----

    def open(self) -> None:
        """Make the view `source` of the log's own columns."""
        files = _files(self.path)
        self.names = [str(file) for file in files]
        self.patterns = [glob.escape(name) for name in self.names]  # DuckDB takes every path for a pattern
        try:
            if files[0].name.endswith(".parquet"):
                raw = self.database.read_parquet(self.patterns, union_by_name=True)
            else:
                raw = self.database.sql(read_csv_files(files, self.layout.csv))
            raw.create_view("raw")
            self.source_columns = raw.columns
            typed = self._typed(dict(zip(raw.columns, map(str, raw.types), strict=True)))
            values = ", ".join(f"{column.sql} AS {quoted(name)}" for name, column in typed.items())
            self.database.execute(f"CREATE VIEW source AS SELECT *{f' REPLACE ({values})' * bool(typed)} FROM raw")
            wrong = {name: f"{quoted(name)} IS NOT NULL AND {column.sql} IS NULL" for name, column in typed.items()}
            counts = ", ".join(["count(*)", *(f"count(*) FILTER ({condition})" for condition in wrong.values())])
            [(self.rows_read, *bad)] = self._rows(f"SELECT {counts} FROM raw")
        except duckdb.Error as error:
            raise InvalidEvents(
                f"{self.path} cannot be read", expected="a Parquet or CSV log", got=csv_error(error),
                remedy="Correct the file, or `csv` in the data set's YAML.",
            ) from error
        for name, count in zip(typed, bad, strict=True):
            if count:
                example = self._scalar(f"SELECT any_value({quoted(name)}) FROM raw WHERE {wrong[name]}")
                raise self._refusal(
                    f"column {name}", f"{typed[name].kind} in every row", f"another text in {count}: {example!r}",
                    "Correct the log, or the column's entry under `types` or `csv.nulls` in the data set's YAML.",
                )
        if self.rows_read == 0:
            raise self._refusal("the log is empty", "at least one row", "none", "Give another --source.")
        logger.info("%s: %d rows", self.path, self.rows_read)

    def _typed(self, types: dict[str, str]) -> dict[str, TypedColumn]:
        """The columns of text that the data set declares to be something else; Parquet's other columns have a type."""
        typed = {}
        for name, declared in self.layout.types.items():
            if name not in types:
                raise self._refusal(
                    f"missing column {name}", f"what `types` names among the log's columns {list(types)}", "none",
                    "Correct the log, or `types` in the data set's YAML.",
                )
            if types[name] == "VARCHAR":
                typed[name] = typed_column(quoted(name), declared, decimal=self.layout.csv.decimal)
            elif not _is(types[name], declared):
                raise self._refusal(
                    f"column {name}", f"{declared}, as `types` says", types[name],
                    "Correct the log, or `types` in the data set's YAML.",
                )
        return typed

    def confine(self) -> None:
        """From here on no statement reaches a file but the log's, a variable of this process, a secret or a setting."""
        self.database.execute("SET allowed_paths = ?", [[*self.names, *self.patterns]])
        self.database.execute("SET enable_external_access = false")
        self.database.execute("SET lock_configuration = true")

    def cast(self) -> None:
        """Materialize `typed`: each canonical column in its type, `__reason` to leave the row out, `__bad` casts."""
        for name, expression in self.expressions.items():
            self.expressions[name], self.types[name] = self._bound(name, expression)
        for name in self.layout.ids:
            self._require_exact(name, self.layout.columns[name])
        wanted = {name: self._wanted(name) for name in self.expressions}
        reason = "CAST(NULL AS VARCHAR)"
        if self.layout.drop:
            rules = []
            for name, expression in self.layout.drop.items():
                condition, _ = self._bound(f"drop rule '{name}'", expression)
                rules.append(f"WHEN {condition} THEN {text(name)}")
            reason = f"CASE {' '.join(rules)} END"
        columns, bad = [], []
        for name, kind in wanted.items():
            raw = self.expressions[name]
            cast = _cast(raw, kind)
            columns.append(f"{cast} AS {quoted(name)}")
            bad.append(f"WHEN {raw} IS NOT NULL AND {cast} IS NULL THEN {text(name)}")
        own = ", ".join(quoted(column) for column in self.source_columns)
        repeated = f"row_number() OVER (PARTITION BY {own})" if self.layout.max_duplicate_share is not None else "1"
        self._execute(
            f"CREATE TEMP TABLE typed AS SELECT {reason} AS __reason, {repeated} AS __copy, "
            f"CASE {' '.join(bad)} END AS __bad, {', '.join(columns)} FROM source"
        )

    def _bound(self, name: str, expression: str) -> tuple[str, str]:
        """An expression as part of a statement, and its type.

        A bare word is a column, never SQL: `user` would otherwise be the database's user, the same in every row.
        """
        if not BARE_WORD.fullmatch(expression):
            sql = f"({expression}\n)"  # a comment at its end reaches no further than itself
        elif expression in self.source_columns:
            sql = quoted(expression)
        else:
            raise self._refusal(
                f"missing column for {name}", f"`{expression}` among the log's columns", str(self.source_columns),
                "Correct the log, or the expression in the data set's YAML.",
            )
        try:
            return sql, str(self.database.sql(f"SELECT {sql} AS x FROM source LIMIT 0").types[0])
        except duckdb.Error as error:
            message = _first_line(error)
            missing = "not found in FROM clause" in message or "Referenced column" in message
            raise InvalidEvents(
                f"{self.dataset.name}: {'missing column' if missing else 'wrong expression'} for {name}",
                expected=f"`{' '.join(expression.split())}` to be SQL over the log's columns {self.source_columns}",
                got=message,
                remedy="Correct the log, or the expression in the data set's YAML.",
            ) from error

    def _require_exact(self, name: str, expression: str) -> None:
        """Refuse ids that pass through floating point, where several of them become one number."""
        if BARE_WORD.fullmatch(expression):
            return
        for part in what_is_cast(expression):
            _, kind = self._bound(name, part)
            if kind in ("FLOAT", "DOUBLE"):
                raise self._refusal(
                    f"wrong type of {name}", "integers or text all the way",
                    f"`{part}`, which is {kind}, cast in `{' '.join(expression.split())}`", ABOUT_IDS,
                )

    def _wanted(self, name: str) -> str:
        if name in TYPES:
            return TYPES[name]
        if name in self.layout.ids:
            declared, kind = self.layout.ids[name], self.types[name]
            if kind != "VARCHAR" if declared == "text" else kind not in INTEGERS:
                raise self._refusal(f"wrong type of {name}", f"{declared}, as `ids` says", kind, ABOUT_IDS)
            return "VARCHAR" if declared == "text" else "BIGINT"
        if name in IDS:
            return "VARCHAR" if self.types[name] == "VARCHAR" else "BIGINT"
        return "VARCHAR" if name in self.layout.text else "DOUBLE"

    # ---- Leaving out ----

    def apply_rules(self) -> dict[str, int]:
        """Drop rows that a rule names, then copies of rows; returns reason -> rows."""
        counts = dict(self._rows("SELECT __reason, count(*) FROM typed GROUP BY 1"))
        dropped = {reason: counts.get(reason, 0) for reason in self.layout.drop}
        self._execute("DELETE FROM typed WHERE __reason IS NOT NULL")
        rows = self._scalar("SELECT count(*) FROM typed")
        if rows == 0:
            raise self._refusal(
                "no event is left", "at least one row that no rule drops",
                f"{dropped} of {self.rows_read} rows dropped", "Correct `drop` in the data set's YAML, or the log.",
            )
        most = self.layout.max_duplicate_share
        if most is not None:
            copies = self._scalar("SELECT count(*) FROM typed WHERE __copy > 1")
            if copies > most * rows:
                raise self._refusal(
                    "duplicate rows", f"at most {most:.2%} of rows equal to another in every column",
                    f"{copies} of {rows} ({copies / rows:.2%})",
                    "Remove them, or set `max_duplicate_share` in the data set's YAML: a higher share drops them, null "
                    "keeps them.",
                )
            self._execute("DELETE FROM typed WHERE __copy > 1")
            dropped[DUPLICATE] = copies
        return dropped

    # ---- Checking ----

    def check(self) -> None:
        """Refuse what no rule forgave."""
        for name, count in self._rows("SELECT __bad, count(*) FROM typed WHERE __bad IS NOT NULL GROUP BY 1"):
            example = self._scalar(
                f"SELECT any_value(x) FROM (SELECT {self.expressions[name]} AS x FROM source) "
                f"WHERE x IS NOT NULL AND {_cast('x', self._wanted(name))} IS NULL"
            )
            raise self._refusal(
                f"wrong type of {name}",
                f"{'a finite ' * (self._wanted(name) == 'DOUBLE')}{self._wanted(name)} in every row",
                f"{self.types[name]} that does not fit in {count} rows, such as {example!r}",
                "Correct the log, or cast or drop these rows in the data set's YAML.",
            )
        for name in ("user", "item", "event_timestamp", "kind"):
            if count := self._scalar(f"SELECT count(*) FROM typed WHERE {name} IS NULL"):
                raise self._refusal(
                    f"null {name}", "a value in every row", f"{count} rows without",
                    "Correct the log, or name such rows under `drop` in the data set's YAML.",
                )
        known = ", ".join(text(kind) for kind in self.layout.kinds)
        if unknown := self._rows(f"SELECT DISTINCT kind FROM typed WHERE kind NOT IN ({known}) ORDER BY 1"):
            raise self._refusal(
                "unknown kind of event", f"one of {sorted(self.layout.kinds)}", str([kind for kind, in unknown[:5]]),
                "Add it under `kinds` in the data set's YAML, or drop such rows.",
            )
        start, end = self.layout.time_range.start, self.layout.time_range.end
        [(outside, first, last)] = self._rows(
            "SELECT count(*), min(event_timestamp)::VARCHAR, max(event_timestamp)::VARCHAR "
            "FROM typed WHERE event_timestamp < ?::TIMESTAMPTZ OR event_timestamp >= ?::TIMESTAMPTZ",
            [str(start), str(end)],
        )
        if outside:
            raise self._refusal(
                "timestamp out of range", f"times from {start} to before {end}",
                f"{outside} rows from {first} to {last}",
                "Check the unit and the zone of the times; correct `time_range` or drop such rows in the YAML.",
            )

    # ---- Canonical form ----

    def events(self) -> pa.Table:
        """The rows left, with integer ids and surfaces, in canonical order."""
        surfaces = [f"WHEN {text(kind)} THEN {text(surface)}" for kind, surface in self.layout.kinds.items()]
        computed = {"surface": f"CASE kind {' '.join(surfaces)} END"}
        if "value" not in self.expressions:
            computed["value"] = "CAST(NULL AS DOUBLE)"
        first = SCHEMA.names
        names = [*first, *(name for name in self.expressions if name not in first)]
        columns = [f"{computed.get(name, quoted(name))} AS {quoted(name)}" for name in names]
        events = self.database.sql(f"SELECT {', '.join(columns)} FROM typed").to_arrow_table()
        for name in IDS:
            if name in events.column_names:
                events = events.set_column(events.column_names.index(name), name, _id_column(events[name]))
        self.database.register("identified", events)
        order = ", ".join(quoted(name) for name in names)  # ties too, so that equal logs make equal files
        return self.database.sql(f"SELECT * FROM identified ORDER BY event_timestamp, {order}").to_arrow_table()

    def _execute(self, statement: str) -> None:
        """Run a statement over the log's own values, whose surprises are the log's fault."""
        try:
            self.database.execute(statement)
        except (duckdb.ConversionException, duckdb.InvalidInputException, duckdb.OutOfRangeException) as error:
            raise self._refusal(
                "wrong type", "expressions that fit every row of the log", _first_line(error),
                "Correct the log, or use TRY_CAST and a `drop` rule in the data set's YAML.",
            ) from error

    def _scalar(self, query: str):
        return self._rows(query)[0][0]

    def _rows(self, query: str, parameters: list | None = None) -> list[tuple]:
        return self.database.execute(query, parameters or []).fetchall()

    def _refusal(self, problem: str, expected: str, got: str, remedy: str) -> InvalidEvents:
        return InvalidEvents(f"{self.dataset.name}: {problem}", expected=expected, got=got, remedy=remedy)


def _files(path: Path) -> list[Path]:
    """The file, or the Parquet or CSV files of a folder in the order of their names."""
    files = [path] if path.is_file() else sorted(path.rglob("*.*")) if path.is_dir() else []
    parquet = [file for file in files if file.name.endswith(".parquet")]
    csv = [file for file in files if file.name.endswith(CSV_SUFFIXES)]
    if bool(parquet) == bool(csv):
        raise InvalidConfig(
            f"no log at {path}", expected=f"a .parquet or {'/'.join(CSV_SUFFIXES)} file, or a folder of one of them",
            got="both" if parquet else "another kind of file" if files else "nothing there", remedy="Correct --source.",
        )
    return parquet or csv


def _id_column(names: pa.ChunkedArray) -> pa.Array:
    """`as_ids` of a column that may hold nulls, which stay null."""
    ids = np.zeros(len(names), np.int64)
    present = np.asarray(names.is_valid())
    ids[present] = as_ids(names.drop_null())
    return pa.array(ids, pa.int64(), mask=~present)


def _cast(value: str, kind: str) -> str:
    """Null for what is no value of the type, and for numbers that are not finite."""
    cast = f"TRY_CAST({value} AS {kind})"
    return f"CASE WHEN isfinite({cast}) THEN {cast} END" if kind == "DOUBLE" else cast


def _is(kind: str, declared: str) -> bool:
    """Whether a column of Parquet is of the type that a data set declares."""
    if declared == "text":
        return False
    if declared == "integer":
        return kind in INTEGERS
    if declared == "number":
        return kind in {*INTEGERS, "FLOAT", "DOUBLE"} or kind.startswith("DECIMAL")
    return kind == "DATE" or kind.startswith("TIMESTAMP")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
