"""What a table is: its entity, facet, width and the rule from id to row."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.names import table_name
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.strict import build

__all__ = ["MAX_DIM", "MAX_ROWS", "TableSpec"]

MAX_DIM = 65_536
MAX_ROWS = 2**40
"""Of a table; what is larger is a mistake, or meant to exhaust whoever reads it."""


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

    Raises:
        InvalidConfig: a value is out of its range, or does not fit the others.
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
        try:
            table_name(self.name)
        except ValueError as error:
            raise InvalidConfig(
                "table name", expected="'entity.facet', each of ASCII letters, digits and _", got=repr(self.name),
                remedy="Name both, with one dot between.",
            ) from error
        if not 1 <= self.dim <= MAX_DIM:
            raise InvalidConfig(
                f"dimension of {self.name}", expected=f"1 to {MAX_DIM} columns", got=str(self.dim),
                remedy="Publish rows that hold something.",
            )
        if self.rows > MAX_ROWS:
            raise InvalidConfig(
                f"rows of {self.name}", expected=f"{MAX_ROWS} at most", got=str(self.rows), remedy="Split the table."
            )
        if (self.rule.name == "hash" and self.rows != self.buckets) or self.rows < self.buckets:
            raise InvalidConfig(
                f"rows of {self.name}", expected=f"{self.buckets} buckets, and nothing else with id rule 'hash'",
                got=f"{self.rows} rows, id rule {self.id_rule!r}", remedy="Publish a row for each bucket.",
            )
        if not re.fullmatch(f"[0-9a-f]{{{2 * self.row_bytes}}}", self.default_row):
            raise InvalidConfig(
                f"default row of {self.name}", expected=f"{self.row_bytes} bytes, as lower-case hexadecimal digits",
                got=f"{len(self.default_row)} characters, {self.default_row[:80]!r} first",
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

    def is_like(self, other: "TableSpec") -> bool:
        """Whether the two differ in nothing but how many rows they have and what unknown ids get."""
        alike = (each.name for each in fields(self) if each.name not in ("rows", "default_row"))
        return all(getattr(self, name) == getattr(other, name) for name in alike)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any, *, where: str) -> "TableSpec":
        """What `to_dict` and JSON made of one; raises `InvalidConfig`, naming `where`, for anything else."""
        return build(cls, raw, where=where, manual="pipelines/contracts/spec.py")
