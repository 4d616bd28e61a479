"""`facet publish`."""

import click

from pipelines.contracts.freshness import FreshnessLimits
from pipelines.contracts.rowcodec import CODEC_NAMES
from pipelines.contracts.runspec import ARMS
from pipelines.contracts.workspace import Workspace

__all__ = ["publish"]


@click.command()
@click.option("--run", "run_name", required=True, help="Name of the run, as given to `facet prepare`.")
@click.option("--arm", type=click.Choice(list(ARMS)), default="both", show_default=True, help="The ranker's arm.")
@click.option("--seed", type=int, default=0, show_default=True, help="The ranker's seed.")
@click.option(
    "--quantization", type=click.Choice(CODEC_NAMES), default="int4", show_default=True,
    help="Which quantization, as given to `facet quantize --to`.",
)
@click.option("--parent", "parents", type=int, multiple=True, help="Version it was warm-started from; may be repeated.")
@click.option(
    "--pretraining-warn-days", "warn_days", type=int, default=FreshnessLimits.warn_days, show_default=True,
    envvar=FreshnessLimits.WARN_VARIABLE, show_envvar=True,
    help="Warn when fine-tuning data starts more days than this after pretraining data ends.",
)
@click.option(
    "--pretraining-refuse-days", "refuse_days", type=int, default=FreshnessLimits.refuse_days, show_default=True,
    envvar=FreshnessLimits.REFUSE_VARIABLE, show_envvar=True, help="Refuse past so many.",
)
@click.option("--force-stale", is_flag=True, help="Publish past that limit too, with a warning.")
@click.pass_obj
def publish(
    workspace: Workspace, run_name: str, arm: str, seed: int, quantization: str, parents: tuple[int, ...],
    warn_days: int, refuse_days: int, force_stale: bool,
) -> None:
    """Make tables and upper model one immutable version.

    Reads runs/RUN/rankers/ARM-sSEED/QUANTIZATION/, checks every table and weight, and writes versions/N/ under the
    next number N with a sealed manifest. It appears whole or not at all. Then:

    \b
      cd feature_repo && feast apply && feast materialize 2010-01-01T00:00:00 2030-01-01T00:00:00
    """
    from pipelines.publish import publish as publish_release

    manifest = publish_release(
        workspace, workspace.run(run_name).ranker(arm, seed) / quantization, parents=parents,
        limits=FreshnessLimits(warn_days, refuse_days, force_stale),
    )
    click.echo(
        f"published version {manifest.version}: manifest {manifest.sha256[:12]}, data to {manifest.as_of.date()}"
    )
    for spec in manifest.tables:
        click.echo(
            f"  {spec.view_name(manifest.version):28s} {spec.rows:>12,} rows x {spec.row_bytes} bytes"
            f"  ({spec.quantization}, {spec.dim} columns)"
        )
