"""The stock `feast` command, as tests start it that need it for something else than its start.

Its own type checks, which Feast compiles while it is imported, take most of that. As the console script it runs in the
demo.
"""

import sys

__all__ = ["FEAST"]

_PROGRAM = """
from pipelines.contracts.quick_import import import_typeguard_optimized
import_typeguard_optimized()
from feast.cli.cli import cli
cli()
"""
FEAST = (sys.executable, "-c", _PROGRAM)
"""Beginning of a command line; `PYTHONPATH` has to lead to this project where it is not installed."""
