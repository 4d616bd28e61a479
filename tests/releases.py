"""Small synthetic versions for tests: random tables, a random upper model, context views, and a Feast repository.

```
from tests.releases import write_release
release = write_release(tmp_path / "release", seed=1)     # what `facet quantize` would have written
manifest = publish(workspace, release)                    # pipelines.publish
```

Most tests want the fixtures of `tests/conftest.py` instead.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.contracts.context import CONTEXT_FEATURES, ContextFeature
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.windows import Windows
from pipelines.contracts.workspace import Workspace
from tests.lineages import invented_ranker

__all__ = [
    "AS_OF", "DIMS", "TASKS", "WIDE_RANGE", "FeastRepository", "entity_ids", "feast_apply", "float_rows",
    "published_rows", "retell_windows", "write_context_views", "write_release",
]

ROOT = Path(__file__).resolve().parents[1]
AS_OF = datetime(2011, 7, 1, tzinfo=UTC)
WIDE_RANGE = (datetime(2010, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC))
DIMS = {"user.contrastive": 8, "user.kge": 12, "item.contrastive": 8, "item.kge": 12}
TASKS = ("purchase", "repurchase_60d")
WINDOWS = Windows.from_dict(
    {
        "pretrain": ["2010-12-01", "2011-04-01"],
        "finetune": ["2011-04-01", "2011-07-01"],
        "validation": ["2011-07-01", "2011-09-05"],
        "test": ["2011-09-05", "2011-10-10"],
    }
)


def entity_ids(entity: str, rows: int) -> np.ndarray:
    """The ids that every synthetic table of an entity has: int64 (rows,), ascending, small ones and 63-bit ones."""
    rng = np.random.default_rng(len(entity))
    small = rng.choice(rows * 20, rows // 2, replace=False)
    large = rng.integers(2**40, 2**62, rows - rows // 2)
    return np.unique(np.concatenate([small, large]).astype(np.int64))


def float_rows(table: str, rows: int, *, seed: int, dim: int | None = None) -> np.ndarray:
    """The table before quantization: float32 (rows, dim), by default DIMS[table]."""
    random = np.random.default_rng([seed, *table.encode()])
    return random.normal(size=(rows, dim or DIMS[table])).astype(np.float32)


def write_release(
    directory: Path, *, seed: int = 0, rows: int = 200, as_of: datetime = AS_OF, quantization: str = "int4",
    dims: Mapping[str, int] = MappingProxyType(DIMS), cross_rank: int = 4, hidden: tuple[int, ...] = (16,),
    context: tuple[ContextFeature, ...] = CONTEXT_FEATURES,
) -> Path:
    """Write a release as `facet quantize` does; the same arguments give the same bytes."""
    import torch

    from pipelines.contracts.upper_config import UpperConfig
    from pipelines.contracts.upper_files import save_upper_model
    from pipelines.contracts.upper_model import UpperModel

    (directory / "tables").mkdir(parents=True)
    specs = []
    for name, dim in dims.items():
        ids = entity_ids(name.partition(".")[0], rows)
        values = float_rows(name, len(ids), seed=seed, dim=dim)
        packed = codec(quantization).encode(values)
        default = codec(quantization).encode(values.mean(0, keepdims=True))
        specs.append(TableSpec(name, dim, len(ids), quantization, "vocabulary", default.tobytes().hex()))
        write_table(directory / Manifest.table_path(name), ids, packed, as_of)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UpperModel(UpperConfig(dict(dims), context, TASKS, cross_rank=cross_rank, hidden=hidden))
    save_upper_model(model, directory / "upper")
    release = {
        "dataset": "synthetic",
        "as_of": as_of.isoformat(),
        "windows": WINDOWS.to_dict(),
        "tables": [spec.to_dict() for spec in specs],
        "metrics": {"auc": {task: 0.5 for task in TASKS}, "seed": seed},
        "lineage": invented_ranker(dataset="synthetic", windows=WINDOWS, tasks=TASKS, seed=seed).to_dict(),
    }
    (directory / "release.json").write_text(json.dumps(release))
    return directory


def retell_windows(release: Path, **windows: list[str]) -> None:
    """Say in a release and its lineage that some of its windows were others."""
    content = json.loads((release / "release.json").read_text())
    for told in (content, content["lineage"]["artefacts"][-1]["settings"]):
        told["windows"] |= windows
    (release / "release.json").write_text(json.dumps(content))


def write_table(path: Path, ids: np.ndarray, packed: np.ndarray, as_of: datetime) -> None:
    """Write id, row and event_timestamp, in row groups smaller than the table."""
    width = packed.shape[1]
    rows = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(packed), [None, pa.py_buffer(packed.tobytes())])
    stamps = pa.array([as_of] * len(ids), pa.timestamp("us", tz="UTC"))
    table = pa.table({"id": pa.array(ids, pa.int64()), "row": rows, "event_timestamp": stamps})
    pq.write_table(table, path, row_group_size=max(1, len(ids) // 3))


def published_rows(workspace: Workspace, version: int, table: str) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 (N,) and rows uint8 (N, B) as the version's Parquet file has them: the truth of every reader."""
    file = workspace.versions.path(version) / Manifest.table_path(table)
    read = pq.read_table(file, columns=["id", "row"])
    rows = read["row"].combine_chunks()
    packed = np.frombuffer(rows.buffers()[1], np.uint8).reshape(-1, rows.type.byte_width)
    return read["id"].to_numpy(), packed[rows.offset : rows.offset + len(rows)]


def write_context_views(workspace: Workspace, users: np.ndarray, items: np.ndarray) -> None:
    """Two rows of context per user, item and (first 50) pair: one a month before `AS_OF`, one at `AS_OF`."""
    pairs = min(50, len(users), len(items))
    keys = {
        "user_context": {"user": users},
        "item_context": {"item": items},
        "user_item_context": {"user": users[:pairs], "item": items[:pairs]},
    }
    workspace.views.mkdir(parents=True, exist_ok=True)
    for view, columns in keys.items():
        features = [feature.column for feature in CONTEXT_FEATURES if feature.view == view]
        parts = []
        for age, stamp in enumerate((AS_OF - timedelta(days=30), AS_OF)):
            count = len(next(iter(columns.values())))
            parts.append(
                pa.table(
                    {
                        **{name: pa.array(ids, pa.int64()) for name, ids in columns.items()},
                        "event_timestamp": pa.array([stamp] * count, pa.timestamp("us", tz="UTC")),
                        **{name: _context_column(name, count, stamp, age) for name in features},
                    }
                )
            )
        pq.write_table(pa.concat_tables(parts), workspace.views / f"{view}.parquet")


def _context_column(name: str, count: int, stamp: datetime, age: int) -> pa.Array:
    if name in ("last_event", "first_event"):
        return pa.array(stamp.timestamp() - 86_400.0 * (1 + np.arange(count) % 20), pa.float64())
    return pa.array((np.arange(count) % 7 + 10 * age).astype(np.float64))


@dataclass(frozen=True)
class FeastRepository:
    """A copy of `feature_repo/` beside a workspace `var/`: what a user has, in a temporary directory."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> "FeastRepository":
        shutil.copytree(ROOT / "feature_repo", root / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "var").mkdir()
        return cls(root)

    @property
    def path(self) -> Path:
        return self.root / "feature_repo"

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root / "var")

    def apply(self) -> None:
        """`feast apply`, in this process (the command takes seconds to start)."""
        feast_apply(self.path)

    def store(self):
        """A new `feast.FeatureStore`, as a new process would make it."""
        from feast import FeatureStore

        return FeatureStore(repo_path=str(self.path))

    def materialize(self, views: list[str] | None = None, *, store=None) -> None:
        """`feast materialize` over all time, quietly."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            (store or self.store()).materialize(*WIDE_RANGE, feature_views=views)


def feast_apply(repo: Path) -> None:
    """What the `feast apply` command calls; Feast leaves module names and the directory changed, this does not."""
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total

    modules = [path.stem for path in repo.glob("*.py")]
    before, path_before, cached = Path.cwd(), list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(repo))
    try:
        os.chdir(repo)
        with contextlib.redirect_stdout(io.StringIO()):
            apply_total(load_repo_config(repo, repo / "feature_store.yaml"), repo, skip_source_validation=False)
    finally:
        os.chdir(before)
        sys.path[:], sys.dont_write_bytecode = path_before, cached
        for name in modules:
            sys.modules.pop(name, None)
