"""FP32 rows to the bytes that are published, and what that does to the AUC."""

import json
import logging
import shutil
from dataclasses import replace
from typing import Any

import fbgemm_gpu  # noqa: F401  registers the operators
import numpy as np
import torch
from tqdm import tqdm

from pipelines.contracts.durable import creating_directory, require_writable
from pipelines.contracts.errors import InvalidTable, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec, require_finite
from pipelines.contracts.runspec import FACETS
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.table_file import write_table_file
from pipelines.contracts.upper_files import save_upper_model
from pipelines.contracts.windows import Windows
from pipelines.contracts.workspace import Run, Workspace
from training.facet_origin import current_facet
from training.ranker.checkpoint import RankerTable, TrainedRanker, score
from training.ranker.inputs import Fold, fold_lineages, load_folds
from training.ranker.metrics import task_aucs

__all__ = ["pack_rows", "quantize", "quantized_table"]

CHUNK_ELEMENTS = 1 << 20
"""Elements per call of FBGEMM's kernels: what fits the cache is fastest, and their GPU form overflows past 2**31."""

_log = logging.getLogger(__name__)


def pack_rows(rows: np.ndarray, quantization: str, *, chunk_elements: int = CHUNK_ELEMENTS) -> np.ndarray:
    """Encode rows with FBGEMM, bit for bit what `pipelines.contracts.rowcodec` encodes, in chunks of rows.

    Args:
        rows: float32 (N, D).
        quantization: name of a row codec.

    Returns:
        uint8 (N, row_bytes).

    Raises:
        InvalidTable: a value is not finite or too large for the format.
        InvalidConfig: an unknown quantization.

    >>> pack_rows(np.array([[0, 1, 2, 15]], np.float32), "int4").tolist()
    [[16, 242, 0, 60, 0, 0]]
    """
    row_codec = codec(quantization)
    require_finite(rows[:0])  # the shape, also of a table without rows
    count, dim = rows.shape
    packed = np.empty((count, row_codec.row_bytes(dim)), np.uint8)
    step = max(1, chunk_elements // dim)
    with tqdm(
        total=count, desc=f"{quantization} rows", unit="row", unit_scale=True, disable=None, leave=False
    ) as progress:
        for start in range(0, count, step):
            # the codec stores negative zero as zero
            chunk = require_finite(rows[start : start + step], first_row=start) + np.float32(0)
            packed[start : start + step] = _pack_chunk(chunk, quantization)
            row_codec.require_no_overflow(packed[start : start + step], dim, first_row=start)
            progress.update(len(chunk))
    return packed


def quantized_table(table: RankerTable, quantization: str) -> tuple[np.ndarray, bytes, RankerTable]:
    """A table as it will be served.

    Returns:
        The packed rows, uint8 (N, row_bytes); the packed default row; and both decoded again.
    """
    rows, default = (pack_rows(each, quantization) for each in (table.weight, table.default[None]))
    decoded, decoded_default = (codec(quantization).decode(each, len(table.default)) for each in (rows, default))
    return rows, default.tobytes(), replace(table, weight=decoded, default=decoded_default[0])


def quantize(workspace: Workspace, run: Run, *, arm: str, seed: int, to: str) -> dict[str, Any]:
    """Write the release `run.ranker(arm, seed)/<quantization>/`, replacing an earlier one.

    ```
    tables/<table>.parquet   id int64 ascending (stored ids), row fixed-size binary, event_timestamp
    upper/                   config.json, model.safetensors
    release.json             dataset, as_of, windows, tables, metrics, lineage (the ranker's)
    ```

    Data set, windows and tasks are those that the ranker was trained with, whatever the run says by now. `as_of` is the
    end of the last window that touched a weight or chose one: validation.

    Returns:
        The metrics of `release.json`: test ROC-AUC by task with fp32 rows and with the packed rows, bytes per row.

    Raises:
        NotPrepared: the ranker was not fine-tuned.
        StaleInput: it was trained from other examples, context or facets than are there now, or a facet does not fit
            the run; the message names it.
        InvalidTable: a table may not be published.
        InvalidConfig: an unknown quantization.
    """
    codec(to)
    directory = run.ranker(arm, seed)
    stage = f"finetune --run {run.name} --arm {arm} --seed {seed}"
    lineage = Lineage.read(lineage_of(directory), stage=stage)
    test = _fitting_folds(workspace, run, lineage, seed=seed, stage=stage)["test"]
    ranker = TrainedRanker.load(directory)
    tasks, windows = lineage.settings["tasks"], Windows.from_dict(lineage.settings["windows"])
    as_of = windows.validation.end_time
    packed = {name: quantized_table(table, to) for name, table in ranker.tables.items()}
    tables = tuple(
        TableSpec(
            name=name, dim=len(table.default), rows=len(rows), quantization=to, id_rule=table.rule.name,
            default_row=default.hex(), buckets=table.rule.buckets, hash_seed=table.rule.seed,
        )
        for name, (rows, default, table) in packed.items()
    )
    if not any(table.rows for table in tables):
        raise InvalidTable(
            f"tables of {directory}", expected="a row in one of them", got="none", remedy="Fine-tune again."
        )
    served = {name: table for name, (_, _, table) in packed.items()}
    auc = {
        kind: task_aucs(tasks, test.labels, score(rows, ranker.upper, test))
        for kind, rows in (("fp32", ranker.tables), ("quantized", served))
    }
    row_bytes = sum(table.rows * table.row_bytes for table in tables)
    metrics = {
        "arm": arm,
        "seed": seed,
        "quantization": to,
        "auc": auc,
        "auc_delta": {task: auc["quantized"][task] - auc["fp32"][task] for task in tasks},
        "rows": sum(table.rows for table in tables),
        "bytes_per_row": row_bytes / sum(table.rows for table in tables),
        "bytes_ratio_to_fp16": row_bytes / sum(table.rows * 2 * table.dim for table in tables),
    }
    release = {
        "dataset": lineage.settings["dataset"],
        "as_of": as_of.isoformat(),
        "windows": windows.to_dict(),
        "tables": [table.to_dict() for table in tables],
        "metrics": metrics,
        "lineage": lineage.to_dict(),
    }
    require_writable(directory)
    shutil.rmtree(directory / to, ignore_errors=True)
    with creating_directory(directory / to) as staging:
        (staging / "tables").mkdir()
        for name, (rows, _, table) in packed.items():
            write_table_file(
                staging / Manifest.table_path(name), [(table.ids, rows)], row_bytes=rows.shape[1], as_of=as_of
            )
        save_upper_model(ranker.upper, staging / "upper")
        (staging / "release.json").write_text(json.dumps(release, indent=1))
    _log.info("%s: %d rows of %.1f bytes", directory / to, metrics["rows"], metrics["bytes_per_row"])
    return metrics


def _fitting_folds(workspace: Workspace, run: Run, ranker: Lineage, *, seed: int, stage: str) -> dict[str, Fold]:
    """The run's folds; raises `StaleInput` unless they and the facets are those that the ranker was trained from."""
    facets = {facet: current_facet(workspace, run, facet, seed=seed) for facet in FACETS}
    folds = load_folds(workspace, run, tasks=ranker.settings["tasks"])
    inputs = {**fold_lineages(workspace, run), **facets}
    if changes := ranker.changes(settings=ranker.settings, inputs=inputs):
        raise StaleInput(
            f"{ranker.what} was trained from something else", expected="what is there now", got="; ".join(changes),
            remedy=f"Run `facet {stage}`, which trains it anew.",
        )
    return folds


def _pack_chunk(rows: np.ndarray, quantization: str) -> np.ndarray:
    tensor = torch.from_numpy(rows)
    if quantization == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(tensor).numpy()
    if quantization == "int4":
        return _pack_int4(rows)
    return codec(quantization).encode(rows)


def _pack_int4(rows: np.ndarray) -> np.ndarray:
    """FBGEMM wants whole pairs of bytes: repeat the last column, which changes no row's range, and drop it again."""
    dim = rows.shape[1]
    padded = torch.from_numpy(np.pad(rows, ((0, 0), (0, -dim % 4)), mode="edge") if dim % 4 else rows)
    packed = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(padded, 4).numpy()
    if not dim % 4:
        return packed
    codes = packed[:, : (dim + 1) // 2]
    if dim % 2:
        codes[:, -1] &= 15  # the high nibble is the padding's
    return np.concatenate([codes, packed[:, -4:]], axis=1)
