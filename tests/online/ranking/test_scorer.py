"""Dequantization with FBGEMM against the codecs; a scorer refuses what its manifest does not name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.lookup.row_source import VersionRows
from online.ranking.scorer import Scorer, ToScore, dequantize
from online.ranking.verify import TOLERANCE
from online.rpc_error import Code, RpcError
from pipelines.contracts.context import CONTEXT_FEATURES
from pipelines.contracts.errors import IntegrityError, VersionNotFound
from pipelines.contracts.rowcodec import CODEC_NAMES, codec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from tests.planted_models import DAMAGES, plant
from tests.releases import write_release


@settings(max_examples=40, deadline=None)
@given(
    quantization=st.sampled_from(CODEC_NAMES), dim=st.integers(1, 33), rows=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_fbgemm_dequantizes_what_the_codec_encodes(quantization, dim, rows, seed) -> None:
    packed = codec(quantization).encode(np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32))
    default = packed[:1].tobytes().hex()
    spec = TableSpec("item.kge", dim, rows, quantization, "vocabulary", default)
    got = dequantize(packed, spec, device="cpu").numpy()
    assert got.shape == (rows, dim) and got.dtype == np.float32
    np.testing.assert_allclose(got, codec(quantization).decode(packed, dim), rtol=1e-6, atol=1e-6)


def test_rows_that_may_not_be_written_to_are_read() -> None:
    packed = np.frombuffer(codec("int4").encode(np.ones((2, 4), np.float32)).tobytes(), np.uint8).reshape(2, -1)
    spec = TableSpec("item.kge", 4, 2, "int4", "vocabulary", packed[0].tobytes().hex())
    np.testing.assert_allclose(dequantize(packed, spec, device="cpu").numpy(), 1.0)


@pytest.mark.parametrize("quantization", CODEC_NAMES)
@pytest.mark.parametrize("wider", [-1, 1, 2, 1000])
def test_rows_of_another_width_are_refused(quantization, wider) -> None:
    row_bytes = codec(quantization).row_bytes(4)
    spec = TableSpec("item.kge", 4, 2, quantization, "vocabulary", bytes(row_bytes).hex())
    with pytest.raises(RpcError, match=f"expected {row_bytes} bytes each") as caught:
        dequantize(np.zeros((2, row_bytes + wider), np.uint8), spec, device="cpu")
    assert caught.value.code is Code.VERSION_MISMATCH


def test_an_altered_upper_model_is_not_loaded(own_workspace) -> None:
    workspace = own_workspace.workspace
    weights = workspace.versions.path(1) / "upper" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"model\.safetensors is corrupted"):
        Scorer.load(workspace, 1, device="cpu")
    assert Scorer.load(workspace, 2, device="cpu").version == 2


def test_an_unpublished_version_is_not_loaded(workspace_with_versions) -> None:
    with pytest.raises(VersionNotFound):
        Scorer.load(workspace_with_versions.workspace, 9, device="cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Workspace:
    root = tmp_path_factory.mktemp("published")
    publish(Workspace(root / "var"), write_release(root / "release", seed=1))
    return Workspace(root / "var")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_published_model_that_cannot_run_is_not_loaded(published, tmp_path, damage) -> None:
    """As a version may be that was published before models were proved."""
    workspace = Workspace(Path(shutil.copytree(published.root, tmp_path / "var")))
    apply, message = DAMAGES[damage]
    plant(workspace, 1, apply)
    with pytest.raises(IntegrityError, match=message):
        Scorer.load(workspace, 1, device="cpu")


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_requests_scored_together_score_as_alone(scorer, counts, seed) -> None:
    random = np.random.default_rng(seed)

    def request(count: int) -> ToScore:
        rows = {
            name: codec(spec.quantization).encode(
                random.normal(size=(1 if spec.entity == "user" else count, spec.dim)).astype(np.float32)
            )
            for name, spec in scorer.tables.items()
        }
        columns = {feature.key: random.exponential(5.0, count) for feature in CONTEXT_FEATURES}
        columns["item_context__events_7d"][0] = np.nan
        found = {name: np.ones(len(packed), bool) for name, packed in rows.items()}
        now_seconds = 1.4e9 + random.integers(9e6)
        return ToScore(VersionRows(1, scorer.manifest_sha256, rows, found), columns, count, now_seconds)

    requests = [request(count) for count in counts]
    together = scorer.score(requests)
    assert [scored.scores.shape for scored in together] == [(count, 2) for count in counts]
    for one, scored in zip(requests, together, strict=True):
        np.testing.assert_allclose(scored.scores, scorer.score([one])[0].scores, atol=TOLERANCE / 10)


@pytest.fixture(scope="module")
def scorer(workspace_with_versions) -> Scorer:
    return Scorer.load(workspace_with_versions.workspace, 1, device="cpu")
