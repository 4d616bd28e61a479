"""Ranking with rows from a CPU host, against the same ranker with the tables in its own process; and against Feast."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from online.lookup.client import LookupClient
from online.ranking.client import RankClient
from tests.benchmarks.feast_stock import open_store, redis_store, stock_repository
from tests.benchmarks.harness import (
    Result,
    Side,
    Timing,
    environment,
    interleave,
    median_with_interval,
    ratio_by_round,
    speeds_compared,
)
from tests.benchmarks.serving import TWO_CORES, Serving, on_two_cores
from tests.fleet import Fleet
from tests.redis_server import RedisServer
from tests.releases import AS_OF, WIDE_RANGE

__all__ = ["fetch_against_feast", "rank_against_before", "rank_against_local", "rank_bare"]

NOW_S = AS_OF.timestamp()


def rank_against_local(serving: Serving) -> Iterator[Result]:
    """The same requests to both rankers in turn; then again with client, ranker and CPU host bound to cores."""
    free, pinned = _Compared(serving, "rank500"), _Compared(serving, "rank500_pinned", bound=TWO_CORES)
    for remote, local in _pairs(serving, version=1):
        addresses = remote.rankers[0].address, local.rankers[0].address
        free.measure(*addresses)
        with on_two_cores(remote, local):
            pinned.measure(*addresses)
    yield from free.results()
    yield from pinned.results()


def rank_against_before(serving: Serving) -> Iterator[Result]:
    """The same requests to rankers of an earlier commit, each with a CPU host of its own; nothing without such code."""
    if serving.before is None:
        return
    compared = _Compared(serving, "rank500", rival="before", rival_name="the same of an earlier commit")
    for _ in range(serving.sizes.pairs):
        with serving.new_fleet() as ours, serving.before.fleet() as earlier:
            compared.measure(ours.rankers[0].address, earlier)
    yield from compared.results()


def rank_bare(serving: Serving) -> Iterator[Result]:
    """The same with a model that takes no context, which leaves the lookup nothing to hide behind."""
    bare = _Compared(serving, "rank500_bare", context="none: the model takes none")
    for remote, local in _pairs(serving, version=2):
        bare.measure(remote.rankers[0].address, local.rankers[0].address)
    yield from bare.results()


def _pairs(serving: Serving, *, version: int) -> Iterator[tuple[Fleet, Fleet]]:
    """New processes each time: a ranker that asks a CPU host, and one that has the tables."""
    for _ in range(serving.sizes.pairs):
        with serving.new_fleet(version=version) as remote, serving.new_fleet(local=True, version=version) as local:
            yield remote, local


class _Compared:
    """What requests took with the rows on a CPU host, and of a rival, pair by pair of processes."""

    def __init__(
        self, serving: Serving, name: str, *, rival: str = "local",
        rival_name: str = "same ranker, tables in its process", **conditions: Any,
    ) -> None:
        self._sizes, self._name, self._asked = serving.sizes, name, _Requests(serving)
        self._rival, self._rival_name = rival, rival_name
        self._timings: list[dict[str, Timing]] = []
        self._stages: dict[str, list[dict[str, float]]] = {"remote": [], rival: []}
        self._conditions = {"context": "Feast get_online_features, SQLite"} | conditions

    def measure(self, remote: str, rival: str) -> None:
        """Ask two rankers in turn, by their addresses."""
        clients = {"remote": RankClient(remote), self._rival: RankClient(rival)}

        def side(which: str) -> Side:
            def rank(request: tuple[int, np.ndarray]) -> None:
                answer = clients[which].rank(*request, now_seconds=NOW_S)
                self._stages[which].append(answer.timing_ms)

            return Side(which, rank, lambda: self._asked.draw(self._sizes.rank_calls))

        label = f"{self._name}, pair {len(self._timings) + 1} of {self._sizes.pairs}"
        sides = [side("remote"), side(self._rival)]
        self._timings.append(interleave(sides, rounds=self._sizes.rank_rounds, label=label))
        for client in clients.values():
            client.close()

    def results(self) -> Iterator[Result]:
        p50 = [ratio_by_round(pair["remote"].rounds, pair[self._rival].rounds)[0] for pair in self._timings]
        p99 = [pair["remote"].p99 / pair[self._rival].p99 for pair in self._timings]
        yield self._cost(f"{self._name}_p50_vs_{self._rival}", lambda timing: timing.seconds, p50)
        yield self._cost(f"{self._name}_p99_vs_{self._rival}", lambda timing: timing.p99, p99)

    def _cost(self, name: str, figure: Callable[[Timing], float], ratios: list[float]) -> Result:
        by_pair = {which: [figure(timings[which]) * 1e3 for timings in self._timings] for which in self._stages}
        ratio, interval = median_with_interval(ratios)
        some = self._timings[0]["remote"]
        return Result(
            name, *map(statistics.median, by_pair.values()), self._rival_name, ratio, "ms",
            {
                "ratio_is": "median over pairs of processes of ours / rival; at p50, of a pair the median over rounds",
                "ratio_interval_95": interval,
                "ratio_by_pair": ratios, "by_pair_ms": by_pair, "pairs": len(self._timings), "rounds": len(some.turns),
                "calls_a_round": some.calls, "candidates": self._sizes.candidates, "rows": self._sizes.rows,
                "tables": 4, "dim": 64, "threads": 1, "ours_is": "ranker with a CPU host of its own over gRPC",
                "stages_p50_ms": {which: _medians(parts) for which, parts in self._stages.items()},
            } | self._conditions | environment(),
        )  # fmt: skip


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
