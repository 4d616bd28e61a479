"""CSV logs: the files of one log as one relation whose columns have the types that the data set says, and no others.

Nothing is guessed. Every column is read as text, and files are put together by the names in their headers. A text that
is no value of the declared type becomes null, which `pipelines.log` refuses.
"""

import csv
import gzip
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import duckdb

from pipelines.contracts.errors import InvalidConfig, InvalidEvents

__all__ = ["CSV_SUFFIXES", "TextFormat", "TypedColumn", "csv_error", "quoted", "read_csv_files", "text", "typed_column"]

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
ENCODINGS = {"utf-8": "utf-8-sig", "latin-1": "latin-1", "utf-16": "utf-16"}
"""What DuckDB reads -> what Python calls it, a mark at the beginning of the file included."""
MANUAL = "`pipelines/datasets/online_retail.yaml` explains every key."
WHOLE, NUMBER = "[+-]?[0-9]+", r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
MOMENT = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?"


@dataclass(frozen=True)
class TextFormat:
    """How the text of a CSV log is laid out.

    Attributes:
        delimiter: what stands between columns; None: a tab in `.tsv` files, a comma in others.
        quote: what may stand around a value; twice inside it, it is itself. Empty: nothing does.
        names: columns of files without a header line, in order; empty: the first line of every file names them.
        nulls: texts that stand for no value.
        decimal: what stands before the fraction of a number.
        encoding: of the files.
    """

    delimiter: str | None = None
    quote: str = '"'
    names: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ("",)
    decimal: str = "."
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in "\r\n"):
            raise _refused("log.csv.delimiter", "one character", self.delimiter)
        if len(self.quote) > 1 or self.quote == (self.delimiter or ",") or self.quote in ("\r", "\n"):
            raise _refused("log.csv.quote", "one character that is not the delimiter, or nothing", self.quote)
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise _refused("log.csv.names", "each name once", repeated)
        if self.decimal not in (".", ","):
            raise _refused("log.csv.decimal", "a point or a comma", self.decimal)
        if self.encoding not in ENCODINGS:
            raise _refused("log.csv.encoding", f"one of {list(ENCODINGS)}", self.encoding)


@dataclass(frozen=True)
class TypedColumn:
    """A column of text as a value.

    Attributes:
        sql: the value, null where the text is none.
        kind: what a text should be, for an error.
    """

    sql: str
    kind: str


def typed_column(column: str, declared: str, *, decimal: str = ".") -> TypedColumn:
    """Read the text of `column`, a quoted name, as the type that a data set declares for it.

    Args:
        declared: `text`, `integer`, `number`, `time` (ISO 8601: day, moment, with or without a zone), or how a time is
            written, such as `%d/%m/%Y %H:%M` (`strptime`).
        decimal: what stands before the fraction of a number.

    Raises:
        InvalidConfig: another type.
    """
    if "%" in declared:
        try:
            duckdb.sql("SELECT try_strptime('', ?)", params=[declared]).fetchall()
        except duckdb.Error as error:
            raise _refused("how a time is written", "directives of strptime", f"{declared}: {error}") from error
        return TypedColumn(f"try_strptime({column}, {text(declared)})", f"a time as `{declared}`")
    if declared == "text":
        return TypedColumn(column, "text")
    if declared == "integer":
        return TypedColumn(_where(column, WHOLE, f"TRY_CAST({column} AS BIGINT)"), "a whole number of 64 bits")
    if declared == "number":
        plain = column if decimal == "." else f"replace(replace({column}, '.', ';'), ',', '.')"
        value = f"TRY_CAST({plain} AS DOUBLE)"
        return TypedColumn(
            _where(plain, NUMBER, f"CASE WHEN isfinite({value}) THEN {value} END"),
            f"a number, its fraction after `{decimal}`",
        )
    if declared == "time":
        moment = f"TRY_CAST({column} AS TIMESTAMPTZ)"
        return TypedColumn(_where(column, MOMENT, moment), "a time such as 2021-01-31 12:00:00")
    raise _refused(
        "type of a column", "text, integer, number, time, or how a time is written, such as %d/%m/%Y", declared
    )


def read_csv_files(files: Sequence[Path], layout: TextFormat) -> str:
    """A query for all rows of the files, whose columns are text.

    Files that name the same columns in another order are read by name.

    Raises:
        InvalidEvents: files that do not name the same columns, or a header that is none.
    """
    delimiter = layout.delimiter or ("\t" if files[0].name.removesuffix(".gz").endswith(".tsv") else ",")
    headers = {file: tuple(layout.names) or _header(file, layout, delimiter) for file in files}
    first = headers[files[0]]
    for file, header in headers.items():
        if set(header) != set(first):
            raise InvalidEvents(
                f"{file}: its header", expected=f"the columns of {files[0].name}, {list(first)}, in any order",
                got=f"{list(header)}",
                remedy="Correct the file; a log without header lines needs `csv: {names: […]}` in the data set's YAML.",
            )
    selected = ", ".join(quoted(name) for name in first)
    parts = []
    for header, group in itertools.groupby(sorted(files, key=lambda file: (headers[file], file)), headers.__getitem__):
        options = {
            "auto_detect": "false", "header": "false" if layout.names else "true", "delim": text(delimiter),
            "quote": text(layout.quote), "escape": text(layout.quote), "encoding": text(layout.encoding),
            "nullstr": _texts(layout.nulls), "strict_mode": "true",
            "columns": "{" + ", ".join(f"{text(name)}: 'VARCHAR'" for name in header) + "}",
        }
        paths = _texts(escape(str(file)) for file in group)  # DuckDB takes every path for a pattern
        options_text = ", ".join(f"{name} = {value}" for name, value in options.items())
        parts.append(f"SELECT {selected} FROM read_csv({paths}, {options_text})")
    return " UNION ALL ".join(parts)


def csv_error(error: Exception) -> str:
    """What DuckDB says is wrong with a CSV file: line, reason and file, without its advice on options."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = list(itertools.takewhile(lambda line: not line.startswith("Possible"), lines))
    return "; ".join([*said, *(line for line in lines if line.startswith("file = "))][:6])


def _header(file: Path, layout: TextFormat, delimiter: str) -> tuple[str, ...]:
    quoting = {"quotechar": layout.quote} if layout.quote else {"quoting": csv.QUOTE_NONE}
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        how = {"encoding": ENCODINGS[layout.encoding], "errors": "surrogateescape", "newline": ""}
        with opened(file, "rt", **how) as lines:
            header = tuple(next(csv.reader(lines, delimiter=delimiter, strict=True, **quoting), ()))
        "".join(header).encode()  # what else is read of the file by then is DuckDB's to judge
    except (OSError, EOFError, UnicodeError, csv.Error) as error:
        raise InvalidEvents(
            f"{file} cannot be read", expected=f"CSV in {layout.encoding}", got=str(error),
            remedy="Correct the file, or `csv` in the data set's YAML.",
        ) from error
    if not header or len(set(header)) < len(header):
        raise InvalidEvents(
            f"{file}: its header", expected="each column's name once", got=f"{list(header)}",
            remedy="Correct the file; a log without header lines needs `csv: {names: […]}` in the data set's YAML.",
        )
    return header


def _where(column: str, pattern: str, value: str) -> str:
    return f"CASE WHEN regexp_full_match({column}, {text(pattern)}) THEN {value} END"


def _texts(values: Iterable[str]) -> str:
    return "[" + ", ".join(text(value) for value in values) + "]"


def text(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """A column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def _refused(problem: str, expected: str, got: object) -> InvalidConfig:
    return InvalidConfig(problem, expected=expected, got=got if isinstance(got, str) else repr(got), remedy=MANUAL)
