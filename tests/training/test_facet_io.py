import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.contracts.errors import IntegrityError, InvalidConfig, InvalidTable
from training.facet_io import load_partial, load_rows, require_export, save_partial, scaled, write_facet

IDS = np.array([30, 10, 20])
WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])


def test_rows_come_back_in_ascending_order_of_ids(tmp_path: Path) -> None:
    write_facet(tmp_path / "f", {"user": (IDS, WEIGHT)}, {"wall_s": 1.0})
    ids, weight = load_rows(tmp_path / "f" / "user.safetensors")
    assert ids.tolist() == [10, 20, 30] and ids.dtype == np.int64
    assert weight.tolist() == [[0.0, 1.0], [6.0, 8.0], [3.0, 4.0]] and weight.dtype == torch.float32
    assert json.loads((tmp_path / "f" / "metrics.json").read_text()) == {"wall_s": 1.0}


def test_a_facet_replaces_one_that_is_there(tmp_path: Path) -> None:
    for factor in (1, 2):
        write_facet(tmp_path / "f", {"user": (IDS, WEIGHT * factor)}, {})
    assert load_rows(tmp_path / "f" / "user.safetensors")[1][0].tolist() == [0.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("ids", "weight"),
    [(IDS, WEIGHT * torch.nan), (np.array([1, 1, 2]), WEIGHT), (np.empty(0, np.int64), torch.empty(0, 2))],
)
def test_what_may_not_be_published_is_not_written(tmp_path: Path, ids: np.ndarray, weight: torch.Tensor) -> None:
    with pytest.raises(InvalidTable):
        write_facet(tmp_path / "f", {"user": (ids, weight)}, {})
    assert not list(tmp_path.iterdir())


def test_scales() -> None:
    assert scaled(WEIGHT, "unit_rows").norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert scaled(WEIGHT, "unit_mean").norm(dim=1).tolist() == pytest.approx([15 / 16, 3 / 16, 30 / 16])
    assert torch.equal(scaled(WEIGHT, "raw"), WEIGHT)
    with pytest.raises(InvalidConfig, match=r"kge\.export"):
        require_export("unit", option="kge.export")


def test_a_corrupted_file_is_one_clear_refusal(tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(IntegrityError, match="pretrain again"):
        load_rows(path)


def test_a_checkpoint_is_only_taken_by_its_own_training(tmp_path: Path) -> None:
    path = tmp_path / "f.partial.safetensors"
    assert load_partial(path, fingerprint="a") is None
    save_partial(path, {"rows": WEIGHT}, {"fingerprint": "a", "curve": [{"epoch": 1}]})
    tensors, progress = load_partial(path, fingerprint="a")
    assert torch.equal(tensors["rows"], WEIGHT) and progress["curve"] == [{"epoch": 1}]
    assert load_partial(path, fingerprint="b") is None
    path.write_bytes(path.read_bytes()[:40])
    assert load_partial(path, fingerprint="a") is None
