"""The CPU tier's services: rows of several versions at once, each request answered from one, which the answer names."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from online.lookup.hosted import HostedVersion, HostedVersions, no_tables
from online.lookup.shards import Shard
from online.observe import metrics
from online.observe.request_log import ServedRequest
from online.printable import printable
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.rpc.guard import Call
from online.rpc.server import GuardedServer
from online.rpc_error import Code, RpcError

__all__ = ["ALL_IDS", "QUICK_BYTES", "CpuTierAdminService", "LookupService", "packed_ids"]

QUICK_BYTES = 16 << 10
"""Of a request: about 2,000 ids, which are found in a tenth of a millisecond."""
MAX_TABLES = 64
MAX_VERSIONS = 64
ALL_IDS = Shard(0, 1)
ID = np.dtype("<i8")


def packed_ids(raw: bytes, what: str) -> np.ndarray:
    """int64 (B,) of packed little-endian bytes, without a copy; refuses a length that is no multiple of 8."""
    if len(raw) % 8:
        raise RpcError(
            Code.MALFORMED_IDS, f"ids of {printable(what)}", expected="packed int64, a multiple of 8 bytes",
            got=f"{len(raw)} bytes", remedy="Pack ids as little-endian int64.",
        )
    return np.frombuffer(raw, ID)


class _Asked(NamedTuple):
    name: str
    ids: np.ndarray  # int64 (B,)
    versions: Collection[int]  # that have this table; empty: all


class LookupService(lookup_pb2_grpc.LookupServicer):
    """Answers `Lookup`: packed ids in, packed rows and found mask out; no Python per id.

    Args:
        max_ids: most ids in one request, over all its tables.
        shard: the part of the ids this host answers; what was not cut for exactly this part is refused.
    """

    def __init__(self, versions: HostedVersions, *, max_ids: int = 65_536, shard: Shard = ALL_IDS) -> None:
        self._versions, self._max_ids, self._shard = versions, max_ids, shard
        shard.strays(np.zeros(1, np.int64))  # loads what is compiled now, so that no request waits for it

    def add_to(self, server: GuardedServer) -> None:
        lookup_pb2_grpc.add_LookupServicer_to_server(self, server)
        server.guard.is_quick = self._is_quick

    def _is_quick(self, message: bytes) -> bool:
        """Whether the answer waits neither for rows nor for long."""
        return len(message) <= QUICK_BYTES and self._versions.at_hand

    def Lookup(self, request: lookup_pb2.LookupRequest, call: Call) -> lookup_pb2.LookupResponse:
        with ServedRequest("lookup", request.request_id) as served:
            asked = self._asked(request)
            hosted = self._versions.hold(request.accepted_versions, request.request_id)
            served.version = hosted.version
            return self._answer(hosted, asked)

    def _asked(self, request: lookup_pb2.LookupRequest) -> list[_Asked]:
        """What the request asks for. Raises `RpcError` where no version could answer it here."""
        # Read once: protobuf copies bytes and wraps messages at each access.
        asked = [_Asked(table.name, packed_ids(table.ids, table.name), table.versions) for table in request.tables]
        if not asked:
            raise no_tables()
        ids, accepted = sum([len(table.ids) for table in asked]), len(request.accepted_versions)
        named = max([len(table.versions) for table in asked])
        if ids > self._max_ids or len(asked) > MAX_TABLES or max(accepted, named) > MAX_VERSIONS:
            raise RpcError(
                Code.BATCH_TOO_LARGE, "request",
                expected=f"at most {self._max_ids} ids, {MAX_TABLES} tables, {MAX_VERSIONS} versions accepted or of a "
                "table",
                got=f"{ids} ids, {len(asked)} tables, {accepted} and {named} versions",
                remedy="Split it into several requests and accept only the first answer's version in the others.",
            )
        if request.HasField("shard") or self._shard.count > 1:
            index, count = request.shard.index, request.shard.count or 1
            if index != self._shard.index or count != self._shard.count:
                raise self._wrong_shard(f"a request cut for shard {index}/{count}")
        for table in asked:
            if strays := self._shard.strays(table.ids):
                raise self._wrong_shard(
                    f"{strays} of {len(table.ids)} ids of {printable(table.name)} that fall into others"
                )
        return asked

    def _answer(self, hosted: HostedVersion, asked: list[_Asked]) -> lookup_pb2.LookupResponse:
        """Rows of a version that is held for this request, and is not any more afterwards."""
        answered = False
        try:
            answer = lookup_pb2.LookupResponse(version=hosted.version, manifest_sha256=hosted.manifest_sha256)
            for name, ids, versions in asked:
                if versions and hosted.version not in versions:
                    continue
                rows, found = hosted.lookup(name, ids)
                answer.tables.add(name=name, row_bytes=rows.shape[1], rows=rows.tobytes(), found=found.tobytes())
                metrics.count_found(name, found)
            answered = True
        finally:
            self._versions.release(hosted, answered=answered)
        metrics.count_answer("cpu-tier", hosted.version)
        return answer

    def _wrong_shard(self, got: str) -> RpcError:
        return RpcError(
            Code.WRONG_SHARD, "this host does not answer these ids",
            expected=f"ids of shard {self._shard}, and the request says so", got=got,
            remedy="Name every host with its own shard, as in 0/2=host:port, 0/1 being all ids.",
        )


class CpuTierAdminService(admin_pb2_grpc.CpuTierAdminServicer):
    """What the rollout controller asks of a CPU host.

    Args:
        shard: the part of the ids that the host answers.
    """

    def __init__(self, versions: HostedVersions, *, shard: Shard = ALL_IDS) -> None:
        self._versions, self._shard = versions, shard

    def Load(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._after(lambda: self._versions.load(request.version))

    def Promote(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        share = request.share or 1.0
        return self._after(lambda: self._versions.promote(request.version, share))

    def Drain(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._after(lambda: self._versions.drain(request.version))

    def Unload(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._after(lambda: self._versions.unload(request.version))

    def Status(self, request: admin_pb2.StatusRequest, call: Call) -> admin_pb2.CpuTierStatus:
        return self._status()

    def _status(self) -> admin_pb2.CpuTierStatus:
        status = self._versions.status()
        status.shard, status.shards, status.workers = self._shard.index, self._shard.count, 1
        return status

    def _after(self, change: Callable[[], None]) -> admin_pb2.CpuTierStatus:
        change()
        return self._status()
