"""Where the features lie. Paths are absolute: Feast's DuckDB store reads relative ones from the current directory."""

from pathlib import Path

from feast import FileSource
from feast.data_format import ParquetFormat

from pipelines.contracts.workspace import Workspace

__all__ = ["WORKSPACE", "item_context_source", "user_context_source", "user_item_context_source"]

WORKSPACE = Workspace(Path(__file__).resolve().parent.parent / "var")


def _context_source(view: str) -> FileSource:
    """The view's Parquet file; it may be written (`facet prepare`) after `feast apply`, but before it is read."""
    return FileSource(
        name=f"{view}_source",
        path=str(WORKSPACE.views / f"{view}.parquet"),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        description="written by `facet prepare`",
    )


user_context_source = _context_source("user_context")
item_context_source = _context_source("item_context")
user_item_context_source = _context_source("user_item_context")
