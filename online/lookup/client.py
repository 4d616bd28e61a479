"""The client of the CPU tier: it names the versions it can use and gets all tables, of all shards, from one of them."""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from online.lookup.row_source import ALL, Only, VersionRows
from online.lookup.shards import cut, targets_by_shard
from online.printable import printable, shortened
from online.proto import lookup_pb2
from online.rpc.replicas import Replicas
from online.rpc.retry import RetryingCall, RetryPolicy, checked_timeout_s
from online.rpc.unary import UnaryMethod
from online.rpc_error import Code, RpcError

if TYPE_CHECKING:
    from online.security.credentials import ClientSecurity

__all__ = ["LookupClient", "PendingLookup"]

logger = logging.getLogger(__name__)

_RETRYABLE = frozenset({Code.LOOKUP_UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.VERSION_NOT_AVAILABLE})
_ONCE_PER_REPLICA = frozenset({Code.DEADLINE, Code.VERSION_NOT_AVAILABLE})
_METHOD = lookup_pb2.DESCRIPTOR.services_by_name["Lookup"].methods_by_name["Lookup"]
_SHA256_CHARACTERS = 64
_ID = np.dtype("<i8")

Answers = dict[tuple[int, str], dict[int, VersionRows]]
"""Rows by the version they name, number and hash of the manifest, and by the shard that answered them."""


class LookupClient:
    """Rows from the hosts of a CPU tier, of one version in every answer. Safe to use from several threads.

    Every host may hold all rows, or a part of them; of each part there may be replicas:

    ```
    ids ── cut by hash ──┬─ shard 0 ──► one of its replicas ──┐
                         └─ shard 1 ──► one of its replicas ──┴─ one version and manifest? ── rows, in order
                                               ▲                          │ no
                                               └── accepting only one ────┘
    ```

    All shards are asked under one request id, by which those of them that try a canary choose alike. Should their
    answers differ, because hosts are promoted one after the other, the shards that are outvoted are asked again.

    A host that cannot be reached, is overloaded or has none of the versions is followed by the next, `attempts` times
    in all and never past the deadline; any other refusal is final.

    >>> client = LookupClient(["127.0.0.1:50051"])                                        # doctest: +SKIP
    >>> client.lookup([1, 2], {"item.kge": np.array([17, 42])}).version                   # doctest: +SKIP

    Args:
        targets: `host:port`, each with all rows, or `index/count=host:port`; several of the same part are replicas.
        timeout_s: for a request, attempts included; at most the five minutes that servers allow.
        attempts: how often one request is sent to the replicas of a shard at most.
        connections: to every host; more than one where several workers share its port.

    Raises:
        InvalidConfig: the targets do not make one whole tier, or a number is out of its range.
    """

    def __init__(
        self, targets: Sequence[str], *, timeout_s: float = 2.0, attempts: int = 4,
        security: "ClientSecurity | None" = None, connections: int = 1,
    ) -> None:
        self._timeout_s = checked_timeout_s(timeout_s)
        self._retry_policy = RetryPolicy(attempts, _RETRYABLE, _ONCE_PER_REPLICA)
        self._shards = [
            Replicas(
                addresses, partial(UnaryMethod, method=_METHOD), security=security, connections=connections,
                retries=attempts > 1,
            )
            for addresses in targets_by_shard(targets)
        ]
        self._name, self._number = os.urandom(8).hex(), count()
        cut(np.zeros(1, np.int64), len(self._shards))  # loads what is compiled now, so that no request waits for it

    def start(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, only: Only = ALL, request_id: str = "",
        timeout_s: float | None = None,
    ) -> "PendingLookup":
        """Send a lookup and return at once.

        Args:
            accepted: versions the caller can use.
            ids: table -> int64 (B,).
            only: table -> versions that have it, of tables that not all accepted versions have.
            timeout_s: for this request, attempts included; no longer than the client's own.
        """
        pending = self._pending(accepted, ids, only, request_id, timeout_s)
        for part in pending.parts:
            part.start()
        return pending

    def lookup(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], *, only: Only = ALL, request_id: str = "",
        timeout_s: float | None = None,
    ) -> VersionRows:
        """As `start` and `result` at once.

        Args:
            accepted, ids, only, timeout_s: as for `start`.

        Raises:
            RpcError: as `PendingLookup.result`.
        """
        pending = self._pending(accepted, ids, only, request_id, timeout_s)
        for part in pending.parts[1:]:
            part.start()
        return pending.result()

    def close(self) -> None:
        for replicas in self._shards:
            replicas.close()

    def _pending(
        self, accepted: Sequence[int], ids: Mapping[str, np.ndarray], only: Only, request_id: str,
        timeout_s: float | None,
    ) -> "PendingLookup":
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s))
        request_id = request_id or f"{self._name}-{next(self._number):x}"
        return PendingLookup(self._shards, accepted, ids, only, request_id, self._retry_policy, deadline)


class PendingLookup:
    """A lookup, as one part for each shard that has some of its ids.

    Attributes:
        parts: at least one.
    """

    def __init__(
        self, shards: Sequence[Replicas], accepted: Sequence[int], ids: Mapping[str, np.ndarray], only: Only,
        request_id: str, policy: RetryPolicy, deadline: float,
    ) -> None:
        self._accepted, self._request_id = accepted, request_id
        if len(shards) == 1:
            self.parts = [_Part(None, shards[0], request_id, accepted, ids, only, policy, deadline)]
            return
        self._cuts = {name: cut(values, len(shards)) for name, values in ids.items()}
        of_shards: list[dict[str, np.ndarray]] = [{} for _ in shards]
        for name, table in self._cuts.items():
            for number, tables in enumerate(of_shards):
                part_ids = table.of(number)
                if len(part_ids):
                    tables[name] = part_ids
        # Tables without ids go along: somebody has to say whether the version has them.
        first = next((tables for tables in of_shards if tables), of_shards[0])
        first.update({name: table.ids for name, table in self._cuts.items() if not len(table.ids)})
        self.parts = []
        for number, tables in enumerate(of_shards):
            if tables or (not ids and not number):
                part = number, len(shards)
                self.parts.append(
                    _Part(part, shards[number], request_id, accepted, tables, only, policy, deadline)
                )

    def result(self) -> VersionRows:
        """Wait for the rows. By one thread, once.

        Raises:
            RpcError: what a server refused; LOOKUP_UNAVAILABLE when no host of a shard could be reached;
                VERSION_NOT_AVAILABLE when there is no version that all shards answer; VERSION_MISMATCH when an answer
                does not fit the question.
        """
        if len(self.parts) == 1:
            return self.parts[0].rows()  # in the order of the batch: cutting it leaves the order within a shard
        answers: Answers = {}
        self._gather(self.parts, answers)
        elected: set[int] = set()
        while True:
            for of_parts in answers.values():
                if len(of_parts) == len(self.parts):
                    return self._merged(of_parts)
            version = self._elect(answers, elected)
            elected.add(version)
            # of two manifests under one number, the one that more shards answered
            settled = max((of for named, of in answers.items() if named[0] == version), key=len, default={})
            outvoted = [part for part in self.parts if part.number not in settled]
            logger.info(
                "lookup %s: shards answered %s; asking for %d", printable(self._request_id),
                [(named, sha[:12]) for named, sha in answers], version,
            )
            for part in outvoted:
                part.accept_only(version)
            for part in outvoted[1:]:
                part.start()
            try:
                self._gather(outvoted, answers)
            except RpcError as refusal:
                if refusal.code is not Code.VERSION_NOT_AVAILABLE:
                    raise

    @staticmethod
    def _gather(parts: Sequence["_Part"], answers: Answers) -> None:
        """Wait for all of `parts`, or for the first refusal among them, which is raised."""
        for part in parts:
            rows = part.rows()
            answers.setdefault((rows.version, rows.manifest_sha256), {})[part.number] = rows

    def _elect(self, answers: Answers, elected: set[int]) -> int:
        """The version to settle on: the one that most shards answered, then the others; raises when none is left."""
        votes = Counter({version: 0 for version in self._accepted})
        for (version, _), of_parts in answers.items():
            votes[version] += len(of_parts)
        left = [(count_, version) for version, count_ in votes.items() if version not in elected]
        if left:
            return max(left)[1]  # of two with as many votes the newer: it is the older that is on its way out
        versions = sorted({version for version, _ in answers})
        if len(versions) < len(answers):
            raise RpcError(
                Code.VERSION_MISMATCH, f"shards differ in what they answer to lookup {printable(self._request_id)}",
                expected="one manifest for each version", got=f"{[(v, sha[:12]) for v, sha in answers]}",
                remedy="Let all hosts read the same published versions.",
            )
        raise RpcError(
            Code.VERSION_NOT_AVAILABLE, f"no version is answered by all shards of lookup {printable(self._request_id)}",
            expected=f"one of {sorted(votes)} on every shard", got=f"{versions} on some",
            remedy="Load one of the accepted versions on every shard.", versions=tuple(versions),
        )

    def _merged(self, of_parts: dict[int, VersionRows]) -> VersionRows:
        """One answer of the parts', which name the same version."""
        some = next(iter(of_parts.values()))
        rows, found = {}, {}
        for name, table in self._cuts.items():
            pieces = {number: part for number, part in of_parts.items() if name in part.rows}
            if not pieces:  # not a table of this version
                continue
            widths = {part.rows[name].shape[1] for part in pieces.values()}
            if len(widths) > 1:
                raise RpcError(
                    Code.VERSION_MISMATCH, f"shards differ in their rows of {name}", expected="rows of one width",
                    got=f"{sorted(widths)} bytes", remedy="Check what listens at those addresses.",
                )
            rows[name] = np.empty((len(table.ids), widths.pop()), np.uint8)
            found[name] = np.empty(len(table.ids), np.bool_)
            for number, part in pieces.items():
                table.put_back(number, part.rows[name], rows[name])
                table.put_back(number, part.found[name], found[name])
        return VersionRows(some.version, some.manifest_sha256, rows, found)


class _Part(RetryingCall):
    """What one shard is asked, and the rows it answers.

    Args:
        shard: index and count; None: the only one.
    """

    __slots__ = ("_accepted", "_ids", "_only", "_shard")

    def __init__(
        self, shard: tuple[int, int] | None, replicas: Replicas, request_id: str, accepted: Sequence[int],
        ids: Mapping[str, np.ndarray], only: Only, policy: RetryPolicy, deadline: float,
    ) -> None:
        self._shard, self._accepted, self._ids, self._only = shard, accepted, ids, only
        super().__init__(replicas, self._request(request_id), request_id, policy, deadline)

    @property
    def number(self) -> int:
        """Of the shard."""
        return self._shard[0] if self._shard else 0

    def _request(self, request_id: str) -> lookup_pb2.LookupRequest:
        request = lookup_pb2.LookupRequest(
            request_id=request_id, accepted_versions=self._accepted,
            shard=self._shard and lookup_pb2.Shard(index=self._shard[0], count=self._shard[1]),
        )
        for name, ids in self._ids.items():
            request.tables.add(name=name, ids=np.asarray(ids, _ID).tobytes(), versions=self._only.get(name))
        return request

    def accept_only(self, version: int) -> None:
        """Be ready to ask anew, for this version."""
        self._accepted = (version,)
        self.request = self._request(self.request_id)
        self.reset()

    def rows(self) -> VersionRows:
        """Wait for what was started, or ask now. Raises `RpcError`."""
        answer = self.result()
        version, manifest, tables, asked = answer.version, answer.manifest_sha256, answer.tables, self._ids
        if self._only:
            asked = {name: ids for name, ids in asked.items() if version in self._only.get(name, (version,))}
        fits = version in self._accepted and len(manifest) <= _SHA256_CHARACTERS and len(tables) == len(asked)
        rows, found = {}, {}
        for (name, ids), table in zip(asked.items(), tables, strict=False):
            size, row_bytes, packed, mask = len(ids), table.row_bytes, table.rows, table.found
            fits = (
                fits and table.name == name and len(mask) == size and row_bytes > 0
                and len(packed) == size * row_bytes and not mask.translate(None, b"\0\1")
            )
            if not fits:
                break
            rows[name] = np.frombuffer(packed, np.uint8).reshape(size, row_bytes)
            found[name] = np.frombuffer(mask, np.bool_)
        if not fits:
            raise self._misfit(answer, {name: len(ids) for name, ids in asked.items()})
        return VersionRows(version, manifest, rows, found)

    def _misfit(self, answer: lookup_pb2.LookupResponse, asked: dict[str, int]) -> RpcError:
        got = [
            (printable(table.name), len(table.found), table.row_bytes, len(table.rows))
            for table in answer.tables[: len(asked) + 1]
        ]
        return RpcError(
            Code.VERSION_MISMATCH, f"answer of {self.target} to lookup {printable(self.request_id)}",
            expected=f"a version of {list(self._accepted)}, and rows of all tables in order: {shortened(str(asked))}",
            got=f"version {answer.version} of manifest {printable(answer.manifest_sha256)}, {len(answer.tables)} tables"
            f": (name, found, bytes of a row, of all) {shortened(str(got))}",
            remedy="Check what listens at that address.",
        )
