"""The upper models that a ranker can run, and what became of the requests to each."""

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType

from online.host_state import HostState
from online.observe import metrics
from online.proto import admin_pb2
from online.ranking.context_source import ContextSource
from online.ranking.scorer import Scorer
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import FacetError

__all__ = ["LATENCY_BOUNDS_MS", "Pinned", "RunnableModels"]

logger = logging.getLogger(__name__)

LATENCY_BOUNDS_MS = (
    0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 100.0, 150.0, 200.0, 300.0, 500.0,
    700.0, 1000.0, 2000.0, 5000.0,
)  # fmt: skip
"""Upper bounds of the latency bins that the rollout controller reads: steps of at most a half up to a second."""

Pinned = Mapping[int, Scorer]


@dataclass
class _Outcomes:
    """What became of requests that a version's rows had come for, since the process started."""

    answered: int = 0
    failed: int = 0
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_MS) + 1))


class RunnableModels:
    """Upper models by version. A request pins them all by one reference; loading and unloading replace the mapping.

    Args:
        load_scorer: version number -> its scorer, proved and warm; raises what makes the version unfit.
        context: where requests will read the models' context features.
        pin: version number -> what holds it from before it is loaded until it is unloaded.
        remember: is given what the ranker holds after every change, before the change returns.
        answering: version number -> do this process's own rows still answer from it? Its model then stays.
    """

    def __init__(
        self, load_scorer: Callable[[int], Scorer], *, context: ContextSource,
        pin: Callable[[int], AbstractContextManager] = nullcontext, remember: Callable[[HostState], None] | None = None,
        answering: Callable[[int], bool] = lambda version: False,
    ) -> None:
        self._load_scorer, self._context, self._pin = load_scorer, context, pin
        self._remember, self._answering = remember, answering
        self._models: Pinned = MappingProxyType({})
        self._pins: dict[int, ExitStack] = {}
        self._outcomes: dict[int, _Outcomes] = {}
        self._failed = 0
        self._changing, self._counting = threading.Lock(), threading.Lock()

    def pin(self) -> Pinned:
        """The models that can run now; they stay usable for whoever holds the mapping."""
        return self._models

    # ---- what the rollout controller asks for; each may be repeated

    def load(self, version: int) -> None:
        """Prove, build and warm up a version's model and read its context; requests after this can be scored by it.

        Raises:
            FacetError: why the version is unfit; the models that could run before can run after.
        """
        with self._changing:
            self._load(version)
            self._note()

    def unload(self, version: int) -> None:
        """Forget a version; requests under way keep the model they began with.

        Raises:
            RpcError: LAST_VERSION for the only one; STILL_ANSWERING while this process's own rows answer from it.
        """
        with self._changing:
            if version in self._models:
                self._check_unload(version)
                self._replace({v: scorer for v, scorer in self._models.items() if v != version})
                self._pins.pop(version).close()
                logger.info("upper model of version %d unloaded", version)
            self._note()

    # ---- starting and stopping

    def restore(self, state: HostState, *, whole: bool = False) -> None:
        """Hold what `state` says, for a ranker that holds nothing yet.

        Args:
            whole: whether to raise where a version cannot be loaded; else it is logged and left out.

        Raises:
            FacetError: why a version could not be loaded, if `whole` or if none is left.
        """
        failure: FacetError | None = None
        with self._changing:
            for version in state.loaded:
                try:
                    self._load(version)
                except FacetError as error:
                    if whole:
                        raise
                    logger.error("version %d, which this ranker ran, cannot be run any more: %s", version, error)
                    failure = error
            if failure and not self._models:
                raise failure

    def state(self) -> HostState:
        """What to remember of this ranker."""
        return HostState(loaded=tuple(sorted(self._models)))

    def close(self) -> None:
        """Let go of every pin; only for a process that ends."""
        for pin in self._pins.values():
            pin.close()

    # ---- what became of requests

    def count_answer(self, version: int, total_ms: float) -> None:
        """A request was answered from this version, `total_ms` after it came."""
        latency_bin = bisect_left(LATENCY_BOUNDS_MS, total_ms)
        with self._counting:
            outcomes = self._outcomes[version]
            outcomes.answered += 1
            outcomes.latency_counts[latency_bin] += 1

    def count_failure(self, version: int) -> None:
        """A request failed that had been begun; `version` of its rows, 0 if they had not come."""
        with self._counting:
            if version in self._outcomes:
                self._outcomes[version].failed += 1
            else:
                self._failed += 1

    def status(self) -> admin_pb2.RankerStatus:
        models = self.pin()
        with self._counting:
            return admin_pb2.RankerStatus(
                models=[
                    admin_pb2.LoadedModel(
                        version=version, manifest_sha256=scorer.manifest_sha256, device=scorer.device,
                        answered=outcomes.answered, failed=outcomes.failed, latency_counts=outcomes.latency_counts,
                    )
                    for version, scorer in sorted(models.items())
                    for outcomes in [self._outcomes[version]]
                ],
                latency_bounds_ms=LATENCY_BOUNDS_MS,
                failed=self._failed,
            )

    def _load(self, version: int) -> None:
        if version in self._models:
            return
        with ExitStack() as pin:
            pin.enter_context(self._pin(version))
            scorer = self._load_scorer(version)
            running = [feature for other in self._models.values() for feature in other.context]
            self._context.require(scorer.context, beside=running)
            self._pins[version] = pin.pop_all()
        with self._counting:
            self._outcomes.setdefault(version, _Outcomes())
        self._replace({**self._models, version: scorer})
        logger.info("upper model of version %d loaded", version)

    def _replace(self, models: dict[int, Scorer]) -> None:
        self._models = MappingProxyType(models)
        metrics.set_versions("ranker", dict.fromkeys(models, "runnable"))

    def _check_unload(self, version: int) -> None:
        if len(self._models) == 1:
            raise RpcError(
                Code.LAST_VERSION, f"version {version} cannot be unloaded", expected="another upper model here",
                got="it is the only one", remedy="Load another version first, or stop the process.",
            )
        if self._answering(version):
            raise RpcError(
                Code.STILL_ANSWERING, f"upper model of version {version} cannot be unloaded",
                expected="a version whose rows are gone from this process", got="one that its rows still answer from",
                remedy="Drain and unload its rows first.",
            )

    def _note(self) -> None:
        # Written at repeated calls too: one that failed half-way, on a full disk, is made whole by being repeated.
        if self._remember is not None:
            self._remember(self.state())
