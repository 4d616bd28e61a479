"""Ending a process that used Ibis with DuckDB without pages of reports, below which warnings are overlooked."""

import atexit
import sys

__all__ = ["release_duckdb_at_exit"]


def release_duckdb_at_exit() -> None:
    """Let go of Ibis's default backend before the interpreter ends; nothing is imported for it.

    Ibis keeps the DuckDB connection in a global, and DuckDB lists every object of its own that is left at the very end.
    """
    atexit.register(_release)


def _release() -> None:
    if "ibis" in sys.modules:
        sys.modules["ibis"].options.default_backend = None
