"""What a table is: its entity, facet, width and the rule from id to row."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.rowcodec import codec

__all__ = ["TableSpec"]

ID_RULES = ("vocabulary",)


@dataclass(frozen=True)
class TableSpec:
    """One facet of one entity, as published.

    Attributes:
        name: `entity.facet`, such as `item.kge`.
        dim: columns of the dequantized row.
        rows: how many ids have a row.
        quantization: name of the row codec (`int4`, `int8`, `fp16`).
        id_rule: how an id finds its row; `vocabulary` is exact: an id has its own row or none.
        default_row: hexadecimal bytes of the row that unknown ids score with.
    """

    name: str
    dim: int
    rows: int
    quantization: str
    id_rule: str
    default_row: str

    def __post_init__(self) -> None:
        entity, dot, facet = self.name.partition(".")
        if not (dot and entity.isidentifier() and facet.isidentifier()):
            raise InvalidConfig(
                "table name", expected="'entity.facet'", got=repr(self.name), remedy="Name both, with one dot between."
            )
        if self.id_rule not in ID_RULES:
            raise InvalidConfig(
                f"id rule of {self.name}", expected=f"one of {ID_RULES}", got=repr(self.id_rule),
                remedy="Publish with a rule that this release knows.",
            )
        if len(self.default_row_bytes) != self.row_bytes:
            raise InvalidConfig(
                f"default row of {self.name}", expected=f"{self.row_bytes} bytes", got=f"{len(self.default_row_bytes)}",
                remedy="Encode it with the table's own codec.",
            )

    @property
    def entity(self) -> str:
        return self.name.partition(".")[0]

    @property
    def facet(self) -> str:
        return self.name.partition(".")[2]

    @property
    def row_bytes(self) -> int:
        return codec(self.quantization).row_bytes(self.dim)

    @property
    def default_row_bytes(self) -> bytes:
        return bytes.fromhex(self.default_row)

    def view_name(self, version: int) -> str:
        """Name of the Feast feature view of this table in a version, such as `item_kge__v7`."""
        return f"{self.entity}_{self.facet}__v{version}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
