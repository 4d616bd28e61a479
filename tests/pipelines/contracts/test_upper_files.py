"""The two files of an upper model are proved before a model is made of them, and nothing else is made into one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_files import load_upper_model, prove_published_model, save_upper_model
from pipelines.contracts.upper_model import UpperModel
from pipelines.contracts.workspace import Workspace
from pipelines.publish import publish
from tests.planted_models import DAMAGES, configured, plant
from tests.releases import write_release
from tests.waiting import PROGRAM_S

CONFIG = UpperConfig(
    tables={"user.kge": 12, "item.kge": 12},
    context=tuple(ContextFeature(view, "events_7d", "log1p") for view in ("user_context", "item_context")),
    tasks=("purchase", "convert"), cross_rank=4, hidden=(16,), dropout=0.5, row_dropout=0.5,
)


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """The folder of a saved model."""
    torch.manual_seed(0)
    save_upper_model(UpperModel(CONFIG), tmp_path / "upper")
    return tmp_path / "upper"


def test_saved_and_loaded_it_scores_the_same_bits(upper: Path) -> None:
    torch.manual_seed(0)
    model = UpperModel(CONFIG).eval()
    rows = {name: torch.randn(5, dim) for name, dim in CONFIG.tables.items()}
    context = torch.randn(5, 2)
    model.set_context_statistics(context)
    save_upper_model(model, upper)
    loaded = load_upper_model(upper)
    assert loaded.config == CONFIG and not loaded.training
    assert torch.equal(loaded(rows, context), model(rows, context))


def test_a_model_without_context_or_layers_is_loaded(tmp_path: Path) -> None:
    config = UpperConfig(tables={"item.kge": 2}, context=(), tasks=("click",), cross_layers=0, hidden=())
    save_upper_model(UpperModel(config), tmp_path)
    assert load_upper_model(tmp_path).config == config


def test_loading_draws_no_random_numbers(upper: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_upper_model(upper)
    assert torch.equal(torch.rand(3), expected)


# a folder alone does not say which tables were published
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "another table's width"])
def test_one_thing_wrong_is_refused_by_its_name(upper: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(upper)
    with pytest.raises(IntegrityError, match=message):
        load_upper_model(upper)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"model\.safetensors is corrupted.*no file"),
        (b"", "expected tensors that fill a safetensors file"),
        (b"\0" * 40, "expected tensors that fill a safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "expected tensors that fill a safetensors file"),
    ],
    ids=["gone", "empty", "zeros", "a header of 2**62 bytes"],
)
def test_what_are_no_weights_is_refused(upper: Path, content: bytes | None, message: str) -> None:
    weights = upper / "model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        load_upper_model(upper)


@pytest.mark.parametrize("change", ["a byte too many", "a byte missing"])
def test_weights_are_the_whole_file(upper: Path, change: str) -> None:
    weights = upper / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content + b"\0" if change == "a byte too many" else content[:-1])
    with pytest.raises(IntegrityError, match="expected tensors that fill a safetensors file"):
        load_upper_model(upper)


class TestPublished:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Workspace:
        workspace = Workspace(tmp_path / "var")
        publish(workspace, write_release(tmp_path / "release", seed=1))
        return workspace

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_files_with_other_bytes_than_the_manifests_are_refused(self, workspace: Workspace, file: str) -> None:
        """Of the same model, well-formed: only the hash tells."""
        directory = workspace.versions.path(1)
        if file == "config.json":
            configured(lambda raw: raw.update(dropout=0.25))(directory / "upper")
        else:
            weights = load_file(directory / "upper" / file)
            save_file({name: tensor + np.float32(1) for name, tensor in weights.items()}, directory / "upper" / file)
        load_upper_model(directory / "upper")
        with pytest.raises(IntegrityError, match=rf"{file} is corrupted: expected sha256 {'[0-9a-f]' * 64}"):
            prove_published_model(workspace.versions.manifest(1), directory)

    def test_a_model_of_other_tables_than_the_manifests_is_refused(self, workspace: Workspace) -> None:
        """Published before anybody compared them: every hash is right."""
        damage, message = DAMAGES["another table's width"]
        plant(workspace, 1, damage)
        with pytest.raises(IntegrityError, match=message):
            prove_published_model(workspace.versions.manifest(1), workspace.versions.path(1))

    def test_what_is_built_is_what_was_proved(self, workspace: Workspace) -> None:
        """Both files are replaced after the proof by those of another model."""
        directory = workspace.versions.path(1)
        published = load_file(directory / "upper/model.safetensors")
        proved = prove_published_model(workspace.versions.manifest(1), directory)
        save_upper_model(UpperModel(CONFIG), directory / "upper")
        state = proved.build().state_dict()
        assert state.keys() == published.keys()
        assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in published.items())


PEAK = """
import json, resource, sys
from pathlib import Path
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.upper_files import load_upper_model

def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

load_upper_model(Path(sys.argv[1]))
before = peak_kb()
try:
    load_upper_model(Path(sys.argv[2]))
except IntegrityError as error:
    print(json.dumps({"grown_kb": peak_kb() - before, "refusal": str(error)}))
"""


def described_as_huge(upper: Path) -> None:
    """As large as a configuration may describe a layer, several times over: 4 GB of weights."""
    configured(lambda raw: raw.update(hidden=[16_384] * 5))(upper)


def huge(upper: Path) -> None:
    """Weights of 4 GB, none of which lie on the disk."""
    os.truncate(upper / "model.safetensors", 4 << 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (DAMAGES["layers of two million units"][0], "units of a hidden layer"),
        (described_as_huge, "parameters: expected at most"),
        (huge, "is too large"),
    ],
    ids=["layers of two million units", "4 GB described", "4 GB of weights"],
)
def test_what_is_refused_takes_no_memory(upper: Path, tmp_path: Path, change, message: str) -> None:
    """The peak of a process that has loaded a model of the same size grows by less than a hundredth of the refused."""
    refused = tmp_path / "refused"
    save_upper_model(load_upper_model(upper), refused)
    change(refused)
    process = subprocess.run(
        [sys.executable, "-c", PEAK, str(upper), str(refused)], capture_output=True, text=True, check=True,
        timeout=PROGRAM_S,
    )
    report = json.loads(process.stdout)
    assert message in report["refusal"] and report["grown_kb"] < 40_000
