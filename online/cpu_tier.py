"""The CPU tier: rows of several versions at once, each request answered from one of them, which the answer names."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import grpc
import numpy as np

from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.reader import VersionReader
from online.refusal import Code, Refusal, refusals_to_status

__all__ = ["CpuTierAdminService", "HostedVersion", "HostedVersions", "LookupService", "packed_ids"]

logger = logging.getLogger(__name__)

MAX_TABLES = 64
MAX_ACCEPTED = 64


@dataclass
class HostedVersion:
    """A loaded version and what has happened to it."""

    reader: VersionReader
    manifest_sha256: str  # kept: the manifest hashes itself anew at each asking
    pin: ExitStack  # keeps the version from being retired
    promoted: int = 0  # sequence number of its latest promotion; 0: never
    draining: bool = False
    in_flight: int = 0
    answered: int = 0


class HostedVersions:
    """The versions this host holds, which of them answers, and how many requests are under way on each.

    ```
    load ──► answers ── promote ──► preferred
               │                        │
               └───────── drain ────────┴──► draining ── (no request in flight) ── unload ──► gone
    ```

    Loading happens outside the lock: requests are answered as before while a version's files are hashed and mapped.

    Args:
        open_version: version number -> its reader, verified; raises what makes the version unfit.
        pin: version number -> what holds it from before it is opened until it is unloaded.
        unload_wait_s: how long `unload` waits for requests under way.
    """

    def __init__(
        self, open_version: Callable[[int], VersionReader], *,
        pin: Callable[[int], AbstractContextManager] = nullcontext, unload_wait_s: float = 30.0,
    ) -> None:
        self._open, self._pin, self._unload_wait_s = open_version, pin, unload_wait_s
        self._hosted: dict[int, HostedVersion] = {}
        self._promotions = 0
        self._changed = threading.Condition()
        self._loading = threading.Lock()

    def load(self, version: int) -> None:
        """Verify and map a version; after this it answers callers that accept no preferred one. Draining is undone."""
        with self._loading:
            if version not in self._hosted:
                with ExitStack() as pin:
                    pin.enter_context(self._pin(version))
                    reader = self._open(version)
                    hosted = HostedVersion(reader, reader.manifest.sha256, pin.pop_all())
                with self._changed:
                    self._hosted[version] = hosted
                logger.info("version %d loaded (manifest %s)", version, self._hosted[version].manifest_sha256[:12])
            with self._changed:
                self._hosted[version].draining = False

    def promote(self, version: int) -> None:
        """Prefer this version wherever a caller accepts it; among several, the one promoted last."""
        with self._changed:
            hosted = self._get(version)
            if hosted.draining:
                raise self._not_loaded(version, "it is draining")
            if version != self._preferred():
                self._promotions += 1
                hosted.promoted = self._promotions

    def drain(self, version: int) -> None:
        """Answer nothing new from this version; refused for the last one that answers."""
        with self._changed:
            if version not in self._hosted or self._hosted[version].draining:
                return
            if self._answering() == [version]:
                raise Refusal(
                    Code.LAST_VERSION, f"version {version} cannot be drained",
                    expected="another version that answers on this host", got="it is the only one",
                    remedy="Load and promote another version first, or stop the process.",
                )
            self._hosted[version].draining = True

    def unload(self, version: int) -> None:
        """Forget a drained version once no request holds it; its pages go with the last reference."""
        with self._changed:
            if version not in self._hosted:
                return
            if not self._hosted[version].draining:
                raise Refusal(
                    Code.STILL_ANSWERING, f"version {version} cannot be unloaded", expected="a drained version",
                    got="one that still answers", remedy="Drain it first.",
                )
            hosted = self._hosted[version]
            if not self._changed.wait_for(lambda: not hosted.in_flight or not hosted.draining, self._unload_wait_s):
                raise Refusal(
                    Code.IN_FLIGHT, f"version {version} cannot be unloaded", expected="no request that holds it",
                    got=f"{hosted.in_flight} after {self._unload_wait_s:g} s", remedy="Try again.",
                )
            if not hosted.draining:
                raise self._not_loaded(version, "it was loaded again meanwhile")
            self._hosted.pop(version, None)
        hosted.pin.close()
        logger.info("version %d unloaded", version)

    def close(self) -> None:
        """Let go of every pin; only for a process that ends."""
        for hosted in self._hosted.values():
            hosted.pin.close()

    @contextmanager
    def answering_from(self, accepted: Iterable[int]) -> Iterator[HostedVersion]:
        """Hold the preferred of the accepted versions for one request.

        Raises:
            Refusal: VERSION_NOT_AVAILABLE, naming the versions that do answer.
        """
        with self._changed:
            answering = self._answering()
            chosen = max(set(accepted) & set(answering), key=self._preference, default=None)
            if chosen is None:
                raise Refusal(
                    Code.VERSION_NOT_AVAILABLE, "none of the accepted versions answers on this host",
                    expected=f"one of {answering}", got=f"{sorted(set(accepted))}",
                    remedy="Accept a version that answers, or load one of these here.", versions=tuple(answering),
                )
            hosted = self._hosted[chosen]
            hosted.in_flight += 1
        try:
            yield hosted
        finally:
            with self._changed:
                hosted.in_flight -= 1
                hosted.answered += 1
                if hosted.draining and not hosted.in_flight:
                    self._changed.notify_all()

    def status(self) -> admin_pb2.CpuTierStatus:
        with self._changed:
            return admin_pb2.CpuTierStatus(
                versions=[
                    admin_pb2.HostedVersion(
                        version=version, manifest_sha256=hosted.manifest_sha256, draining=hosted.draining,
                        in_flight=hosted.in_flight, answered=hosted.answered,
                    )
                    for version, hosted in sorted(self._hosted.items())
                ],
                preferred=self._preferred() or 0,
            )

    def _answering(self) -> list[int]:
        return sorted(version for version, hosted in self._hosted.items() if not hosted.draining)

    def _preferred(self) -> int | None:
        return max(self._answering(), key=self._preference, default=None)

    def _preference(self, version: int) -> tuple[int, int]:
        # Latest promotion first. Without any, the older version: a new one waits for its promotion.
        return self._hosted[version].promoted, -version

    def _get(self, version: int) -> HostedVersion:
        if version not in self._hosted:
            raise self._not_loaded(version, f"{sorted(self._hosted)} loaded")
        return self._hosted[version]

    def _not_loaded(self, version: int, got: str) -> Refusal:
        return Refusal(
            Code.VERSION_NOT_LOADED, f"version {version}", expected="a version that is loaded here and answers",
            got=got, remedy="Load it first.",
        )


def packed_ids(raw: bytes, what: str) -> np.ndarray:
    """int64 (B,) of packed little-endian bytes, without a copy; refuses a length that is no multiple of 8."""
    if len(raw) % 8:
        raise Refusal(
            Code.MALFORMED_IDS, what, expected="packed int64, a multiple of 8 bytes", got=f"{len(raw)} bytes",
            remedy="Pack ids as little-endian int64.",
        )
    return np.frombuffer(raw, "<i8")


class LookupService(lookup_pb2_grpc.LookupServicer):
    """Answers `Lookup`: packed ids in, packed rows and found mask out; no Python per id.

    Args:
        max_ids: most ids in one request, over all its tables.
    """

    def __init__(self, versions: HostedVersions, *, max_ids: int = 65_536) -> None:
        self._versions, self._max_ids = versions, max_ids

    def Lookup(self, request: lookup_pb2.LookupRequest, context: grpc.ServicerContext) -> lookup_pb2.LookupResponse:
        with refusals_to_status(context, request.request_id):
            self._check(request)
            ids = [packed_ids(table.ids, f"ids of table {table.name!r}") for table in request.tables]
            with self._versions.answering_from(request.accepted_versions) as hosted:
                return lookup_pb2.LookupResponse(
                    version=hosted.reader.version,
                    manifest_sha256=hosted.manifest_sha256,
                    tables=[
                        self._rows(hosted.reader, table.name, table_ids)
                        for table, table_ids in zip(request.tables, ids, strict=True)
                    ],
                )

    def _check(self, request: lookup_pb2.LookupRequest) -> None:
        if not request.accepted_versions:
            raise Refusal(
                Code.NO_ACCEPTED_VERSIONS, "accepted_versions", expected="at least one", got="none",
                remedy="Name the versions you can use; there is no 'latest'.",
            )
        if not request.tables:
            raise Refusal(Code.NO_TABLES, "tables", expected="at least one", got="none", remedy="Name the tables.")
        id_count = sum(len(table.ids) for table in request.tables) // 8
        tables, accepted = len(request.tables), len(request.accepted_versions)
        if id_count > self._max_ids or tables > MAX_TABLES or accepted > MAX_ACCEPTED:
            raise Refusal(
                Code.BATCH_TOO_LARGE, "request",
                expected=f"at most {self._max_ids} ids, {MAX_TABLES} tables, {MAX_ACCEPTED} accepted versions",
                got=f"{id_count} ids, {tables} tables, {accepted} versions",
                remedy="Split it into several requests and accept only the first answer's version in the others.",
            )

    @staticmethod
    def _rows(reader: VersionReader, name: str, ids: np.ndarray) -> lookup_pb2.TableRows:
        if name not in reader.tables:
            raise Refusal(
                Code.TABLE_UNKNOWN, f"table {name!r} of version {reader.version}",
                expected=f"one of {list(reader.tables)}", got=repr(name),
                remedy="Ask for a table that the version has.", versions=(reader.version,),
            )
        rows, found = reader.lookup(name, ids)
        return lookup_pb2.TableRows(name=name, row_bytes=rows.shape[1], rows=rows.tobytes(), found=found.tobytes())


class CpuTierAdminService(admin_pb2_grpc.CpuTierAdminServicer):
    """What the rollout controller asks of a CPU host."""

    def __init__(self, versions: HostedVersions) -> None:
        self._versions = versions

    def Load(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after(self._versions.load, request, context)

    def Promote(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after(self._versions.promote, request, context)

    def Drain(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after(self._versions.drain, request, context)

    def Unload(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._after(self._versions.unload, request, context)

    def Status(self, request: admin_pb2.StatusRequest, context: grpc.ServicerContext) -> admin_pb2.CpuTierStatus:
        return self._versions.status()

    def _after(
        self, change: Callable[[int], None], request: admin_pb2.VersionRequest, context: grpc.ServicerContext
    ) -> admin_pb2.CpuTierStatus:
        with refusals_to_status(context, f"{change.__name__} {request.version}"):
            change(request.version)
            return self._versions.status()
