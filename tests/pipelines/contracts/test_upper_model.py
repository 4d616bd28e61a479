"""The upper model: its crossing layer against numpy, its inputs, and its files."""

import numpy as np
import pytest
import torch

from pipelines.contracts.context import ContextFeature
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.upper_config import UpperConfig
from pipelines.contracts.upper_files import load_upper_model, save_upper_model
from pipelines.contracts.upper_model import LowRankCross, UpperModel

CONTEXT = (ContextFeature("user_context", "events_7d", "log1p"), ContextFeature("item_context", "events_7d", "log1p"))
CONFIG = UpperConfig(
    tables={"user.kge": 4, "item.kge": 4, "user.contrastive": 2, "item.contrastive": 2}, context=CONTEXT,
    tasks=("click", "convert"), cross_layers=2, cross_rank=3, hidden=(8, 4), dropout=0.5, row_dropout=0.5,
)


def inputs(batch: int = 5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(batch, dim, generator=generator) for name, dim in CONFIG.tables.items()}
    return rows, torch.randn(batch, len(CONTEXT), generator=generator)


def model() -> UpperModel:
    torch.manual_seed(0)
    return UpperModel(CONFIG).eval()


def test_cross_layers_equal_numpy():
    torch.manual_seed(0)
    cross, x0 = LowRankCross(6, layers=3, rank=2), torch.randn(4, 6)
    expected = x0.numpy()
    for down, up in zip(cross.down, cross.up, strict=True):
        v, u, b = (tensor.detach().numpy() for tensor in (down.weight, up.weight, up.bias))
        expected = x0.numpy() * (expected @ v.T @ u.T + b) + expected
    np.testing.assert_allclose(cross(x0).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_cross_layer_golden_number():
    cross = LowRankCross(2, layers=1, rank=1)
    with torch.no_grad():
        cross.down[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        cross.up[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        cross.up[0].bias.copy_(torch.tensor([0.5, 0.0]))
    # V x = 1*3 + 2*4 = 11; U (V x) + b = (11.5, -11); x0 * that + x0 = (3*12.5, 4*-10)
    torch.testing.assert_close(cross(torch.tensor([[3.0, 4.0]])), torch.tensor([[37.5, -40.0]]))


def test_without_crossing_or_hidden_layers_it_is_linear_in_the_features():
    config = UpperConfig(tables={"user.kge": 2}, context=CONTEXT, tasks=("click",), cross_layers=0, hidden=())
    linear = UpperModel(config)
    rows, context = {"user.kge": torch.randn(3, 2)}, torch.zeros(3, 2)
    doubled = linear({"user.kge": rows["user.kge"] * 2}, context)
    plain, none = linear(rows, context), linear({"user.kge": torch.zeros(3, 2)}, context)
    torch.testing.assert_close(doubled - none, 2 * (plain - none))


def test_the_dot_product_of_each_facet_is_an_input():
    assert CONFIG.facet_pairs == [("user.contrastive", "item.contrastive"), ("user.kge", "item.kge")]
    assert CONFIG.input_dim == 12 + 2 + 4
    upper, (rows, context) = model(), inputs()
    seen = []
    upper.deep.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    upper(rows, context)
    expected = [(rows[f"user.{facet}"] * rows[f"item.{facet}"]).sum(1) for facet in ("contrastive", "kge")]
    torch.testing.assert_close(seen[0][:, 12:14], torch.stack(expected, dim=1))


def test_missing_context_is_flagged_and_standard_context_is_centred():
    upper, (rows, _) = model(), inputs(3)
    upper.set_context_statistics(torch.tensor([[1.0, 10.0], [3.0, np.nan], [5.0, 30.0]]))
    torch.testing.assert_close(upper.context_mean, torch.tensor([3.0, 20.0]))
    torch.testing.assert_close(upper.context_std, torch.tensor([np.sqrt(8 / 3), 10.0], dtype=torch.float32))
    seen = []
    upper.deep.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    upper(rows, torch.tensor([[3.0, 30.0], [np.nan, np.nan], [3.0, 20.0]]))
    torch.testing.assert_close(seen[0][:, 14:], torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]))
    assert torch.isfinite(upper(rows, torch.full((3, 2), np.nan))).all()


def test_a_score_does_not_depend_on_its_batch():
    upper, (rows, context) = model(), inputs(6)
    together = upper(rows, context)
    alone = torch.cat([upper({n: r[i : i + 1] for n, r in rows.items()}, context[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_dropout_acts_only_in_training():
    upper, (rows, context) = model(), inputs()
    torch.testing.assert_close(upper(rows, context), upper(rows, context))
    upper.train()
    assert not torch.equal(upper(rows, context), upper(rows, context))


def test_saved_and_loaded_it_scores_the_same_bits(tmp_path):
    upper, (rows, context) = model(), inputs()
    upper.set_context_statistics(context)
    save_upper_model(upper, tmp_path / "upper")
    loaded = load_upper_model(tmp_path / "upper")
    assert loaded.config == upper.config and not loaded.training
    assert torch.equal(loaded(rows, context), upper(rows, context))


@pytest.mark.parametrize("spoil", ["missing table", "wrong width", "wrong context"])
def test_inputs_that_do_not_fit_are_refused(spoil):
    upper, (rows, context) = model(), inputs()
    if spoil == "missing table":
        del rows["item.kge"]
    elif spoil == "wrong width":
        rows["item.kge"] = torch.zeros(5, 3)
    else:
        context = torch.zeros(5, 3)
    with pytest.raises(InvalidConfig, match="upper model input"):
        upper(rows, context)
