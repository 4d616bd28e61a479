"""The ranker: upper models of several versions, each request scored by the model of the version its rows name."""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import grpc
import numpy as np

from online.client import LookupClient, PendingLookup
from online.context_source import ContextSource
from online.cpu_tier import packed_ids
from online.proto import admin_pb2, admin_pb2_grpc, rank_pb2, rank_pb2_grpc
from online.refusal import Code, Refusal, refusals_to_status
from online.row_source import VersionRows
from online.scorer import Scorer

__all__ = ["RankService", "RankerAdminService", "RunnableModels"]

logger = logging.getLogger(__name__)

Pinned = Mapping[int, Scorer]


class RunnableModels:
    """Upper models by version. A request pins them all by one reference; loading and unloading replace the mapping.

    Args:
        load_scorer: version number -> its scorer, verified and warm; raises what makes the version unfit.
        pin: version number -> what holds it from before it is loaded until it is unloaded.
    """

    def __init__(
        self, load_scorer: Callable[[int], Scorer], *, pin: Callable[[int], AbstractContextManager] = nullcontext
    ) -> None:
        self._load, self._pin = load_scorer, pin
        self._models: Pinned = MappingProxyType({})
        self._pins: dict[int, ExitStack] = {}
        self._answered: dict[int, int] = {}
        self._changing = threading.Lock()

    def pin(self) -> Pinned:
        """The models that can run now; they stay usable for whoever holds the mapping."""
        return self._models

    def load(self, version: int) -> None:
        with self._changing:
            if version not in self._models:
                with ExitStack() as pin:
                    pin.enter_context(self._pin(version))
                    self._models = MappingProxyType({**self._models, version: self._load(version)})
                    self._pins[version] = pin.pop_all()
                logger.info("upper model of version %d loaded", version)

    def unload(self, version: int) -> None:
        """Forget a version; refused for the last one."""
        with self._changing:
            if version not in self._models:
                return
            if len(self._models) == 1:
                raise Refusal(
                    Code.LAST_VERSION, f"version {version} cannot be unloaded", expected="another upper model here",
                    got="it is the only one", remedy="Load another version first, or stop the process.",
                )
            self._models = MappingProxyType({v: scorer for v, scorer in self._models.items() if v != version})
            self._pins.pop(version).close()
            logger.info("upper model of version %d unloaded", version)

    def close(self) -> None:
        """Let go of every pin; only for a process that ends."""
        for pin in self._pins.values():
            pin.close()

    def count_answer(self, version: int) -> None:
        with self._changing:
            self._answered[version] = self._answered.get(version, 0) + 1

    def status(self) -> admin_pb2.RankerStatus:
        models = self.pin()
        return admin_pb2.RankerStatus(
            models=[
                admin_pb2.LoadedModel(
                    version=version, manifest_sha256=scorer.manifest_sha256, device=scorer.device,
                    answered=self._answered.get(version, 0),
                )
                for version, scorer in sorted(models.items())
            ]
        )


class RankService(rank_pb2_grpc.RankServicer):
    """Scores candidates.

    ```
    pin models ── lookup leaves ──────────── rows + version ──┐
                └─ context features from Feast ───────────────┴─ model of that version ── scores
    ```
    """

    def __init__(
        self, models: RunnableModels, lookup: LookupClient, context: ContextSource, *, max_candidates: int = 4096,
        timeout_s: float = 2.0,
    ) -> None:
        self._models, self._lookup, self._context = models, lookup, context
        self._max_candidates, self._timeout_s = max_candidates, timeout_s

    def Rank(self, request: rank_pb2.RankRequest, context: grpc.ServicerContext) -> rank_pb2.RankResponse:
        request_id = request.request_id or uuid.uuid4().hex
        with refusals_to_status(context, request_id):
            return self._rank(request, request_id, context.time_remaining())

    def _rank(self, request: rank_pb2.RankRequest, request_id: str, remaining_s: float | None) -> rank_pb2.RankResponse:
        candidates = self._candidates(request)
        now_seconds = _moment(request.now_seconds)
        timeout_s = self._timeout_s if remaining_s is None else min(self._timeout_s, remaining_s)
        question = _Question(request_id, request.user, candidates, now_seconds, time.monotonic() + timeout_s)
        pinned = self._models.pin()
        try:
            return self._answer(question, pinned)
        except Refusal as refusal:
            if refusal.code is not Code.VERSION_NOT_AVAILABLE or self._models.pin() is pinned:
                raise
            # A rollout loaded the version that answers now after this request had pinned its models.
            return self._answer(question, self._models.pin())

    def _answer(self, question: "_Question", pinned: Pinned) -> rank_pb2.RankResponse:
        started = time.perf_counter()
        count = len(question.candidates)
        groups = _by_tables(pinned)
        pending = self._start(groups[0], question)
        features = list(dict.fromkeys(feature for scorer in pinned.values() for feature in scorer.context))
        columns = self._context.columns(
            features, users=np.full(count, question.user, np.int64), items=question.candidates
        )
        context_at = time.perf_counter()
        rows = self._finish(pending, groups[1:], question)
        rows_at = time.perf_counter()
        scorer = _model_of(rows, pinned)
        scores, dequantize_ms, model_ms = scorer.score(
            rows, columns, candidates=count, now_seconds=question.now_seconds
        )
        self._models.count_answer(scorer.version)
        return rank_pb2.RankResponse(
            version=scorer.version,
            manifest_sha256=scorer.manifest_sha256,
            tasks=scorer.tasks,
            scores=scores.astype("<f4").tobytes(),
            found=[
                rank_pb2.TableFound(table=name, ids=len(found), found=int(found.sum()))
                for name, found in rows.found.items()
            ],
            timing=rank_pb2.Timing(
                lookup_ms=((pending.finished_at or rows_at) - started) * 1e3,
                context_ms=(context_at - started) * 1e3,
                wait_ms=(rows_at - context_at) * 1e3,
                dequantize_ms=dequantize_ms,
                model_ms=model_ms,
                total_ms=(time.perf_counter() - started) * 1e3,
            ),
        )

    def _start(self, scorers: list[Scorer], question: "_Question") -> PendingLookup:
        ids = {"user": np.array([question.user], np.int64), "item": question.candidates}
        return self._lookup.start(
            [scorer.version for scorer in scorers],
            {name: ids[spec.entity] for name, spec in scorers[0].tables.items()},
            request_id=question.request_id,
            timeout_s=max(question.deadline - time.monotonic(), 0.001),
        )

    def _finish(self, pending: PendingLookup, others: list[list[Scorer]], question: "_Question") -> VersionRows:
        """The rows; versions with other tables are asked for only when no version of the first group answers."""
        try:
            return pending.result()
        except Refusal as refusal:
            if refusal.code is not Code.VERSION_NOT_AVAILABLE or not others:
                raise
            return self._finish(self._start(others[0], question), others[1:], question)

    def _candidates(self, request: rank_pb2.RankRequest) -> np.ndarray:
        candidates = packed_ids(request.candidates, "candidates")
        if not len(candidates):
            raise Refusal(
                Code.MALFORMED_IDS, "candidates", expected="at least one id", got="none", remedy="Name what to score."
            )
        if len(candidates) > self._max_candidates:
            raise Refusal(
                Code.BATCH_TOO_LARGE, "candidates", expected=f"at most {self._max_candidates}",
                got=str(len(candidates)), remedy="Split them over several requests.",
            )
        return candidates


@dataclass(frozen=True)
class _Question:
    request_id: str
    user: int
    candidates: np.ndarray  # int64 (C,)
    now_seconds: float
    deadline: float  # of time.monotonic()


def _by_tables(pinned: Pinned) -> list[list[Scorer]]:
    """Scorers that read the same tables together, since a lookup names one set of tables; the newest version first."""
    groups: dict[frozenset[str], list[Scorer]] = {}
    for _, scorer in sorted(pinned.items(), reverse=True):
        groups.setdefault(frozenset(scorer.tables), []).append(scorer)
    return list(groups.values())


def _model_of(rows: VersionRows, pinned: Pinned) -> Scorer:
    """The pinned model of exactly the version that the rows name, by number and by manifest; else a refusal."""
    scorer = pinned.get(rows.version)
    if scorer is None or scorer.manifest_sha256 != rows.manifest_sha256:
        raise Refusal(
            Code.VERSION_MISMATCH, "rows of another version than the model's",
            expected=f"one of {[(v, s.manifest_sha256[:12]) for v, s in pinned.items()]}",
            got=f"{(rows.version, rows.manifest_sha256[:12])}",
            remedy="Let CPU tier and ranker read the same published versions.",
        )
    return scorer


def _moment(now_seconds: float) -> float:
    if not math.isfinite(now_seconds) or now_seconds < 0:
        raise Refusal(
            Code.INVALID_TIME, "now_seconds", expected="seconds since 1970, or 0 for the server's clock",
            got=str(now_seconds), remedy="Send a finite number that is not negative.",
        )
    return now_seconds or time.time()


class RankerAdminService(admin_pb2_grpc.RankerAdminServicer):
    """What the rollout controller asks of a ranker."""

    def __init__(self, models: RunnableModels) -> None:
        self._models = models

    def Load(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.RankerStatus:
        return self._after(self._models.load, request, context)

    def Unload(self, request: admin_pb2.VersionRequest, context: grpc.ServicerContext) -> admin_pb2.RankerStatus:
        return self._after(self._models.unload, request, context)

    def Status(self, request: admin_pb2.StatusRequest, context: grpc.ServicerContext) -> admin_pb2.RankerStatus:
        return self._models.status()

    def _after(
        self, change: Callable[[int], None], request: admin_pb2.VersionRequest, context: grpc.ServicerContext
    ) -> admin_pb2.RankerStatus:
        with refusals_to_status(context, f"{change.__name__} {request.version}"):
            change(request.version)
            return self._models.status()
