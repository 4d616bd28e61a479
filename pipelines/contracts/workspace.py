"""Where everything lies. One folder; every stage reads and writes only through these names."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.contracts.errors import InvalidConfig, NotPrepared
from pipelines.contracts.names import table_name
from pipelines.contracts.version import VersionStore

__all__ = ["Run", "Workspace"]

WILDCARDS = "*?[]{}\\"
"""Characters that DuckDB, Feast or Spark take for a pattern in a path, and would read other files for."""


@dataclass(frozen=True)
class Run:
    """The files of one run: one set of windows, from examples to trained models.

    ```
    runs/<name>/
      run.json           dataset, windows, tasks            (pipelines.contracts.runspec)
      pairs.parquet      user, item, event_timestamp        pretraining window
      graph/             nodes.parquet, edges.parquet, relations.json
      examples.parquet   fold, user, item, event_timestamp, one column per task (null: no label)
      context.npz        the examples joined with the context views
      facets/<facet>-s<seed>/          user.safetensors, item.safetensors, metrics.json
      rankers/<arm>-s<seed>/           tables/<table>.safetensors, upper/, metrics.json
    ```

    Beside each but `run.json` lies its lineage (pipelines.contracts.lineage).
    """

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def spec(self) -> Path:
        return self.directory / "run.json"

    @property
    def pairs(self) -> Path:
        return self.directory / "pairs.parquet"

    @property
    def graph(self) -> Path:
        return self.directory / "graph"

    @property
    def examples(self) -> Path:
        return self.directory / "examples.parquet"

    @property
    def context(self) -> Path:
        return self.directory / "context.npz"

    def facet(self, facet: str, seed: int) -> Path:
        return self.directory / "facets" / f"{facet}-s{seed}"

    def ranker(self, arm: str, seed: int) -> Path:
        return self.directory / "rankers" / f"{arm}-s{seed}"


@dataclass(frozen=True)
class Workspace:
    """Root of all written state. By default `var/` beside `feature_repo/`.

    Raises:
        InvalidConfig: its path would be read as a pattern.
    """

    root: Path

    def __post_init__(self) -> None:
        for path in (self.root.absolute(), self.root.resolve()):
            if found := [character for character in WILDCARDS if character in str(path)]:
                raise InvalidConfig(
                    f"the workspace {path}", expected=f"a path without {' '.join(WILDCARDS)}", got=" ".join(found),
                    remedy="Rename the folder: DuckDB, Feast and Spark would read other folders' files.",
                )

    @property
    def events(self) -> Path:
        """Canonical events, sorted by time (pipelines.events.SCHEMA)."""
        return self.root / "events.parquet"

    @property
    def views(self) -> Path:
        """Folder of `user_context.parquet`, `item_context.parquet`, `user_item_context.parquet`."""
        return self.root / "views"

    def view(self, name: str) -> Path:
        return self.views / f"{name}.parquet"

    def run(self, name: str) -> Run:
        return Run(self.root / "runs" / name)

    @property
    def versions(self) -> VersionStore:
        return VersionStore(self.root / "versions")

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    def segments_of(self, version: int) -> Path:
        return self.segments / f"{version:d}"

    def segment(self, version: int, table: str) -> Path:
        """Where a table's segment lies; raises ValueError for what is no table name, which would lead elsewhere."""
        return self.segments_of(version) / table_name(table)

    @property
    def feature_repo(self) -> Path:
        """The Feast repository that belongs to this workspace: its sibling."""
        return self.root.resolve().parent / "feature_repo"

    def require(self, path: Path, stage: str) -> Path:
        """`path` if it exists; otherwise `NotPrepared`, naming the stage that writes it."""
        if not path.exists():
            raise NotPrepared(
                f"{path} is not there", expected=f"what `facet {stage}` writes", got="nothing",
                remedy=f"Run `facet {stage}` first.",
            )
        return path
