"""What the SQL in a data set's YAML may be: one expression over the rows of the log, and nothing else.

DuckDB's own parser says what a text is; nothing is run and no file is touched.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import duckdb

from pipelines.contracts.errors import InvalidConfig

__all__ = ["BARE_WORD", "require_expressions", "what_is_cast"]

BARE_WORD = re.compile(r"[^\W\d]\w*")
"""A column's name as it stands, never SQL."""

NODES = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "LAMBDA",
    "OPERATOR", "TYPE", "WINDOW",
}
"""Kinds of node in DuckDB's syntax trees that compute from a row. A subquery, a star and a parameter are none."""

CALLS = {"FUNCTION": {"scalar", "macro"}, "WINDOW": {"aggregate", "window"}}
"""Node -> kinds of function that give each row one value."""

LOCATION = re.compile(r'"query_location(_length)?":\d+,')


def require_expressions(expressions: dict[str, str]) -> None:
    """Refuse what is not one expression over the rows of a log, by functions whose values depend on nothing else.

    Args:
        expressions: key of the YAML, such as `log.columns.user` -> text.

    Raises:
        InvalidConfig: names the key, the text and what is wrong with it.
    """
    with duckdb.connect() as database:
        grammar = _Grammar(database)
        for where, text in expressions.items():
            if fault := None if BARE_WORD.fullmatch(text) else grammar.fault(text):
                raise InvalidConfig(
                    where, expected="one SQL expression over the log's columns", got=f"`{text}` with {fault}",
                    remedy="Write one expression without subqueries, of functions whose values depend on their "
                    "arguments alone; put a column's name that is not one word into double quotes.",
                )


def what_is_cast(expression: str) -> list[str]:
    """Each part of an expression whose type a cast changes, as SQL, the innermost last."""
    with duckdb.connect() as database:

        def ask(function: str, argument: str) -> str:
            return database.execute(f"SELECT {function}(?)", [argument]).fetchone()[0]

        statement = json.loads(ask("json_serialize_sql", f"SELECT ({expression}\n)"))
        node = statement["statements"][0]["node"]
        parts = []
        for cast in [each for each in _nodes(node["select_list"]) if each["class"] == "CAST"]:
            node["select_list"] = [cast["child"]]
            parts.append(ask("json_deserialize_sql", json.dumps(statement)).removeprefix("SELECT "))
        return parts


class _Grammar:
    def __init__(self, database: duckdb.DuckDBPyConnection) -> None:
        self.database = database

    def fault(self, text: str) -> str | None:
        """What keeps `text` from being one expression of a row, as a noun; None if nothing does."""
        try:
            alone = self._tree(f"SELECT {text}")
            nodes = list(_nodes(alone))
        except ValueError as error:
            return str(error)
        except RecursionError:
            return "too many levels"
        # In parentheses there is room for one expression, not for a second one, a name, a clause or a statement.
        try:
            enclosed = self._tree(f"SELECT ({text}\n)")
        except ValueError:
            enclosed = None
        if alone != enclosed:
            return "more than an expression"
        return next((fault for node in nodes if (fault := self._node_fault(node))), None)

    def _tree(self, statement: str) -> list[dict[str, Any]]:
        """Syntax trees of the statements in a text, without positions; raises `ValueError` with the parser's words."""
        [answer] = self.database.execute("SELECT json_serialize_sql(?)", [statement]).fetchone()
        tree = json.loads(LOCATION.sub("", answer))
        if tree["error"]:
            raise ValueError(tree["error_message"])
        return tree["statements"]

    def _node_fault(self, node: dict[str, Any]) -> str | None:
        kind = node["class"]
        if kind not in NODES:
            return f"a {kind.lower().replace('_', ' ')}"
        if kind not in CALLS:
            return None
        name = node["function_name"]
        found = [function for function in _functions().get(name, []) if function[0] in CALLS[kind]]
        for _, stability, macro in found:
            if stability not in (None, "CONSISTENT"):
                return f"{name}(), which depends on more than its arguments"
            if macro and (fault := self.fault(macro)):
                return f"{name}(), which uses {fault}"
        return None if found else f"{name}(), which is no function of a row"


@cache
def _functions() -> dict[str, list[tuple[str, str | None, str | None]]]:
    """Name -> kind, stability and, of a macro, the expression that it stands for, of each of DuckDB's functions."""
    functions: dict[str, list[tuple[str, str | None, str | None]]] = {}
    query = "SELECT function_name, function_type, stability, macro_definition FROM duckdb_functions()"
    with duckdb.connect() as database:
        for name, *function in database.execute(query).fetchall():
            functions.setdefault(name, []).append(tuple(function))
    return functions


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every node of a syntax tree that has a class."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _nodes(branch)
