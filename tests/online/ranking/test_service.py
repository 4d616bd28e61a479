"""The ranker over a real channel: the scores of exactly one version, or a typed refusal."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.row_source import ALL, VersionRows
from online.lookup.same_host import FetchedRows, SameHostRows
from online.observe import metrics
from online.proto import rank_pb2, rank_pb2_grpc
from online.ranking.client import RankClient
from online.ranking.context_source import ContextSource, FeastContext
from online.ranking.scorer import Scorer
from online.ranking.service import RankService, RunnableModels
from online.ranking.verify import OfflineVersion
from online.rpc.channel import open_channel
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from pipelines.contracts.context import CONTEXT_FEATURES, context_matrix
from pipelines.contracts.errors import IntegrityError
from tests.holding import holding
from tests.online.observe.scrapes import rows_counted
from tests.releases import AS_OF, DIMS, TASKS, entity_ids
from tests.waiting import PATIENCE_S, until

NOW = AS_OF.timestamp() + 3600.0
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tier(workspace_with_versions, host_cpu_tier):
    return host_cpu_tier(workspace_with_versions.workspace, (1, 2))


@pytest.fixture(scope="module")
def ranker(workspace_with_versions, tier, host_ranker):
    return host_ranker(workspace_with_versions, [tier.address], (1, 2))


@pytest.fixture(scope="module")
def client(ranker):
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(workspace_with_versions):
    """(version, user, items) -> probabilities, without any server."""
    workspace = workspace_with_versions.workspace
    versions = {number: OfflineVersion(workspace, number) for number in (1, 2)}
    context = FeastContext(workspace.feature_repo, CONTEXT_FEATURES)

    def score(version: int, user: int, items: np.ndarray) -> np.ndarray:
        users = np.full(len(items), user)
        columns = context.columns(CONTEXT_FEATURES, users=users, items=items)
        matrix = context_matrix(CONTEXT_FEATURES, columns, np.full(len(items), NOW))
        return versions[version].scores(users, items, matrix)

    return score


@pytest.mark.parametrize("version", [1, 2])
def test_scores_are_the_offline_scores_of_the_named_version(version, tier, client, offline) -> None:
    tier.state.promote(version)
    users, items = entity_ids("user", 200), entity_ids("item", 200)
    for user in (users[0], users[99], -1):
        candidates = np.concatenate([items[:30], [-3, 2**62]])
        answer = client.rank(int(user), candidates, now_seconds=NOW)
        assert answer.version == version and answer.tasks == TASKS and answer.scores.shape == (32, 2)
        np.testing.assert_allclose(answer.scores, offline(version, user, candidates), atol=TOLERANCE)
        other = np.abs(answer.scores - offline(3 - version, user, candidates)).max()
        assert other > 100 * TOLERANCE, "the versions' scores must differ for this test to say anything"
        assert answer.found == {
            "user.contrastive": float(user != -1), "user.kge": float(user != -1),
            "item.contrastive": 30 / 32, "item.kge": 30 / 32,
        }
        assert {"lookup_ms", "context_ms", "model_ms", "total_ms"} <= set(answer.timing_ms)
    tier.state.promote(1)


def test_requests_worked_on_together_are_answered_as_if_alone(tier, client, offline) -> None:
    """Many threads while the preferred version changes: each answer is its own user's, of the version that it names."""
    users, items = entity_ids("user", 200), entity_ids("item", 200)
    before = _batches("score")

    def ask(thread: int) -> set[int]:
        random, versions = np.random.default_rng(thread), set()
        for turn in range(15):
            if thread == 0:
                tier.state.promote(1 + turn % 2)
            user, candidates = int(random.choice(users)), random.choice(items, random.integers(1, 12))
            answer = client.rank(user, candidates, now_seconds=NOW)
            np.testing.assert_allclose(answer.scores, offline(answer.version, user, candidates), atol=TOLERANCE)
            versions.add(answer.version)
        return versions

    with ThreadPoolExecutor(8) as pool:
        assert set.union(*pool.map(ask, range(8))) == {1, 2}
    tier.state.promote(1)
    passes, requests = np.subtract(_batches("score"), before)
    assert requests == 8 * 15 and passes < requests, "nothing was combined, so this test says nothing"


def _batches(what: str) -> tuple[float, float]:
    names = ("facet_batch_size_count", "facet_batch_size_sum")
    return tuple(metrics.registry.get_sample_value(name, {"what": what}) or 0.0 for name in names)


def test_the_context_and_the_moment_reach_the_model(client) -> None:
    user, items = int(entity_ids("user", 200)[0]), entity_ids("item", 200)[:8]
    soon, late = (client.rank(user, items, now_seconds=NOW + days * 86_400).scores for days in (0, 500))
    assert np.abs(soon - late).max() > 1e-3


def test_a_version_without_its_model_is_never_scored(workspace_with_versions, host_cpu_tier, host_ranker) -> None:
    tier = host_cpu_tier(workspace_with_versions.workspace, (2,))
    ranker = host_ranker(workspace_with_versions, [tier.address], (1,))
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    with pytest.raises(RpcError) as caught:
        client.rank(1, np.array([1]), now_seconds=NOW)
    assert caught.value.code is Code.VERSION_NOT_AVAILABLE and caught.value.versions == (2,)
    ranker.state.load(2)
    assert client.rank(1, np.array([1]), now_seconds=NOW).version == 2
    client.close()


def test_the_same_number_with_another_manifest_is_refused(own_workspace, tier, host_ranker) -> None:
    """A ranker over another workspace, whose version 1 was published anew: same number, other rows."""
    import shutil

    from pipelines.publish import publish
    from tests.releases import write_release

    workspace = own_workspace.workspace
    shutil.rmtree(workspace.root / "versions")
    publish(workspace, write_release(own_workspace.root / "again", seed=77))
    ranker = host_ranker(own_workspace, [tier.address], (1,))
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    with pytest.raises(RpcError) as caught:
        client.rank(1, np.array([1]), now_seconds=NOW)
    assert caught.value.code is Code.VERSION_MISMATCH and caught.value.status is grpc.StatusCode.INTERNAL
    client.close()


def test_versions_with_other_tables_run_side_by_side(own_workspace, host_cpu_tier, host_ranker) -> None:
    """Which of them answers is the CPU tier's choice, as among versions with the same tables."""
    import json

    from pipelines.contracts.upper_config import UpperConfig
    from pipelines.contracts.upper_files import save_upper_model
    from pipelines.contracts.upper_model import UpperModel
    from pipelines.publish import publish
    from tests.releases import write_release

    release = write_release(own_workspace.root / "fewer", seed=3)
    dims = {name: dim for name, dim in DIMS.items() if name != "user.kge"}
    content = json.loads((release / "release.json").read_text())
    content["tables"] = [table for table in content["tables"] if table["name"] in dims]
    (release / "release.json").write_text(json.dumps(content))
    (release / "tables" / "user.kge.parquet").unlink()
    save_upper_model(
        UpperModel(UpperConfig(dims, CONTEXT_FEATURES, TASKS, cross_rank=4, hidden=(16,))), release / "upper"
    )
    publish(own_workspace.workspace, release)
    own_workspace.apply()
    own_workspace.materialize([f"{name.replace('.', '_')}__v3" for name in dims])
    tier = host_cpu_tier(own_workspace.workspace, (1,))
    ranker = host_ranker(own_workspace, [tier.address], (1, 3))
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    assert client.rank(1, np.array([1]), now_seconds=NOW).version == 1
    tier.state.load(3)
    answer = client.rank(1, np.array([1]), now_seconds=NOW)
    assert answer.version == 1 and set(answer.found) == set(DIMS)
    tier.state.promote(3, 0.4)
    for number in range(20):
        answer = client.rank(1, np.array([1]), now_seconds=NOW, request_id=f"request-{number}")
        canarys = zlib.crc32(f"request-{number}".encode()) / 2**32 < 0.4
        assert (answer.version, set(answer.found)) == ((3, set(dims)) if canarys else (1, set(DIMS)))
    tier.state.promote(3)
    answer = client.rank(1, np.array([1]), now_seconds=NOW)
    assert answer.version == 3 and set(answer.found) == set(dims)
    client.close()


def test_rows_that_cannot_be_read_are_a_failure_of_their_version(
    workspace_with_versions, host_cpu_tier, host_ranker, monkeypatch
) -> None:
    """So that a canary is judged by it."""
    tier = host_cpu_tier(workspace_with_versions.workspace, (1, 2))
    ranker = host_ranker(workspace_with_versions, [tier.address], (1, 2))
    tier.state.promote(2)
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)

    def unreadable(ids: np.ndarray) -> None:
        raise IntegrityError("rows", expected="what was written", got="something else", remedy="Write them again.")

    monkeypatch.setattr(tier.state._hosted[2].reader.tables["item.kge"], "lookup", unreadable)
    with pytest.raises(RpcError) as caught:
        client.rank(1, np.array([1]), now_seconds=NOW)
    assert caught.value.code is Code.INTEGRITY and caught.value.versions == (2,)
    status = ranker.state.status()
    assert (status.failed, [(model.version, model.failed) for model in status.models]) == (0, [(1, 0), (2, 1)])
    client.close()


def test_an_idle_ranker_shows_that_it_is_idle(ranker) -> None:
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    client.rank(1, np.array([1]), now_seconds=NOW)
    with pytest.raises(RpcError):
        client.rank(1, np.array([], np.int64))
    client.close()

    def in_flight() -> float | None:
        metrics.flush()
        return metrics.registry.get_sample_value("facet_in_flight", {"service": "rank"})

    until(lambda: in_flight() == 0)


def test_unloading_never_breaks_a_request_under_way(ranker, workspace_with_versions) -> None:
    pinned = ranker.state.pin()
    ranker.state.unload(2)
    assert sorted(pinned) == [1, 2] and sorted(ranker.state.pin()) == [1]
    assert pinned[2].model is not None
    with pytest.raises(RpcError) as caught:
        ranker.state.unload(1)
    assert caught.value.code is Code.LAST_VERSION
    ranker.state.load(2)


def test_without_a_cpu_tier_it_refuses_in_bounded_time_and_recovers(
    workspace_with_versions, host_cpu_tier, host_ranker
) -> None:
    first = host_cpu_tier(workspace_with_versions.workspace, (1,))
    address = first.address
    ranker = host_ranker(workspace_with_versions, [address], (1,))
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    assert client.rank(1, np.array([1]), now_seconds=NOW).version == 1
    first.stop()
    with pytest.raises(RpcError) as caught:
        client.rank(1, np.array([1]), now_seconds=NOW)
    assert caught.value.code is Code.LOOKUP_UNAVAILABLE and caught.value.status is grpc.StatusCode.UNAVAILABLE
    host_cpu_tier(workspace_with_versions.workspace, (1,), port=first.endpoint.port)

    def answered() -> bool:
        try:
            return client.rank(1, np.array([1]), now_seconds=NOW).version == 1
        except RpcError as refusal:  # until the next attempt to connect, up to a second away
            assert refusal.code is Code.LOOKUP_UNAVAILABLE
            return False

    until(answered)
    client.close()


class Ones(ContextSource):
    """The same context for everybody; none for user -7."""

    def columns(self, features, *, users, items):
        if users[0] == -7:
            raise ValueError("unfit")
        return {feature.key: np.ones(len(users)) for feature in features}


@pytest.fixture
def serve(workspace_with_versions):
    """Call with versions and a function of (models, hosted) that gives the row source: models, client."""
    running = []

    def start(versions, source_of, *, slots=16, queue=64, **named):
        workspace = workspace_with_versions.workspace
        models = RunnableModels(lambda version: Scorer.load(workspace, version, device="cpu"), context=Ones())
        hosted = HostedVersions(lambda version: VersionReader.open(workspace, version))
        for version in versions:
            models.load(version)
            hosted.load(version)
        endpoint = Endpoint("rank", "127.0.0.1", 0, slots, queue)
        service = RankService(models, source_of(models, hosted), Ones(), timeout_s=PATIENCE_S, **named)
        service.add_to(endpoint.server)
        endpoint.start()
        running.append((endpoint, RankClient(f"127.0.0.1:{endpoint.port}", timeout_s=PATIENCE_S)))
        return models, running[-1][1], endpoint

    yield start
    for endpoint, client in running:
        client.close()
        assert endpoint.stop().wait(PATIENCE_S)


class Shifting(SameHostRows):
    """Rows that are refused while `steps` are left; each refusal comes after the models have changed by one step."""

    def __init__(self, hosted, steps) -> None:
        super().__init__(hosted)
        self.steps, self.asked = steps, []

    def start(self, accepted, ids, *, only=ALL, request_id="", timeout_s=None):
        self.asked.append(sorted(accepted))
        if self.steps:
            self.steps.pop(0)()
            accepted = [99]
        return super().start(accepted, ids, only=only, request_id=request_id, timeout_s=timeout_s)


def test_models_that_change_under_a_request_are_pinned_anew_however_often(serve) -> None:
    """A rollout loads 2, and then unloads 1, each while the request waits for rows of what it had pinned."""
    sources = []

    def source(models, hosted):
        hosted.load(2)
        sources.append(Shifting(hosted, [lambda: models.load(2), lambda: models.unload(1)]))
        return sources[-1]

    _, client, _ = serve([1], source)
    assert client.rank(1, np.array([1]), now_seconds=NOW).version == 2
    assert sources[0].asked == [[1], [1, 2], [2]]
    sources[0].steps = [lambda: None]
    with pytest.raises(RpcError) as caught:
        client.rank(1, np.array([1]), now_seconds=NOW)
    assert caught.value.code is Code.VERSION_NOT_AVAILABLE and len(sources[0].asked) == 4, "unchanged: asked only once"


class Damaged(SameHostRows):
    """Rows of which a table is missing, for user -8; none at all for user -9."""

    def start(self, accepted, ids, *, only=ALL, request_id="", timeout_s=None):
        if ids["user.kge"][0] == -9:
            refusal = {"expected": "a CPU host", "got": "none", "remedy": "Start one."}
            return FetchedRows(RpcError(Code.LOOKUP_UNAVAILABLE, "rows", **refusal))
        pending = super().start(accepted, ids, only=only, request_id=request_id, timeout_s=timeout_s)
        if ids["user.kge"][0] != -8:
            return pending
        rows = pending.result()
        less = {name: packed for name, packed in rows.rows.items() if name != "item.kge"}
        return FetchedRows(VersionRows(rows.version, rows.manifest_sha256, less, rows.found))


def test_what_became_of_requests_is_counted_by_version(serve) -> None:
    models, client, _ = serve([1, 2], lambda models, hosted: Damaged(hosted))
    for user in (1, 2, 3):
        client.rank(user, np.array([1]), now_seconds=NOW)
    for user, code in ((-7, Code.INTERNAL), (-8, Code.INTERNAL), (-9, Code.LOOKUP_UNAVAILABLE)):
        with pytest.raises(RpcError) as caught:
            client.rank(user, np.array([1]), now_seconds=NOW)
        assert caught.value.code is code
    with pytest.raises(RpcError):
        client.rank(1, np.array([], np.int64))
    status = models.status()
    first, second = status.models
    assert (first.version, first.answered, first.failed) == (1, 3, 2)
    assert (second.version, second.answered, second.failed) == (2, 0, 0)
    assert status.failed == 1, "the one without rows; what was asked wrongly is no failure of a version"
    assert len(first.latency_counts) == len(status.latency_bounds_ms) + 1 and sum(first.latency_counts) == 3
    assert list(status.latency_bounds_ms) == sorted(status.latency_bounds_ms)


def test_rows_are_counted_as_asked_for_and_found(serve) -> None:
    _, client, _ = serve([1], lambda models, hosted: SameHostRows(hosted))  # which counts none itself
    users, items = entity_ids("user", 200)[:2], entity_ids("item", 200)[:5]
    before = rows_counted()
    for user in (*users, -3):
        client.rank(int(user), np.append(items, [-5, -6]), now_seconds=NOW)
    with pytest.raises(RpcError):
        client.rank(-7, items, now_seconds=NOW)  # has no context: it is not scored
    assert rows_counted() - before == {
        ("asked", "user.kge"): 3, ("found", "user.kge"): 2, ("asked", "item.kge"): 3 * 7, ("found", "item.kge"): 3 * 5,
        ("asked", "user.contrastive"): 3, ("found", "user.contrastive"): 2,
        ("asked", "item.contrastive"): 3 * 7, ("found", "item.contrastive"): 3 * 5,
    }  # fmt: skip


def test_what_is_too_much_is_refused_and_not_counted_as_a_failure(serve) -> None:
    models, client, endpoint = serve([1], lambda models, hosted: SameHostRows(hosted), slots=1, queue=1)
    with ThreadPoolExecutor(1) as pool:
        with holding(endpoint):
            waiting = pool.submit(client.rank, 1, np.array([1]), now_seconds=NOW)
            until(lambda: endpoint.admission.waiting == 1)
            with pytest.raises(RpcError) as caught:
                client.rank(1, np.array([1]), now_seconds=NOW)
            assert caught.value.code is Code.OVERLOADED
        assert waiting.result().version == 1
    answer = client.rank(1, np.array([1]), now_seconds=NOW)
    assert answer.version == 1 and answer.timing_ms["total_ms"] > 0
    assert models.status().failed == 0 and models.status().models[0].failed == 0


@pytest.fixture(scope="module")
def stub(ranker):
    with open_channel(ranker.address) as channel:
        yield rank_pb2_grpc.RankStub(channel)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (rank_pb2.RankRequest(user=1, candidates=b""), Code.MALFORMED_IDS),
        (rank_pb2.RankRequest(user=1, candidates=b"1234567"), Code.MALFORMED_IDS),
        (rank_pb2.RankRequest(user=1, candidates=bytes(8 * 257)), Code.BATCH_TOO_LARGE),
        (rank_pb2.RankRequest(user=1, candidates=bytes(8), now_seconds=float("nan")), Code.INVALID_TIME),
        (rank_pb2.RankRequest(user=1, candidates=bytes(8), now_seconds=-1.0), Code.INVALID_TIME),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else "",
)
def test_typed_refusals(stub, request_, code) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Rank(request_, timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["facet-error"] == code.name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    user=st.integers(-(2**63), 2**63 - 1), candidates=st.binary(max_size=64), now=st.floats(),
    request_id=st.text(max_size=20),
)
def test_any_request_is_scored_or_refused_with_a_code(stub, user, candidates, now, request_id) -> None:
    request = rank_pb2.RankRequest(request_id=request_id, user=user, candidates=candidates, now_seconds=now)
    try:
        answer = stub.Rank(request, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        assert Code[dict(error.trailing_metadata())["facet-error"]].status is grpc.StatusCode.INVALID_ARGUMENT
    else:
        scores = np.frombuffer(answer.scores, "<f4")
        assert len(scores) == len(candidates) // 8 * len(answer.tasks) and np.isfinite(scores).all()
