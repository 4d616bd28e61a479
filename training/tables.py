"""Embedding tables on TorchRec: sharded over processes, updated by FBGEMM's fused optimizers inside the backward pass.

One process needs no launcher; under `torchrun` the same code shares the rows out. Both start from the same rows.

>>> import torch
>>> class Dot(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.tables = EmbeddingTables(
...             [TableShape("user.kge", 5, 4, ("user",)), TableShape("item.kge", 6, 4, ("item",))]
...         )
...     def forward(self, user, item):                              # int64 (B,), (B,)
...         rows = self.tables({"user": user, "item": item})        # {"user": (B, D), "item": (B, D)}
...         return (rows["user"] * rows["item"]).sum(-1)            # (B,)
>>> with process_group() as processes:
...     model = ShardedModel(Dot(), TableOptions(), learning_rate=0.1, processes=processes)
...     model.init_rows("item.kge", std=0.1, seed=0)
...     model.load_rows("user.kge", torch.ones(5, 4))
...     loss = model(torch.tensor([0, 4]), torch.tensor([1, 1])).sum()
...     loss.backward()                                             # the rows are updated here
...     moved = (model.gather_rows("user.kge") != 1).any(1)
>>> moved.tolist()
[True, False, False, False, True]
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.distributed as dist
from numpy.random import SeedSequence
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

# TorchRec and torch announce at import and planning time what is normal here (no CUDA, a hand-made plan).
for _name in ("torchrec", "torch.fx._symbolic_trace"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# FBGEMM logs every library it loads on the root logger.
logging.getLogger().addFilter(lambda record: record.levelno > logging.INFO or "fbgemm" not in record.pathname)
for _message in (".*ShardedTensor", ".*broadcast_buffers"):
    warnings.filterwarnings("ignore", message=_message, category=FutureWarning)

from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor  # noqa: E402
from torchrec.distributed import DistributedModelParallel  # noqa: E402
from torchrec.distributed.embedding import EmbeddingCollectionSharder  # noqa: E402
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise  # noqa: E402
from torchrec.distributed.types import ShardingPlan  # noqa: E402
from torchrec.optim import RowWiseAdagrad  # noqa: E402
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward  # noqa: E402

from pipelines.contracts.errors import InvalidConfig, InvalidTable  # noqa: E402

__all__ = ["EmbeddingTables", "Processes", "ShardedModel", "TableOptions", "TableShape", "process_group"]

OPTIMIZERS = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}
SHARDINGS = ("row_wise", "table_wise")
INIT_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class TableOptions:
    """Section `tables` of the configuration.

    Raises:
        InvalidConfig: an unknown optimizer or sharding, or an eps that is not positive.
    """

    optimizer: str = "rowwise_adagrad"
    eps: float = 1e-8
    sharding: str = "row_wise"

    def __post_init__(self) -> None:
        for key, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("sharding", self.sharding, SHARDINGS)):
            if value not in known:
                raise InvalidConfig(
                    f"tables.{key}", expected=f"one of {', '.join(known)}", got=repr(value), remedy="Choose one."
                )
        if self.eps <= 0:
            raise InvalidConfig("tables.eps", expected="more than 0", got=str(self.eps), remedy="Try 1.0e-8.")


@dataclass(frozen=True)
class TableShape:
    """One table: `rows` rows of `dim` fp32 numbers, looked up under the names in `features`.

    Attributes:
        name: such as `item.kge`; unique in its model.
        features: names of the id tensors that index it; a name belongs to one table only.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.dim <= 0:
            raise InvalidConfig(
                f"table {self.name}", expected="at least one row and one column", got=f"{self.rows} x {self.dim}",
                remedy="Correct `dim`, or check that the data is not empty.",
            )
        if self.dim % 4:
            raise InvalidConfig(
                f"table {self.name}", expected="a dim that is a multiple of 4, as FBGEMM asks", got=str(self.dim),
                remedy="Round it up.",
            )

    @property
    def module_name(self) -> str:
        """The name inside torch modules, where a dot is not allowed."""
        return self.name.replace(".", "__")


@dataclass(frozen=True)
class Processes:
    """The processes that train together: this one's rank, their number, and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        dist.barrier()

    def share(self, total: int, *, option: str) -> slice:
        """This process's part of `total` equal pieces of work; raises `InvalidConfig` if they cannot be divided."""
        if total % self.size:
            raise InvalidConfig(
                f"{option} cannot be shared out", expected=f"a multiple of the {self.size} processes", got=str(total),
                remedy=f"Change {option}, or start another number of processes.",
            )
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one; leave them at the end.

    Inside another `process_group` the outer one is used; a process that `torchrun` started opens one in its life.
    GPUs are used where there are any (nccl), else CPUs (gloo), with one thread a process unless OMP_NUM_THREADS says
    more (as `torchrun` does: the steps' matrices are small, and on busy cores idle OpenMP threads cost ten times that).
    """
    outer = dist.is_initialized()
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not outer:
        if cuda:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            # A store in this process's memory: no port to choose, none to collide with.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        torch.set_num_threads(threads)
        if not outer:
            dist.destroy_process_group()


class EmbeddingTables(nn.Module):
    """Several tables, looked up together; ids in any shape, one row each, no pooling.

    ```
    {"user": (G, B) ids, "pool": (G, K) ids}  ->  {"user": (G, B, D) rows, "pool": (G, K, D) rows}
    ```
    """

    def __init__(self, shapes: Sequence[TableShape]) -> None:
        super().__init__()
        features = [feature for shape in shapes for feature in shape.features]
        if len(set(features)) != len(features):
            raise InvalidConfig(
                "tables", expected="each feature name in one table", got=str(features), remedy="Rename the feature."
            )
        self.shapes = tuple(shapes)
        self.collection = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(
                    name=shape.module_name, embedding_dim=shape.dim, num_embeddings=shape.rows,
                    feature_names=list(shape.features),
                )
                for shape in shapes
            ],
        )
        self._features = features

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of ids.

        Args:
            ids: for every feature of every table, int64 row numbers of any shape.

        Returns:
            feature -> fp32 rows, the shape of its ids with D behind.
        """
        # One "sample" whose features are as long as they like: lengths may differ between features.
        jagged = KeyedJaggedTensor(
            keys=self._features,
            values=torch.cat([ids[name].reshape(-1) for name in self._features]),
            lengths=torch.tensor([ids[name].numel() for name in self._features], dtype=torch.int32).to(
                ids[self._features[0]].device
            ),
        )
        found = self.collection(jagged)
        return {name: found[name].values().unflatten(0, tuple(ids[name].shape)) for name in self._features}


class ShardedModel(nn.Module):
    """A module with one `EmbeddingTables` in it, made ready for training on one process or many.

    `backward()` updates the rows; other parameters are left to the caller's optimizer. All gradients are averaged over
    processes, so that a loss that is a mean over each process's share is the mean over all.

    Args:
        module: holds exactly one `EmbeddingTables`; its dense parameters must start equal on all processes.
        options: section `tables`.
        learning_rate: of the rows.
        weight_decay: of the rows that a step touches.

    Raises:
        InvalidConfig: no or several `EmbeddingTables`, or an optimizer this device has no fused kernel for.
    """

    def __init__(
        self, module: nn.Module, options: TableOptions, *, learning_rate: float, processes: Processes,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        holders = [(name, part) for name, part in module.named_modules() if isinstance(part, EmbeddingTables)]
        if len(holders) != 1:
            raise InvalidConfig(
                type(module).__name__, expected="one EmbeddingTables", got=str(len(holders)),
                remedy="Put all tables in one.",
            )
        if options.optimizer == "adam" and processes.device.type == "cpu":
            raise InvalidConfig(
                "tables.optimizer", expected="rowwise_adagrad, adagrad or sgd on a CPU", got="adam",
                remedy="FBGEMM's fused Adam needs a GPU.",
            )
        path, tables = holders[0]
        self.processes = processes
        self._shapes = {shape.name: shape for shape in tables.shapes}
        settings = {"lr": learning_rate, "weight_decay": weight_decay}
        if options.optimizer != "sgd":
            settings["eps"] = options.eps
        apply_optimizer_in_backward(OPTIMIZERS[options.optimizer], tables.collection.parameters(), settings)
        sharder = EmbeddingCollectionSharder()
        plan = construct_module_sharding_plan(
            tables.collection,
            per_param_sharding={
                shape.module_name: row_wise() if options.sharding == "row_wise" else table_wise(number % processes.size)
                for number, shape in enumerate(tables.shapes)
            },
            sharder=sharder, world_size=processes.size, local_size=processes.size, device_type=processes.device.type,
        )
        self._parallel = DistributedModelParallel(
            module, device=processes.device, sharders=[sharder],
            plan=ShardingPlan(plan={f"{path}.collection" if path else "collection": plan}),
        )

    def forward(self, *args, **kwargs):
        return self._parallel(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The module that was given, its tables now sharded."""
        return self._parallel.module

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters outside the tables."""
        return [p for name, p in self._parallel.named_parameters() if ".collection." not in f".{name}"]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate of the rows from the next backward pass on."""
        for group in self._parallel.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        self._parallel.fused_optimizer.step()  # hands the rate to the kernels; rows are not touched

    def init_rows(self, table: str, *, std: float, seed: int) -> None:
        """Fill a table with N(0, std^2), the same numbers however many processes hold it."""
        shape = self._shapes[table]

        def block(number: int) -> Tensor:
            size = min(INIT_BLOCK_ROWS, shape.rows - number * INIT_BLOCK_ROWS)
            mixed = SeedSequence([seed, number, crc32(table.encode())]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(mixed))
            return torch.randn(size, shape.dim, generator=generator) * std

        blocks = range(-(-shape.rows // INIT_BLOCK_ROWS))
        for number in blocks:
            self._write(self._sharded_weights()[table], block(number), first_row=number * INIT_BLOCK_ROWS)

    def load_rows(self, table: str, weight: Tensor) -> None:
        """Set a table: every process is given all rows and keeps its own.

        Args:
            weight: fp32, (rows, dim).

        Raises:
            InvalidTable: another shape, or numbers that are not finite.
        """
        shape = self._shapes[table]
        if tuple(weight.shape) != (shape.rows, shape.dim) or not torch.isfinite(weight).all():
            raise InvalidTable(
                f"rows of table {table}", expected=f"finite numbers of shape ({shape.rows}, {shape.dim})",
                got=f"shape {tuple(weight.shape)}, {int((~torch.isfinite(weight)).sum())} not finite",
                remedy="Check what was pretrained.",
            )
        self._write(self._sharded_weights()[table], weight, first_row=0)

    def gather_rows(self, table: str) -> Tensor | None:
        """All rows of a table, fp32 (rows, dim), on the first process's CPU; None on the others. All must call it."""
        return self._gather(self._sharded_weights()[table])

    def gather_state(self) -> dict[str, Tensor] | None:
        """Rows, the optimizer's numbers and dense parameters, by name, on the first process; None on the others."""
        state = {name: self._gather(value) for name, value in self._state().items()}
        return state if self.processes.is_first else None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Set everything that `gather_state` gave, on any number of processes."""
        for name, value in self._state().items():
            self._write(value, state[name], first_row=0)

    def _sharded_weights(self) -> dict[str, ShardedTensor]:
        state = self._parallel.state_dict()
        sharded = {name.split(".")[-2]: value for name, value in state.items() if isinstance(value, ShardedTensor)}
        return {name: sharded[shape.module_name] for name, shape in self._shapes.items()}

    def _state(self) -> dict[str, Tensor | ShardedTensor]:
        state = {f"rows/{name}": value for name, value in self._sharded_weights().items()}
        for values in self._parallel.fused_optimizer.state_dict()["state"].values():
            state |= {f"optimizer/{name}": value for name, value in values.items() if isinstance(value, ShardedTensor)}
        for name, value in self._parallel.state_dict().items():
            if not isinstance(value, ShardedTensor):
                state[f"dense/{name}"] = value
        return state

    def _gather(self, value: Tensor | ShardedTensor) -> Tensor | None:
        if not isinstance(value, ShardedTensor):
            return value.detach().cpu().clone() if self.processes.is_first else None
        whole = torch.empty(tuple(value.size()), device=self.processes.device) if self.processes.is_first else None
        value.gather(dst=0, out=whole)
        return whole.cpu() if self.processes.is_first else None

    @staticmethod
    def _write(target: Tensor | ShardedTensor, values: Tensor, *, first_row: int) -> None:
        """Copy `values`, which are the rows from `first_row` on, into those parts of the target that are here."""
        with torch.no_grad():
            if not isinstance(target, ShardedTensor):
                target.copy_(values)
                return
            for shard in target.local_shards():
                begin = shard.metadata.shard_offsets[0]
                low = max(begin, first_row)
                high = min(begin + shard.tensor.shape[0], first_row + values.shape[0])
                if low < high:
                    shard.tensor[low - begin : high - begin].copy_(values[low - first_row : high - first_row])
