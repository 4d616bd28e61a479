"""How a Feast feature view says which table of which version it is: its tags, which are read here and nowhere else.

Anybody who may write to Feast's registry may write tags. What they name becomes part of paths, of those too that are
deleted, so an `EmbeddingView` cannot be made of anything but a version number, a table name and a hash.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.names import sha256_name, table_name, version_number
from pipelines.contracts.spec import TableSpec

__all__ = ["EmbeddingView"]


@dataclass(frozen=True)
class EmbeddingView:
    """The table, the version and the manifest that a feature view was generated from.

    Attributes:
        as_of: end of the version's data (UTC), the event timestamp of every row.

    Raises:
        ValueError: a value is not what its name says.

    >>> tags = {"version": "7", "table": "item.kge", "manifest_sha256": "ab" * 32, "as_of": "2011-07-01T00:00:00+00:00"}
    >>> EmbeddingView.from_tags(tags).table
    'item.kge'
    >>> EmbeddingView.from_tags({"owner": "ads"}) is None
    True
    """

    version: int
    table: str
    manifest_sha256: str
    as_of: datetime

    FEATURE = "row"
    """Name of the one feature such a view has: the packed row, Bytes."""

    def __post_init__(self) -> None:
        version_number(str(self.version))
        table_name(self.table)
        sha256_name(self.manifest_sha256)
        if self.as_of.utcoffset() is None:
            raise ValueError(f"expected a time with its zone, got {self.as_of}")

    @classmethod
    def of(cls, manifest: Manifest, spec: TableSpec) -> "EmbeddingView":
        return cls(manifest.version, spec.name, manifest.sha256, manifest.as_of)

    def tags(self, manifest: Manifest) -> dict[str, str]:
        """What identifies the view, and what a person listing views wants to know."""
        spec, pretrain = manifest.table(self.table), manifest.windows.pretrain
        return {
            "version": str(self.version),
            "table": self.table,
            "manifest_sha256": self.manifest_sha256,
            "as_of": self.as_of.isoformat(),
            "dataset": manifest.dataset,
            "quantization": spec.quantization,
            "dim": str(spec.dim),
            "rows": str(spec.rows),
            "data_window": f"{pretrain.start}..{self.as_of.date()}",
        }

    @staticmethod
    def claimed_by(tags: Mapping[str, str]) -> bool:
        """Whether these are the tags of an embedding view, whatever they say of it."""
        return "manifest_sha256" in tags

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "EmbeddingView | None":
        """The table that the tags name, or None for an ordinary view.

        Raises:
            IntegrityError: the tags name a manifest, but no version, no table or no time, or something else by these
                names.
        """
        if not cls.claimed_by(tags):
            return None
        try:
            return cls(
                version_number(tags["version"]), tags["table"], tags["manifest_sha256"],
                datetime.fromisoformat(tags["as_of"]),
            )
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                "tags of an embedding view", expected="version, table, manifest_sha256 and as_of",
                got=f"{dict(tags)} ({error!r})", remedy="Run `feast apply` to generate the view again.",
            ) from error
