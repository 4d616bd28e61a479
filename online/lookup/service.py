"""The CPU tier's services: rows of several versions at once, each request answered from one, which the answer names."""

import time
from collections.abc import Callable

import grpc
import numpy as np

from online.lookup.hosted import HostedVersion, HostedVersions, no_tables
from online.lookup.shards import Shard
from online.lookup.wire import LOOKUP, Request, answer_bytes, read_request
from online.observe import metrics
from online.observe.request_log import ServedRequest
from online.printable import printable
from online.proto import admin_pb2, admin_pb2_grpc
from online.rpc.admission import Admission
from online.rpc.gate import GuardedServer
from online.rpc_error import Code, RpcError, errors_to_status, refuse

__all__ = ["ALL_IDS", "QUICK_BYTES", "CpuTierAdminService", "LookupService", "packed_ids"]

QUICK_BYTES = 16 << 10
"""Of a request: about 2,000 ids, which are found in a tenth of a millisecond."""
MAX_TABLES = 64
MAX_ACCEPTED = 64
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


class LookupService:
    """Answers `Lookup`: packed ids in, packed rows and found mask out; no Python per id.

    Args:
        max_ids: most ids in one request, over all its tables.
        shard: the part of the ids this host answers; what was not cut for exactly this part is refused.
        admission: how many requests are answered at a time; by default all that the server has threads for.
    """

    def __init__(
        self, versions: HostedVersions, *, max_ids: int = 65_536, shard: Shard = ALL_IDS,
        admission: Admission | None = None,
    ) -> None:
        self._versions, self._max_ids, self._shard = versions, max_ids, shard
        self._admission = admission or Admission(slots=1024)
        metrics.watch_queue("lookup", self._admission)
        shard.strays(np.zeros(1, np.int64))  # loads what is compiled now, so that no request waits for it

    def add_to(self, server: GuardedServer) -> None:
        """Register the service as the generated code does, but for what reads requests and writes answers."""
        method = grpc.unary_unary_rpc_method_handler(self.Lookup, read_request)
        server.add_registered_method_handlers(LOOKUP, {"Lookup": method})
        server.answer_at_once(self._is_quick)
        server.refuse_late(self._admission.late)

    def _is_quick(self, message: bytes) -> bool:
        """Whether the answer waits neither for rows, nor for its turn, nor for long."""
        return len(message) <= QUICK_BYTES and self._versions.at_hand and not self._admission.in_flight

    def Lookup(self, request: Request, context: grpc.ServicerContext) -> bytes:
        """The bytes of a `LookupResponse`."""
        request_id = request.request_id
        try:
            with ServedRequest("lookup", request_id) as served:
                self._check(request)
                self._admission.enter(context.time_remaining)
                began = time.perf_counter()
                try:
                    hosted = self._versions.hold(request.accepted_versions, request_id)
                    served.version = hosted.version
                    return self._answer(hosted, request)
                finally:
                    self._admission.leave(time.perf_counter() - began)
        except Exception as error:
            refuse(context, error, request_id)

    def _check(self, request: Request) -> None:
        """Raise the refusal of what is answered by no version here."""
        tables, accepted = len(request.tables), len(request.accepted_versions)
        if not tables:
            raise no_tables()
        ids = sum([len(raw) for _, raw, _ in request.tables]) // 8
        if ids > self._max_ids or tables > MAX_TABLES or accepted > MAX_ACCEPTED:
            raise RpcError(
                Code.BATCH_TOO_LARGE, "request",
                expected=f"at most {self._max_ids} ids, {MAX_TABLES} tables, {MAX_ACCEPTED} accepted versions",
                got=f"{ids} ids, {tables} tables, {accepted} versions",
                remedy="Split it into several requests and accept only the first answer's version in the others.",
            )
        if request.shard or self._shard.count > 1:
            index, count = request.shard or (0, 1)
            if index != self._shard.index or (count or 1) != self._shard.count:
                raise self._wrong_shard(f"a request cut for shard {index}/{count or 1}")

    def _answer(self, hosted: HostedVersion, request: Request) -> bytes:
        """Rows of a version that is held for this request, and is not any more afterwards."""
        answer = None
        try:
            tables = []
            for name, raw, only in request.tables:
                if only and hosted.version not in only:
                    continue
                ids = packed_ids(raw, name)
                if strays := self._shard.strays(ids):
                    raise self._wrong_shard(f"{strays} of {len(ids)} ids of table {name} that fall into others")
                rows, found = hosted.lookup(name, ids)
                tables.append((name, rows, found))
                metrics.count_found(name, found)
            answer = answer_bytes(hosted.version, hosted.manifest_sha256, tables)
        finally:
            self._versions.release(hosted, answered=answer is not None)
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

    def Load(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after("load", lambda: self._versions.load(request.version), request, context)

    def Promote(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        share = request.share or 1.0
        return self._after("promote", lambda: self._versions.promote(request.version, share), request, context)

    def Drain(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after("drain", lambda: self._versions.drain(request.version), request, context)

    def Unload(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after("unload", lambda: self._versions.unload(request.version), request, context)

    def Status(self, request: admin_pb2.StatusRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        status = self._versions.status()
        status.shard, status.shards, status.workers = self._shard.index, self._shard.count, 1
        return status

    def _after(
        self, name: str, change: Callable[[], None], request: admin_pb2.VersionRequest, context: grpc.ServicerContext
    ) -> admin_pb2.CpuTierStatus:
        with errors_to_status(context, f"{name} {request.version}"):
            change()
            return self.Status(admin_pb2.StatusRequest(), context)
