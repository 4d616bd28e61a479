"""Clients of the two services. The rows client names the versions it can use and gets every table from one of them."""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import grpc
import numpy as np

from online.proto import lookup_pb2, lookup_pb2_grpc, rank_pb2, rank_pb2_grpc
from online.refusal import Code, Refusal, refusal_from
from online.row_source import VersionRows
from online.server import CHANNEL_OPTIONS
from pipelines.contracts.errors import InvalidConfig

__all__ = ["LookupClient", "PendingLookup", "RankClient", "RankedScores", "open_channel"]

logger = logging.getLogger(__name__)


def open_channel(target: str) -> grpc.Channel:
    """A channel to `host:port`; nothing is connected before the first call."""
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise InvalidConfig(
            "address of a server", expected="host:port", got=repr(target), remedy="Give both, as in 127.0.0.1:50051."
        )
    return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)


class LookupClient:
    """Rows from any of several CPU hosts that hold the same tables.

    A request goes whole to one host, so one version answers all of its tables. A host that cannot be reached is
    followed by the next, `attempts` times in all and never past the deadline; any other refusal is final.

    >>> client = LookupClient(["127.0.0.1:50051"])                                        # doctest: +SKIP
    >>> client.lookup([1, 2], {"item.kge": np.array([17, 42])}).version                   # doctest: +SKIP
    """

    def __init__(self, targets: Sequence[str], *, timeout_s: float = 2.0, attempts: int = 4) -> None:
        if not targets:
            raise InvalidConfig("CPU tier", expected="at least one host:port", got="none", remedy="Name one.")
        self._targets = list(targets)
        self._channels = [open_channel(target) for target in self._targets]
        self._stubs = [lookup_pb2_grpc.LookupStub(channel) for channel in self._channels]
        self._timeout_s, self._attempts = timeout_s, attempts
        self._turn = count()

    def start(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, request_id: str = "",
        timeout_s: float | None = None,
    ) -> "PendingLookup":
        """Send a lookup and return at once.

        Args:
            accepted: versions the caller can use.
            ids: table -> int64 (B,).
            timeout_s: for this request, attempts included; the client's own if None.
        """
        request = lookup_pb2.LookupRequest(
            request_id=request_id or uuid.uuid4().hex,
            accepted_versions=accepted,
            tables=[
                lookup_pb2.TableIds(name=name, ids=np.ascontiguousarray(values, "<i8").tobytes())
                for name, values in ids.items()
            ],
        )
        return PendingLookup(self, request, self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s))

    def lookup(self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, request_id: str = "") -> VersionRows:
        """Rows of `ids` (table -> int64 (B,)) from one of the accepted versions; raises `Refusal`."""
        return self.start(accepted, ids, request_id=request_id).result()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class PendingLookup:
    """A lookup under way.

    Attributes:
        finished_at: `time.perf_counter()` when the last attempt was answered; None before.
    """

    def __init__(self, client: LookupClient, request: lookup_pb2.LookupRequest, timeout_s: float) -> None:
        self._client, self._request = client, request
        self._deadline = time.monotonic() + timeout_s
        self.finished_at: float | None = None
        self._send()

    def _send(self) -> None:
        self._host = next(self._client._turn) % len(self._client._targets)
        remaining_s = max(self._deadline - time.monotonic(), 0.001)
        self._future = self._client._stubs[self._host].Lookup.future(self._request, timeout=remaining_s)
        self._future.add_done_callback(self._note_time)

    def _note_time(self, _: grpc.Future) -> None:
        self.finished_at = time.perf_counter()

    def result(self) -> VersionRows:
        """Wait for the rows.

        Raises:
            Refusal: what the server refused, LOOKUP_UNAVAILABLE when no host could be reached, VERSION_MISMATCH when
                an answer does not fit the question.
        """
        attempt = 1
        while True:
            try:
                return _rows_of(self._future.result(), self._request)
            except grpc.RpcError as error:
                refusal = refusal_from(error, self._client._targets[self._host])
            out_of_time = time.monotonic() >= self._deadline
            if refusal.code is not Code.LOOKUP_UNAVAILABLE or attempt >= self._client._attempts or out_of_time:
                raise refusal
            logger.warning("lookup %s: %s; trying again", self._request.request_id, refusal)
            if attempt >= len(self._client._targets):  # every host was tried: give a restart a moment
                time.sleep(min(0.05 * 2**attempt, max(self._deadline - time.monotonic(), 0)))
            attempt += 1
            self._send()


def _rows_of(response: lookup_pb2.LookupResponse, request: lookup_pb2.LookupRequest) -> VersionRows:
    wanted = [(table.name, len(table.ids) // 8) for table in request.tables]
    got = [(table.name, len(table.found)) for table in response.tables]
    widths_fit = all(len(table.rows) == table.row_bytes * len(table.found) for table in response.tables)
    if response.version not in request.accepted_versions or wanted != got or not widths_fit:
        raise Refusal(
            Code.VERSION_MISMATCH, f"answer to lookup {request.request_id}",
            expected=f"a version of {list(request.accepted_versions)} and rows for {wanted}",
            got=f"version {response.version} and rows for {got}", remedy="Check what listens at that address.",
        )
    return VersionRows(
        version=response.version,
        manifest_sha256=response.manifest_sha256,
        rows={
            table.name: np.frombuffer(table.rows, np.uint8).reshape(len(table.found), table.row_bytes)
            for table in response.tables
        },
        found={table.name: np.frombuffer(table.found, np.bool_) for table in response.tables},
    )


@dataclass(frozen=True)
class RankedScores:
    """Scores of candidates.

    Attributes:
        tasks: T names.
        scores: float32 (C, T), probabilities.
        found: table -> share of the asked ids that have a row.
        timing_ms: stage -> milliseconds.
    """

    version: int
    manifest_sha256: str
    tasks: tuple[str, ...]
    scores: np.ndarray
    found: dict[str, float]
    timing_ms: dict[str, float]


class RankClient:
    """Scores from one ranker; no retries, so that whoever measures sees every failure."""

    def __init__(self, target: str, *, timeout_s: float = 5.0) -> None:
        self._target, self._timeout_s = target, timeout_s
        self._channel = open_channel(target)
        self._stub = rank_pb2_grpc.RankStub(self._channel)

    def rank(
        self, user: int, candidates: np.ndarray, *, now_seconds: float = 0.0, request_id: str = ""
    ) -> RankedScores:
        """Score `candidates` (int64 (C,)) for a user at a moment (seconds since 1970; 0: now). Raises `Refusal`."""
        request = rank_pb2.RankRequest(
            request_id=request_id, user=user, candidates=np.ascontiguousarray(candidates, "<i8").tobytes(),
            now_seconds=now_seconds,
        )
        try:
            response = self._stub.Rank(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise refusal_from(error, self._target) from error
        return RankedScores(
            version=response.version,
            manifest_sha256=response.manifest_sha256,
            tasks=tuple(response.tasks),
            scores=np.frombuffer(response.scores, "<f4").reshape(-1, len(response.tasks)),
            found={entry.table: entry.found / entry.ids if entry.ids else 0.0 for entry in response.found},
            timing_ms={field.name: value for field, value in response.timing.ListFields()},
        )

    def close(self) -> None:
        self._channel.close()
