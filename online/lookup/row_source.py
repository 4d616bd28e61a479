"""Where a ranker gets rows: the interface of the CPU tier's client and of segments mapped in its own process."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["ALL", "Only", "PendingRows", "RowSource", "VersionRows"]

Only = Mapping[str, Collection[int]]
ALL: Only = MappingProxyType({})
"""All accepted versions have all tables."""


class VersionRows(NamedTuple):
    """Rows of all asked tables that the version has, all of that version.

    Attributes:
        rows: table -> uint8 (B, row_bytes), in the order of the ids; the default row where `found` is False.
        found: table -> bool (B,).
    """

    version: int
    manifest_sha256: str
    rows: dict[str, np.ndarray]
    found: dict[str, np.ndarray]


class PendingRows(Protocol):
    """A lookup under way."""

    def result(self) -> VersionRows:
        """Wait for the rows, by one thread, once; raises `online.rpc_error.RpcError`."""
        ...


class RowSource(Protocol):
    """Rows of ids, all of one of the accepted versions. Safe to use from several threads."""

    def start(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, only: Only = ALL, request_id: str = "",
        timeout_s: float | None = None,
    ) -> PendingRows:
        """Begin a lookup and return at once.

        Args:
            accepted: versions the caller can use.
            ids: table -> int64 (B,).
            only: table -> versions that have it, of tables that not all accepted versions have.
            request_id: names the request in every log; decides whether a canary answers it.
            timeout_s: until when an answer is of use, retries included; the source's own limit if None.
        """
        ...

    def close(self) -> None: ...
