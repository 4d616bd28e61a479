import numpy as np
import pytest
import torch
from torch import nn

from pipelines.contracts.errors import InvalidConfig, InvalidTable
from training.tables import EmbeddingTables, Processes, ShardedModel, TableOptions, TableShape, process_group

LEARNING_RATE, EPS = 0.1, 1e-8


class Sum(nn.Module):
    """Sum of weighted rows: the gradient of a row is the sum of the weights of its lookups."""

    def __init__(self, shapes: list[TableShape]) -> None:
        super().__init__()
        self.tables = EmbeddingTables(shapes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, ids: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = self.tables(ids)
        return self.gain * sum((rows[name] * weights[name].unsqueeze(-1)).sum() for name in ids)


def two_tables() -> list[TableShape]:
    return [TableShape("user.kge", 5, 4, ("user",)), TableShape("item.kge", 7, 4, ("item", "pool"))]


def model(processes: Processes, **options: str) -> ShardedModel:
    made = ShardedModel(Sum(two_tables()), TableOptions(**options), learning_rate=LEARNING_RATE, processes=processes)
    made.load_rows("user.kge", torch.arange(20.0).reshape(5, 4))
    made.load_rows("item.kge", -torch.arange(28.0).reshape(7, 4))
    return made


IDS = {"user": torch.tensor([[0, 4], [4, 1]]), "item": torch.tensor([6, 6, 2]), "pool": torch.tensor([6])}
WEIGHTS = {"user": torch.ones(2, 2), "item": torch.tensor([1.0, 2.0, -1.0]), "pool": torch.tensor([0.5])}


def test_lookups_keep_the_shape_of_their_ids() -> None:
    with process_group() as processes:
        rows = model(processes).module.tables(IDS)
        assert {name: tuple(value.shape) for name, value in rows.items()} == {
            "user": (2, 2, 4), "item": (3, 4), "pool": (1, 4)
        }
        assert rows["user"][1, 0].tolist() == [16.0, 17.0, 18.0, 19.0]
        assert rows["pool"][0].tolist() == [-24.0, -25.0, -26.0, -27.0]


def test_a_step_is_row_wise_adagrad_over_all_lookups_of_a_row() -> None:
    with process_group() as processes:
        made = model(processes)
        before = made.gather_rows("item.kge").numpy()
        for _ in range(2):
            made(IDS, WEIGHTS).backward()
        after = made.gather_rows("item.kge").numpy()
    gradient = np.zeros((7, 4))
    for name in ("item", "pool"):
        np.add.at(gradient, IDS[name].numpy(), WEIGHTS[name].numpy()[:, None])
    expected, accumulated = before.astype(float), np.zeros(7)
    for _ in range(2):
        accumulated += (gradient**2).mean(1)  # row-wise Adagrad: s += mean(g^2), W -= lr / (sqrt(s) + eps) g
        expected -= LEARNING_RATE / (np.sqrt(accumulated)[:, None] + EPS) * gradient
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    assert (after[[0, 1, 3, 4, 5]] == before[[0, 1, 3, 4, 5]]).all()


def test_learning_rate_can_change() -> None:
    with process_group() as processes:
        made = model(processes)
        made.set_learning_rate(0.0)
        before = made.gather_rows("user.kge")
        made(IDS, WEIGHTS).backward()
        assert torch.equal(made.gather_rows("user.kge"), before)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(optimizer: str) -> None:
    with process_group() as processes:
        straight, broken = model(processes, optimizer=optimizer), model(processes, optimizer=optimizer)
        for made in (straight, broken):
            made(IDS, WEIGHTS).backward()
        state = broken.gather_state()
        resumed = model(processes, optimizer=optimizer)
        resumed.load_state(state)
        for made in (straight, resumed):
            made(IDS, WEIGHTS).backward()
        for table in ("user.kge", "item.kge"):
            assert torch.equal(straight.gather_rows(table), resumed.gather_rows(table))


def test_first_rows_depend_on_seed_and_table_only() -> None:
    with process_group() as processes:
        made = ShardedModel(
            Sum([TableShape("a", 70_000, 4, ("a",)), TableShape("b", 70_000, 4, ("b",))]), TableOptions(),
            learning_rate=0.1, processes=processes,
        )
        drawn = []
        for table, seed in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
            made.init_rows(table, std=0.5, seed=seed)
            drawn.append(made.gather_rows(table))
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(0.5, rel=0.01)
    assert len(torch.unique(drawn[0][:, 0])) > 69_000  # no block of rows repeats another


def test_dense_parameters_are_those_outside_the_tables() -> None:
    with process_group() as processes:
        made = model(processes)
        assert [tuple(parameter.shape) for parameter in made.dense_parameters()] == [()]
        made(IDS, WEIGHTS).backward()
        assert made.dense_parameters()[0].grad.abs() > 0


def test_groups_nest_and_close() -> None:
    with process_group() as outer, process_group() as inner:
        assert inner == outer
    assert not torch.distributed.is_initialized()


def test_bad_options_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"tables\.optimizer"):
        TableOptions(optimizer="adamw")
    with pytest.raises(InvalidConfig, match=r"tables\.sharding"):
        TableOptions(sharding="columns")
    with pytest.raises(InvalidConfig, match=r"tables\.eps"):
        TableOptions(eps=0.0)
    with pytest.raises(InvalidConfig, match="at least one row"):
        TableShape("user", 0, 4, ("user",))
    with pytest.raises(InvalidConfig, match="at least one row"):
        TableShape("user", 4, 0, ("user",))
    with pytest.raises(InvalidConfig, match="a multiple of 4"):
        TableShape("user", 4, 6, ("user",))
    with pytest.raises(InvalidConfig, match="each feature name in one table"):
        EmbeddingTables([TableShape("a", 2, 4, ("x",)), TableShape("b", 2, 4, ("x",))])
    with pytest.raises(InvalidConfig, match="a multiple of the 2 processes"):
        Processes(0, 2, torch.device("cpu")).share(3, option="groups")


@pytest.mark.skipif(torch.cuda.is_available(), reason="FBGEMM has a fused Adam on GPUs")
def test_fused_adam_is_refused_on_a_cpu() -> None:
    with process_group() as processes, pytest.raises(InvalidConfig, match="needs a GPU"):
        model(processes, optimizer="adam")


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.full((5, 4), torch.nan)])
def test_rows_that_do_not_fit_are_refused(weight: torch.Tensor) -> None:
    with process_group() as processes:
        made = model(processes)
        with pytest.raises(InvalidTable, match=r"user\.kge"):
            made.load_rows("user.kge", weight)
