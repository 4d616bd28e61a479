"""The CPU tier's services: rows of several versions at once, each request answered from one, which the answer names."""

from collections.abc import Callable, Sequence

import grpc
import numpy as np

from online.admission import Admission
from online.lookup.hosted import HostedVersion, HostedVersions, no_tables
from online.lookup.shards import Shard
from online.observe import metrics
from online.observe.request_log import ServedRequest
from online.printable import printable
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.refusal import Code, Refusal, refusals_to_status

__all__ = ["ALL_IDS", "CpuTierAdminService", "LookupService", "packed_ids"]

MAX_TABLES = 64
MAX_ACCEPTED = 64
ALL_IDS = Shard(0, 1)

_Asked = tuple[str, bytes, Sequence[int]]  # table, packed ids, the versions that it is asked for of


def packed_ids(raw: bytes, what: str) -> np.ndarray:
    """int64 (B,) of packed little-endian bytes, without a copy; refuses a length that is no multiple of 8."""
    if len(raw) % 8:
        raise Refusal(
            Code.MALFORMED_IDS, f"ids of {printable(what)}", expected="packed int64, a multiple of 8 bytes",
            got=f"{len(raw)} bytes", remedy="Pack ids as little-endian int64.",
        )
    return np.frombuffer(raw, "<i8")


class LookupService(lookup_pb2_grpc.LookupServicer):
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
        shard.strays(np.zeros(1, np.int64))  # loads what is compiled now, so that no request waits for it

    def Lookup(self, request: lookup_pb2.LookupRequest, context: grpc.ServicerContext) -> lookup_pb2.LookupResponse:
        request_id = request.request_id
        with refusals_to_status(context, request_id), ServedRequest("lookup", request_id) as served:
            try:
                accepted, asked = self._question(request)
                with self._admission.admit(context.time_remaining()):
                    answer = self._answer(accepted, asked, request_id)
                served.version = answer.version
                return answer
            finally:
                metrics.set_queue("lookup", self._admission.in_flight, self._admission.waiting)

    def _question(self, request: lookup_pb2.LookupRequest) -> tuple[Sequence[int], list[_Asked]]:
        """Accepted versions, and what is asked: a message copies its bytes whenever it is asked for them."""
        accepted = request.accepted_versions
        asked = [(table.name, table.ids, table.versions) for table in request.tables]
        if not asked:
            raise no_tables()
        id_count = sum([len(raw) for _, raw, _ in asked]) // 8
        if id_count > self._max_ids or len(asked) > MAX_TABLES or len(accepted) > MAX_ACCEPTED:
            raise Refusal(
                Code.BATCH_TOO_LARGE, "request",
                expected=f"at most {self._max_ids} ids, {MAX_TABLES} tables, {MAX_ACCEPTED} accepted versions",
                got=f"{id_count} ids, {len(asked)} tables, {len(accepted)} versions",
                remedy="Split it into several requests and accept only the first answer's version in the others.",
            )
        if request.HasField("shard") or self._shard.count > 1:
            index, count = request.shard.index, request.shard.count or 1
            if index != self._shard.index or count != self._shard.count:
                raise self._wrong_shard(f"a request cut for shard {index}/{count}")
        return accepted, asked

    def _answer(
        self, accepted: Sequence[int], asked: list[_Asked], request_id: str
    ) -> lookup_pb2.LookupResponse:
        hosted = self._versions.hold(accepted, request_id)
        answered = False
        try:
            answer = lookup_pb2.LookupResponse(version=hosted.version, manifest_sha256=hosted.manifest_sha256)
            for name, raw, only in asked:
                if only and hosted.version not in only:
                    continue
                self._add_rows(answer, hosted, name, raw)
            answered = True
        finally:
            self._versions.release(hosted, answered=answered)
        metrics.count_answer("cpu-tier", hosted.version)
        return answer

    def _add_rows(self, answer: lookup_pb2.LookupResponse, hosted: HostedVersion, name: str, raw: bytes) -> None:
        ids = packed_ids(raw, name)
        if strays := self._shard.strays(ids):
            raise self._wrong_shard(f"{strays} of {len(ids)} ids of table {name} that fall into others")
        rows, found = hosted.lookup(name, ids)
        mask = found.tobytes()
        metrics.count_rows(name, len(ids), mask.count(1))
        # In place: to put a message that is made into another copies it twice.
        answer.tables.add(name=name, row_bytes=rows.shape[1], rows=rows.tobytes(), found=mask)

    def _wrong_shard(self, got: str) -> Refusal:
        return Refusal(
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
        with refusals_to_status(context, f"{name} {request.version}"):
            change()
            return self.Status(admin_pb2.StatusRequest(), context)
