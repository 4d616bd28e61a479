"""The versions that a CPU host holds, and which of them answers a request."""

import logging
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from online.host_state import HostState
from online.lookup.reader import VersionReader
from online.observe import metrics
from online.printable import printable
from online.proto import admin_pb2
from online.rpc_error import Code, RpcError, as_rpc_error
from pipelines.contracts.errors import FacetError
from pipelines.contracts.row_store import RowReader

__all__ = ["HostedVersion", "HostedVersions", "no_tables"]

logger = logging.getLogger(__name__)

ANY_ID = np.zeros(1, np.int64)

WaitFor = Callable[[threading.Condition, Callable[[], bool], float], bool]


@dataclass(slots=True, eq=False)
class HostedVersion:
    """A loaded version and what has happened to it."""

    version: int
    reader: VersionReader
    manifest_sha256: str  # kept: the manifest hashes itself anew at each asking
    pin: ExitStack  # keeps the version from being retired
    draining: bool = False
    in_flight: int = 0
    answered: int = 0

    def lookup(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one of its tables.

        Args:
            ids: int64 (B,).

        Returns:
            uint8 (B, row_bytes) and bool (B,): the rows, and whether each is the id's own.

        Raises:
            RpcError: TABLE_UNKNOWN, or why the rows cannot be read; it names this version, whose doing it is.
        """
        table: RowReader | None = self.reader.tables.get(name)
        if table is None:
            raise RpcError(
                Code.TABLE_UNKNOWN, f"table {printable(name)} of version {self.version}",
                expected=f"one of {list(self.reader.tables)}", got=printable(name),
                remedy="Ask for a table that the version has.", versions=(self.version,),
            )
        try:
            return table.lookup(ids)
        except FacetError as error:
            refusal = as_rpc_error(error)
            refusal.versions = (self.version,)
            raise refusal from error


def no_tables() -> RpcError:
    """What is said to who asks for rows of no table."""
    return RpcError(Code.NO_TABLES, "tables", expected="at least one", got="none", remedy="Name the tables.")


class HostedVersions:
    """The versions this host holds, which of them answers, and how many requests are under way on each.

    ```
    load ──► answers ── promote, share < 1 ──► canary        of a share of the requests
               │    └── promote ─────────────► preferred     of all others that accept it
               │                                   │
               └───────────── drain ───────────────┴──► draining ── (no request in flight) ── unload ──► gone
    ```

    Loading happens outside the lock: requests are answered as before while a version's files are hashed and mapped.
    A load never changes which version is preferred, unless it is the first.

    Attributes:
        at_hand: whether the rows of all versions that answer lie in this machine's memory.

    Args:
        open_version: version number -> its reader, verified; raises what makes the version unfit.
        pin: version number -> what holds it from before it is opened until it is unloaded.
        remember: is given what the host holds after every change, before the change returns.
        unload_wait_s: how long `unload` waits for requests under way.
        wait_for: waits until something holds of what a condition guards, or for so many seconds: does it hold?
    """

    def __init__(
        self, open_version: Callable[[int], VersionReader], *,
        pin: Callable[[int], AbstractContextManager] = nullcontext, remember: Callable[[HostState], None] | None = None,
        unload_wait_s: float = 30.0, wait_for: WaitFor = threading.Condition.wait_for,
    ) -> None:
        self._open, self._pin, self._unload_wait_s, self._wait_for = open_version, pin, unload_wait_s, wait_for
        self._hosted: dict[int, HostedVersion] = {}
        self.at_hand = False
        self._preferred = 0
        self._canary, self._canary_share = 0, 0.0
        self._in_turn: tuple[HostedVersion, ...] = ()  # those that answer, in the order in which they are tried
        self._canary_in_turn: tuple[HostedVersion, ...] = ()  # the same for requests that are the canary's
        self._canary_below = 0  # those whose CRC-32 is less
        self._lock = threading.Lock()  # on the hot path taken by itself: entering a Condition is two calls more
        self._changed = threading.Condition(self._lock)
        self._loading = threading.Lock()
        self._remember, self._remembered, self._remembering = remember, None, threading.Lock()

    # ---- what the rollout controller asks for; each may be repeated

    def load(self, version: int) -> None:
        """Verify and map a version; after this it answers callers that accept no preferred one. Draining is undone."""
        self._load(version)
        self._note()

    def promote(self, version: int, share: float = 1.0) -> None:
        """Prefer this version wherever a caller accepts it, and end any canary; or make it the canary.

        Args:
            share: below 1, the share of the requests that the version is tried on, while what is preferred stays so.

        Raises:
            RpcError: VERSION_NOT_LOADED; INVALID_SHARE where the share is not in (0, 1], or a canary is asked for of
                the version that is preferred already.
        """
        if not 0 < share <= 1:
            raise RpcError(
                Code.INVALID_SHARE, f"share of version {version}", expected="more than 0, at most 1", got=f"{share:g}",
                remedy="Give a share of the requests, or none to prefer the version everywhere.",
            )
        with self._changed:
            if version not in self._hosted:
                raise self._not_loaded(version, f"{sorted(self._hosted)} loaded")
            if self._hosted[version].draining:
                raise self._not_loaded(version, "it is draining")
            if share == 1:
                self._preferred, self._canary, self._canary_share = version, 0, 0.0
            elif version == self._preferred:
                raise RpcError(
                    Code.INVALID_SHARE, f"version {version} cannot be a canary", expected="one beside the preferred",
                    got=f"share {share:g} of the preferred version itself", remedy="Promote another version first.",
                )
            else:
                self._canary, self._canary_share = version, share
            self._reroute()
        self._note()

    def drain(self, version: int) -> None:
        """Answer nothing new from this version; refused for the last one that answers."""
        with self._changed:
            hosted = self._hosted.get(version)
            if hosted and not hosted.draining:
                if self._answering() == [version]:
                    raise RpcError(
                        Code.LAST_VERSION, f"version {version} cannot be drained",
                        expected="another version that answers on this host", got="it is the only one",
                        remedy="Load and promote another version first, or stop the process.",
                    )
                hosted.draining = True
                self._reroute()
        self._note()

    def unload(self, version: int) -> None:
        """Forget a drained version once no request holds it; its pages go with the last reference."""
        with self._changed:
            hosted = self._hosted.get(version)
            if hosted:
                self._wait_until_unused(hosted)
                if self._hosted.get(version) is hosted:
                    del self._hosted[version]
                    self._reroute()
        self._note()
        if hosted:
            hosted.pin.close()
            logger.info("version %d unloaded", version)

    # ---- starting and stopping

    def restore(self, state: HostState, *, whole: bool = False) -> None:
        """Become what `state` says, for a host that holds nothing yet.

        Args:
            whole: whether to raise where a version cannot be opened; else it is logged and left out.

        Raises:
            FacetError: why a version could not be opened, if `whole` or if none is left that answers.
        """
        failure: FacetError | None = None
        for version in state.loaded:
            try:
                self._load(version, draining=version in state.draining)
            except FacetError as error:
                if whole:
                    raise
                logger.error("version %d, which this host served, cannot be served any more: %s", version, error)
                failure = error
        with self._changed:
            answering = self._answering()
            if failure and not answering:
                raise failure
            if state.preferred in answering:
                self._preferred = state.preferred
            if state.canary in answering:
                self._canary, self._canary_share = state.canary, state.canary_share
            self._reroute()

    def close(self) -> None:
        """Let go of every pin; only for a process that ends."""
        for hosted in self._hosted.values():
            hosted.pin.close()

    # ---- what requests ask for: the hot path

    def hold(self, accepted: Collection[int], request_id: str = "") -> HostedVersion:
        """The version that answers one request; held until `release`.

        That is the canary for its share of the requests, else the preferred version, else the oldest that is accepted.

        Raises:
            RpcError: VERSION_NOT_AVAILABLE, naming the versions that do answer; NO_ACCEPTED_VERSIONS.
        """
        with self._lock:
            canarys = self._canary_below and zlib.crc32(request_id.encode()) < self._canary_below
            for hosted in self._canary_in_turn if canarys else self._in_turn:
                if hosted.version in accepted:
                    hosted.in_flight += 1
                    return hosted
            answering = self._answering()
        if not accepted:
            raise RpcError(
                Code.NO_ACCEPTED_VERSIONS, "accepted_versions", expected="at least one", got="none",
                remedy="Name the versions you can use; there is no 'latest'.",
            )
        raise RpcError(
            Code.VERSION_NOT_AVAILABLE, "none of the accepted versions answers on this host",
            expected=f"one of {answering}", got=f"{sorted(set(accepted))}",
            remedy="Accept a version that answers, or load one of these here.", versions=tuple(answering),
        )

    def release(self, hosted: HostedVersion, *, answered: bool = True) -> None:
        """The request that held this version has ended."""
        with self._lock:
            hosted.in_flight -= 1
            hosted.answered += answered
            if hosted.draining and not hosted.in_flight:
                self._changed.notify_all()

    @contextmanager
    def answering_from(self, accepted: Collection[int], request_id: str = "") -> Iterator[HostedVersion]:
        """`hold` for the time of a block; it counts as answered unless the block raises."""
        hosted = self.hold(accepted, request_id)
        answered = False
        try:
            yield hosted
            answered = True
        finally:
            self.release(hosted, answered=answered)

    # ---- what is held

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
                preferred=self._preferred, canary=self._canary, canary_share=self._canary_share,
            )

    def state(self) -> HostState:
        with self._changed:
            return HostState(
                loaded=tuple(sorted(self._hosted)),
                draining=tuple(sorted(version for version, hosted in self._hosted.items() if hosted.draining)),
                preferred=self._preferred, canary=self._canary, canary_share=self._canary_share,
            )

    def _load(self, version: int, *, draining: bool = False) -> None:
        with self._loading:
            if self._is_back(version):
                return
            with ExitStack() as pin:
                pin.enter_context(self._pin(version))
                reader = self._open(version)
                for table in reader.tables.values():  # on a new machine, the first lookup compiles for seconds
                    table.lookup(ANY_ID)
                hosted = HostedVersion(version, reader, reader.manifest.sha256, pin.pop_all(), draining)
            with self._changed:
                self._hosted[version] = hosted
                self._reroute()
        logger.info("version %d loaded (manifest %s)", version, hosted.manifest_sha256[:12])

    def _is_back(self, version: int) -> bool:
        with self._changed:
            if version in self._hosted:
                self._hosted[version].draining = False
                self._changed.notify_all()  # whoever waits to unload it
                self._reroute()
            return version in self._hosted

    def _wait_until_unused(self, hosted: HostedVersion) -> None:
        version = hosted.version
        if not hosted.draining:
            raise RpcError(
                Code.STILL_ANSWERING, f"version {version} cannot be unloaded", expected="a drained version",
                got="one that still answers", remedy="Drain it first.",
            )
        def unused() -> bool:
            return not hosted.in_flight or not hosted.draining

        if not self._wait_for(self._changed, unused, self._unload_wait_s):
            raise RpcError(
                Code.IN_FLIGHT, f"version {version} cannot be unloaded", expected="no request that holds it",
                got=f"{hosted.in_flight} after {self._unload_wait_s:g} s", remedy="Try again.",
            )
        if not hosted.draining:
            raise self._not_loaded(version, "it was loaded again meanwhile")

    def _answering(self) -> list[int]:
        return sorted(version for version, hosted in self._hosted.items() if not hosted.draining)

    def _reroute(self) -> None:
        """Decide, once a change and not once a request, in which order versions are tried."""
        answering = self._answering()
        if self._preferred not in answering:
            self._preferred = next((version for version in answering if version != self._canary), self._canary)
        if self._canary not in answering or self._canary == self._preferred:
            self._canary, self._canary_share = 0, 0.0
        answering.sort(key=lambda version: (version != self._preferred, version == self._canary, version))
        self._in_turn = tuple(self._hosted[version] for version in answering)
        self._canary_in_turn = tuple(sorted(self._in_turn, key=lambda hosted: hosted.version != self._canary))
        self._canary_below = self._canary_share * 2**32
        self.at_hand = all(table.at_hand for hosted in self._in_turn for table in hosted.reader.tables.values())
        metrics.set_versions(
            "cpu-tier",
            {version: "draining" if hosted.draining else "answering" for version, hosted in self._hosted.items()},
        )

    def _note(self) -> None:
        if self._remember is None:
            return
        with self._remembering:  # one writes at a time, and always what is true then: the last one written is the last
            state = self.state()
            if state != self._remembered:
                self._remember(state)
                self._remembered = state

    def _not_loaded(self, version: int, got: str) -> RpcError:
        return RpcError(
            Code.VERSION_NOT_LOADED, f"version {version}", expected="a version that is loaded here and answers",
            got=got, remedy="Load it first.",
        )
