"""Ranking with rows from a CPU host, against the same ranker with the tables in its own process; and against Feast."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from online.lookup.client import LookupClient
from online.ranking.client import RankClient
from tests.benchmarks.feast_stock import open_store, redis_store, stock_repository
from tests.benchmarks.harness import Result, Side, Timing, interleave, interval_of_ratio, overhead, speeds_compared
from tests.benchmarks.serving import TWO_CORES, Serving, on_two_cores
from tests.fleet import Fleet
from tests.redis_server import RedisServer
from tests.releases import AS_OF, WIDE_RANGE

__all__ = ["fetch_against_feast", "rank_against_local", "rank_bare"]

NOW_S = AS_OF.timestamp()


def rank_against_local(serving: Serving) -> Iterator[Result]:
    """The same requests to both rankers in turn; then again with client, ranker and CPU host bound to cores."""
    remote, local = serving.fleet(), serving.fleet(local=True)
    yield from _ranked(serving, remote, local, "rank500")
    with on_two_cores(remote, local):
        yield from _ranked(
            serving, remote, local, "rank500_pinned", bound=TWO_CORES
        )


def rank_bare(serving: Serving) -> Iterator[Result]:
    """The same with a model that takes no context, which leaves the lookup nothing to hide behind."""
    remote, local = serving.fleet(version=2), serving.fleet(local=True, version=2)
    yield from _ranked(serving, remote, local, "rank500_bare", context="none: the model takes none")


def _ranked(serving: Serving, remote: Fleet, local: Fleet, name: str, **conditions: Any) -> Iterator[Result]:
    asked, stages = _Requests(serving), {"remote": [], "local": []}
    clients = {"remote": RankClient(remote.rankers[0].address), "local": RankClient(local.rankers[0].address)}

    def side(which: str) -> Side:
        def rank(request: tuple[int, np.ndarray]) -> None:
            answer = clients[which].rank(*request, now_seconds=NOW_S)
            stages[which].append(answer.timing_ms)

        return Side(which, rank, lambda: asked.draw(serving.sizes.short_calls))

    timings = interleave([side("remote"), side("local")], rounds=serving.sizes.short_rounds, label=name)
    for client in clients.values():
        client.close()
    said = {
        "candidates": serving.sizes.candidates, "rows": serving.sizes.rows, "tables": 4, "dim": 64, "threads": 1,
        "ours_is": "ranker with a CPU host of its own over gRPC", "context": "Feast get_online_features, SQLite",
        "stages_p50_ms": {which: _medians(parts) for which, parts in stages.items()}, **conditions,
    }
    rival = "same ranker, tables in its process"
    yield _cost(f"{name}_p50_vs_local", timings, lambda timing: timing.seconds, rival, said)
    yield _cost(f"{name}_p99_vs_local", timings, lambda timing: timing.p99, rival, said)


def _cost(
    name: str, timings: dict[str, Timing], figure: Callable[[Timing], float], rival: str, said: dict[str, Any]
) -> Result:
    ours, theirs = timings["remote"], timings["local"]
    return overhead(
        name, ours=figure(ours) * 1e3, rival=figure(theirs) * 1e3, rival_name=rival, unit="ms",
        ratio_interval_95=interval_of_ratio(ours, theirs, figure), rounds=len(ours.turns), calls_a_round=ours.calls,
        **said,
    )


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    return {stage: round(float(np.median([part.get(stage, 0.0) for part in parts])), 3) for stage in parts[0]}


class _Requests:
    """Rank requests of known users and items, other ones in each call."""

    def __init__(self, serving: Serving) -> None:
        self._users, self._items = serving.ids("user"), serving.ids("item")
        self._candidates, self._random = serving.sizes.candidates, np.random.default_rng(0)

    def draw(self, count: int) -> list[tuple[int, np.ndarray]]:
        return [
            (int(self._random.choice(self._users)), self._random.choice(self._items, self._candidates, replace=False))
            for _ in range(count)
        ]


def fetch_against_feast(serving: Serving) -> Iterator[Result]:
    """All rows of a rank request, one user's and the candidates' of both facets: from the CPU host, and from Redis."""
    manifest = serving.repository.workspace.versions.manifest(1)
    with RedisServer() as redis:
        repository = stock_repository(serving.repository, "fetch", redis_store(redis, skip_dedup=True))
        store, views = open_store(repository), {spec.name: spec.view_name(1) for spec in manifest.tables}
        began = time.perf_counter()
        store.materialize(*WIDE_RANGE, feature_views=list(views.values()))
        filled_s = time.perf_counter() - began
        features = [f"{view}:row" for view in views.values()]
        client, asked = LookupClient([serving.fleet().cpu_tiers[0].address]), _Requests(serving)

        def ours(request: tuple[int, np.ndarray]) -> dict[str, np.ndarray]:
            user, items = request
            ids = {"user": np.array([user]), "item": items}
            return client.lookup([1], {name: ids[name.partition(".")[0]] for name in views}).rows

        def rival(request: tuple[int, np.ndarray]) -> dict[str, np.ndarray]:
            user, items = request
            answer = store.get_online_features(
                features=features, entity_rows={"user": [user] * len(items), "item": items.tolist()},
                full_feature_names=True,
            ).to_dict()
            return {
                name: np.frombuffer(b"".join(answer[f"{view}__row"]), np.uint8).reshape(len(items), -1)
                for name, view in views.items()
            }

        _require_same(ours, rival, asked.draw(3))
        sides = [
            Side("LookupClient over gRPC to a CPU host", ours, lambda: asked.draw(serving.sizes.calls)),
            Side("Feast get_online_features on Redis", rival, lambda: asked.draw(max(serving.sizes.calls // 5, 1))),
        ]
        timings = interleave(sides, rounds=serving.sizes.rounds, label="fetch")
        client.close()
    yield speeds_compared(
        "fetch500_vs_feast_redis", ours=timings[sides[0].name], rival=timings[sides[1].name],
        candidates=serving.sizes.candidates, rows=serving.sizes.rows, tables=4, dim=64, redis="Unix socket",
        answer="arrays of packed rows, one per table", redis_filled_s=round(filled_s, 1),
    )


def _require_same(ours, rival, requests: list[tuple[int, np.ndarray]]) -> None:
    for request in requests:
        mine, theirs = ours(request), rival(request)
        for table, rows in mine.items():
            if not np.array_equal(rows, theirs[table][: len(rows)]):
                raise RuntimeError(f"{table}: Feast on Redis has other rows than the CPU host")
