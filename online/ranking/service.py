"""The ranker: each request is scored by the upper model of exactly the version that its rows name."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from online.lookup.row_source import PendingRows, RowSource, VersionRows
from online.lookup.service import packed_ids
from online.observe import metrics
from online.observe.request_log import ServedRequest
from online.proto import admin_pb2, admin_pb2_grpc, rank_pb2, rank_pb2_grpc
from online.ranking.batcher import Batcher
from online.ranking.context_source import ContextSource
from online.ranking.runnable import Pinned, RunnableModels
from online.ranking.scorer import Scored, Scorer, ToScore
from online.rpc.guard import Call
from online.rpc.server import GuardedServer
from online.rpc_error import Code, RpcError
from pipelines.contracts.context import ContextFeature

__all__ = ["RankService", "RankerAdminService", "RunnableModels"]

MAX_BATCH_CANDIDATES = 256  # in one forward pass: beyond that, its time is that of the candidates


class RankService(rank_pb2_grpc.RankServicer):
    """Scores candidates.

    ```
    pin models ── lookup leaves ──────────── rows + version ──┐
                └─ context features from Feast ───────────────┴─ model of that version ── scores
    ```

    Requests that meet in the model are scored in one forward pass for each version.

    Args:
        max_candidates: most candidates in one request.
        timeout_s: how long to wait for rows; a request's own deadline, if nearer.
    """

    def __init__(
        self, models: RunnableModels, rows: RowSource, context: ContextSource, *, max_candidates: int = 4096,
        timeout_s: float = 2.0,
    ) -> None:
        self._models, self._rows, self._context = models, rows, context
        self._max_candidates, self._timeout_s = max_candidates, timeout_s
        self._plan = _Plan.of(models.pin())
        self._scoring: Batcher[tuple[Scorer, ToScore], Scored] = Batcher(
            _score, max_size=MAX_BATCH_CANDIDATES, size=lambda asked: asked[1].candidates,
            observe=lambda requests: metrics.observe_batch("score", requests),
        )

    def add_to(self, server: GuardedServer) -> None:
        rank_pb2_grpc.add_RankServicer_to_server(self, server)

    def Rank(self, request: rank_pb2.RankRequest, call: Call) -> rank_pb2.RankResponse:
        with ServedRequest("rank", request.request_id or uuid.uuid4().hex) as served:
            candidates, now_seconds = self._candidates(request), _moment(request.now_seconds)
            deadline = min(call.deadline, time.monotonic() + self._timeout_s)
            question = _Question(
                served.request_id, request.user, candidates, now_seconds, deadline, call.arrived, call.waited_s
            )
            try:
                answer = self._answer(question)
            except Exception:
                self._models.count_failure(question.version)
                raise
            finally:
                served.version = question.version
            self._models.count_answer(answer.version, answer.timing.total_ms)
            _count(answer)
            return answer

    def warm_up(self) -> None:
        """Answer one request, which is not counted, so that no caller waits for connections; raises its refusal."""
        now = time.perf_counter()
        nobody = np.array([-1], np.int64)
        self._answer(_Question("warm-up", -1, nobody, time.time(), time.monotonic() + self._timeout_s, now, 0.0))

    def _answer(self, question: "_Question") -> rank_pb2.RankResponse:
        """Answer with the models that are loaded now, and again with those loaded then if no rows were to be had.

        A rollout may have loaded the version that answers now after this request had pinned its models, even several
        times over while the request waited for a host that was away. Every turn needs such a change, so they end.
        """
        while True:
            pinned = self._models.pin()
            try:
                return self._answer_from(self._plan_of(pinned), question)
            except RpcError as refusal:
                changed = self._models.pin() is not pinned
                in_time = time.monotonic() < question.deadline
                if refusal.code is not Code.VERSION_NOT_AVAILABLE or not changed or not in_time:
                    raise

    def _answer_from(self, plan: "_Plan", question: "_Question") -> rank_pb2.RankResponse:
        started = time.perf_counter()
        count = len(question.candidates)
        pending = self._start(plan, question)
        sent_at = time.perf_counter()
        columns = self._columns_of_all(plan, question)
        context_at = time.perf_counter()
        rows = self._finish(pending, question)
        rows_at = time.perf_counter()
        scorer = _model_of(rows, plan.pinned)
        if columns is None:
            columns = self._columns(scorer.context, question)
        scored = self._scoring.submit((scorer, ToScore(rows, columns, count, question.now_seconds)))
        scored_at = time.perf_counter()
        return rank_pb2.RankResponse(
            version=scorer.version,
            manifest_sha256=scorer.manifest_sha256,
            tasks=scorer.tasks,
            scores=scored.scores.astype("<f4").tobytes(),
            found=[
                rank_pb2.TableFound(table=name, ids=len(found), found=np.count_nonzero(found))
                for name, found in rows.found.items()
            ],
            timing=rank_pb2.Timing(
                lookup_ms=(sent_at - started + rows_at - context_at) * 1e3,
                context_ms=(context_at - sent_at) * 1e3,
                wait_ms=(rows_at - context_at) * 1e3,
                dequantize_ms=scored.dequantize_ms,
                model_ms=(scored_at - rows_at) * 1e3 - scored.dequantize_ms,
                total_ms=(scored_at - question.arrived) * 1e3,
                queue_ms=question.waited_s * 1e3,
            ),
        )

    def _columns(self, features: Sequence[ContextFeature], question: "_Question") -> dict[str, np.ndarray]:
        users = np.full(len(question.candidates), question.user, np.int64)
        return self._context.columns(features, users=users, items=question.candidates)

    def _columns_of_all(self, plan: "_Plan", question: "_Question") -> dict[str, np.ndarray] | None:
        """The features of all models, while the rows come; None where they cannot be read together.

        One model's view may have become unreadable since it was loaded. What that fails are its own requests: once the
        rows say which model scores, the features of that one alone are read.
        """
        try:
            return self._columns(plan.features, question)
        except Exception:  # whatever it is: the read of the one model's features raises it again, if it is its own
            return None

    def _plan_of(self, pinned: Pinned) -> "_Plan":
        plan = self._plan
        if plan.pinned is not pinned:
            plan = self._plan = _Plan.of(pinned)
        return plan

    def _start(self, plan: "_Plan", question: "_Question") -> PendingRows:
        ids = {"user": np.array([question.user], np.int64), "item": question.candidates}
        return self._rows.start(
            plan.versions,
            {name: ids[entity] for name, entity in plan.tables.items()},
            only=plan.only,
            request_id=question.request_id,
            timeout_s=max(question.deadline - time.monotonic(), 0.001),
        )

    @staticmethod
    def _finish(pending: PendingRows, question: "_Question") -> VersionRows:
        """The rows, whose version is noted, or else that of rows that could not be read: a canary is judged by it."""
        try:
            rows = pending.result()
        except RpcError as refusal:
            if refusal.code is not Code.VERSION_NOT_AVAILABLE and len(refusal.versions) == 1:
                question.version = refusal.versions[0]
            raise
        question.version = rows.version
        return rows

    def _candidates(self, request: rank_pb2.RankRequest) -> np.ndarray:
        candidates = packed_ids(request.candidates, "candidates")
        if not len(candidates):
            raise RpcError(
                Code.MALFORMED_IDS, "candidates", expected="at least one id", got="none", remedy="Name what to score."
            )
        if len(candidates) > self._max_candidates:
            raise RpcError(
                Code.BATCH_TOO_LARGE, "candidates", expected=f"at most {self._max_candidates}",
                got=str(len(candidates)), remedy="Split them over several requests.",
            )
        return candidates


@dataclass(slots=True)
class _Question:
    request_id: str
    user: int
    candidates: np.ndarray  # int64 (C,)
    now_seconds: float
    deadline: float  # of time.monotonic()
    arrived: float  # of time.perf_counter()
    waited_s: float
    version: int = 0  # whose rows came, or could not be read


@dataclass(frozen=True)
class _Plan:
    """What to ask for on behalf of a set of pinned models: worked out when the set changes, not at each request.

    Attributes:
        versions: of all models. Which of them answers is the CPU tier's choice alone.
        tables: of any of them -> whose ids they take.
        only: table -> versions that have it, where not all do.
        features: context of any of them.
    """

    pinned: Pinned
    versions: tuple[int, ...]
    tables: dict[str, str]
    only: dict[str, tuple[int, ...]]
    features: tuple[ContextFeature, ...]

    @classmethod
    def of(cls, pinned: Pinned) -> "_Plan":
        versions = tuple(sorted(pinned, reverse=True))
        tables = {name: spec.entity for version in versions for name, spec in pinned[version].tables.items()}
        having = {name: tuple(version for version in versions if name in pinned[version].tables) for name in tables}
        only = {name: some for name, some in having.items() if some != versions}
        features = dict.fromkeys(feature for scorer in pinned.values() for feature in scorer.context)
        return cls(pinned, versions, tables, only, tuple(features))


def _score(asked: list[tuple[Scorer, ToScore]]) -> list[Scored]:
    """Each request by its own version's model: one forward pass for all requests of a version."""
    by_scorer: dict[int, list[int]] = {}
    for position, (scorer, _) in enumerate(asked):
        by_scorer.setdefault(id(scorer), []).append(position)
    scored: dict[int, Scored] = {}
    for positions in by_scorer.values():
        scorer = asked[positions[0]][0]
        answers = scorer.score([asked[position][1] for position in positions])
        scored.update(zip(positions, answers, strict=True))
    return [scored[position] for position in range(len(asked))]


def _count(answer: rank_pb2.RankResponse) -> None:
    metrics.count_answer("ranker", answer.version)
    for entry in answer.found:
        metrics.count_rows(entry.table, entry.ids, entry.found)
    timing = answer.timing
    for stage, stage_ms in (
        ("queue", timing.queue_ms), ("lookup", timing.lookup_ms), ("context", timing.context_ms),
        ("wait", timing.wait_ms), ("dequantize", timing.dequantize_ms), ("model", timing.model_ms),
        ("total", timing.total_ms),
    ):
        metrics.observe_stage(stage, stage_ms / 1e3)


def _model_of(rows: VersionRows, pinned: Pinned) -> Scorer:
    """The pinned model of exactly the version that the rows name, by number and by manifest; else a refusal."""
    scorer = pinned.get(rows.version)
    if scorer is None or scorer.manifest_sha256 != rows.manifest_sha256:
        metrics.count_mismatch()
        raise RpcError(
            Code.VERSION_MISMATCH, "rows of another version than the model's",
            expected=f"one of {[(v, s.manifest_sha256[:12]) for v, s in pinned.items()]}",
            got=f"{(rows.version, rows.manifest_sha256[:12])}",
            remedy="Let CPU tier and ranker read the same published versions.",
        )
    return scorer


def _moment(now_seconds: float) -> float:
    if not math.isfinite(now_seconds) or now_seconds < 0:
        raise RpcError(
            Code.INVALID_TIME, "now_seconds", expected="seconds since 1970, or 0 for the server's clock",
            got=str(now_seconds), remedy="Send a finite number that is not negative.",
        )
    return now_seconds or time.time()


class RankerAdminService(admin_pb2_grpc.RankerAdminServicer):
    """What the rollout controller asks of a ranker."""

    def __init__(self, models: RunnableModels) -> None:
        self._models = models

    def Load(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.RankerStatus:
        self._models.load(request.version)
        return self._models.status()

    def Unload(self, request: admin_pb2.VersionRequest, call: Call) -> admin_pb2.RankerStatus:
        self._models.unload(request.version)
        return self._models.status()

    def Status(self, request: admin_pb2.StatusRequest, call: Call) -> admin_pb2.RankerStatus:
        return self._models.status()
