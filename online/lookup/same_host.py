"""Rows for a ranker on the machine where they lie: from segments mapped in its own process, without a remote call."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from online.lookup.hosted import HostedVersions, no_tables
from online.lookup.row_source import ALL, Only, VersionRows
from online.observe import metrics
from online.rpc_error import RpcError, as_rpc_error
from pipelines.contracts.errors import FacetError

__all__ = ["FetchedRows", "SameHostRows"]


@dataclass(frozen=True, slots=True)
class FetchedRows:
    """A lookup that is over."""

    answer: VersionRows | RpcError

    def result(self) -> VersionRows:
        """The rows; raises `RpcError`."""
        if isinstance(self.answer, RpcError):
            raise self.answer
        return self.answer


class SameHostRows:
    """Rows from the versions that this process itself hosts: a `RowSource` that decides and refuses as a CPU host
    does, under the same rollouts, and counts its answers as one does; rows are counted by the ranker, as all that it
    gets. The pages are those of every other process here that maps the same segments.

    ```
    over RPC    start ──► pack ──► socket ──► another thread's turn ──► unpack ──► lookup ──► … and all of it back
    same host   start ──► lookup
    ```

    `start` looks the rows up before it returns. 512 rows of mapped segments take some ten microseconds; handing them
    to another thread and waiting for it takes several times as long, and both would want the same interpreter. So there
    is nothing to overlap, and who comes back for `result` finds the rows in the processor's cache. (Rows in Redis do
    take long: for those, a CPU host is the right place.)

    >>> source = SameHostRows(hosted)                                                     # doctest: +SKIP
    >>> source.start([1, 2], {"item.kge": np.array([17, 42])}).result().version           # doctest: +SKIP
    """

    def __init__(self, hosted: HostedVersions) -> None:
        self._hosted = hosted
        self._name, self._number = os.urandom(8).hex(), count()

    def start(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, only: Only = ALL, request_id: str = "",
        timeout_s: float | None = None,
    ) -> FetchedRows:
        """Look rows up at once; a refusal waits for `result`.

        Args:
            accepted: versions the caller can use.
            ids: table -> int64 (B,).
            only: table -> versions that have it, of tables that not all accepted versions have.
            request_id: decides whether a canary answers.
            timeout_s: not needed; there is nothing to wait for.
        """
        began, code = time.perf_counter(), "OK"
        try:
            answer = self._fetch(accepted, ids, only, request_id or f"{self._name}-{next(self._number):x}")
        except FacetError as error:
            answer = as_rpc_error(error)
            code = answer.code.name
        metrics.observe_request("lookup", code, time.perf_counter() - began)
        return FetchedRows(answer)

    def lookup(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, only: Only = ALL, request_id: str = ""
    ) -> VersionRows:
        """`start` and `result` at once; raises `RpcError`."""
        return self.start(accepted, ids, only=only, request_id=request_id).result()

    def close(self) -> None:
        """Nothing: the versions belong to who hosts them."""

    def _fetch(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], only: Only, request_id: str
    ) -> VersionRows:
        if not ids:
            raise no_tables()
        rows, found = {}, {}
        with self._hosted.answering_from(accepted, request_id) as hosted:
            for name, values in ids.items():
                if name not in only or hosted.version in only[name]:
                    rows[name], found[name] = hosted.lookup(name, values)
        metrics.count_answer("cpu-tier", hosted.version)
        return VersionRows(hosted.version, hosted.manifest_sha256, rows, found)

