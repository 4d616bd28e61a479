"""What a table is: its entity, facet, width and the rule from id to row."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.rowcodec import codec

__all__ = ["TableSpec"]


@dataclass(frozen=True)
class TableSpec:
    """One facet of one entity, as published.

    Attributes:
        name: `entity.facet`, such as `item.kge`.
        dim: columns of the dequantized row.
        rows: how many rows it has, those of its hash buckets included.
        quantization: name of the row codec (`int4`, `int8`, `fp16`).
        id_rule: how an id finds its row: a name of `pipelines.contracts.idrule`.
        default_row: hexadecimal bytes of the row that unknown ids score with.
        buckets: rows that ids share by their hash.
        hash_seed: seed of that hash.
    """

    name: str
    dim: int
    rows: int
    quantization: str
    id_rule: str
    default_row: str
    buckets: int = 0
    hash_seed: int = 0

    def __post_init__(self) -> None:
        entity, dot, facet = self.name.partition(".")
        if not (dot and entity.isidentifier() and facet.isidentifier()):
            raise InvalidConfig(
                "table name", expected="'entity.facet'", got=repr(self.name), remedy="Name both, with one dot between."
            )
        if self.dim < 1:
            raise InvalidConfig(
                f"dimension of {self.name}", expected="1 or more columns", got=str(self.dim),
                remedy="Publish rows that hold something.",
            )
        if (self.rule.name == "hash" and self.rows != self.buckets) or self.rows < self.buckets:
            raise InvalidConfig(
                f"rows of {self.name}", expected=f"{self.buckets} buckets, and nothing else with id rule 'hash'",
                got=f"{self.rows} rows, id rule {self.id_rule!r}", remedy="Publish a row for each bucket.",
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
    def rule(self) -> IdRule:
        return IdRule(self.id_rule, self.buckets, self.hash_seed)

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
