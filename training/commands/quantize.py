"""`facet quantize`: a fine-tuned ranker becomes a release."""

import click

from pipelines.contracts.rowcodec import CODEC_NAMES
from pipelines.contracts.workspace import Workspace

__all__ = ["quantize"]


@click.command()
@click.option("--run", "run_name", required=True, help="Name that the run was given at `facet prepare`.")
@click.option("--arm", required=True, help="scratch, contrastive, kge or both.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--to", type=click.Choice(CODEC_NAMES), default="int4", show_default=True, help="Format of a row.")
@click.pass_obj
def quantize(workspace: Workspace, run_name: str, arm: str, seed: int, to: str) -> None:
    """Pack the ranker's FP32 rows with FBGEMM's row-wise quantization, and measure what that does to the AUC.

    Every value is checked to be finite before anything is packed or written. A ranker that was trained from other
    examples, context or facets than are there now is refused. The result is what `facet publish` reads:
    runs/<run>/rankers/<arm>-s<seed>/<format>/ with tables/*.parquet, upper/ and release.json, which states the
    data set, windows and settings that the ranker was trained with.
    """
    from training.quantize import quantize as run_quantize

    metrics = run_quantize(workspace, workspace.run(run_name), arm=arm, seed=seed, to=to)
    click.echo(f"{metrics['rows']:,} rows of {metrics['bytes_per_row']:.1f} bytes, "
               f"{metrics['bytes_ratio_to_fp16']:.1%} of FP16")
    for task, delta in metrics["auc_delta"].items():
        fp32, packed = metrics["auc"]["fp32"][task], metrics["auc"]["quantized"][task]
        click.echo(f"{task:24s} test ROC-AUC fp32 {fp32:.4f}, {to} {packed:.4f} ({delta:+.5f})")
