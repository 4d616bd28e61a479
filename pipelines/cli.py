"""The `facet` command: gathers the commands that the rooms register, and prints a refusal as one message."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

import click

from pipelines.contracts.errors import FacetError
from pipelines.contracts.quick_import import import_typeguard_optimized
from pipelines.contracts.workspace import Workspace

__all__ = ["facet", "main", "run"]

# In the order of the way through, which is also the order in which --help lists them.
STAGES = (
    "demo", "ingest", "prepare", "pretrain", "finetune", "evaluate", "quantize", "publish", "versions", "lineage",
    "audit", "serve", "load", "rollout", "status", "token", "retire", "gc",
)


class RoomCommands(click.Group):
    """Commands registered under the entry point group `facet.commands`; a room is imported only when it is asked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_registered(), key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = _registered().get(name)
        return entry.load() if entry else None


def _registered() -> dict:
    return {entry.name: entry for entry in entry_points(group="facet.commands")}


@click.group(cls=RoomCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--workspace", type=click.Path(file_okay=False, path_type=Path), default=Path("var"), show_default=True,
    envvar="FACET_WORKSPACE", help="Folder that everything is written to and read from.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every step, not only what a person waits for.")
@click.version_option(package_name="facet")
@click.pass_context
def facet(ctx: click.Context, workspace: Path, verbose: bool) -> None:
    """Large embedding tables for ads ranking: pretrain, fine-tune, quantize, publish, serve.

    \b
    The way through, one stage a command:
      facet ingest --dataset online_retail     a log becomes canonical events
      facet prepare --run v1                   views, pairs, graph and examples for one set of windows
      (cd feature_repo && feast apply)         the context views become features
      facet pretrain contrastive --run v1      and `kge`: two facets per entity
      facet finetune --run v1 --arm both       the CTR/CVR ranker, warm-started
      facet quantize --run v1 --arm both       FP32 tables become INT4 rows, checked
      facet publish --run v1 --arm both        tables + upper model = one immutable version
      (cd feature_repo && feast apply && feast materialize 2000-01-01T00:00:00 2030-01-01T00:00:00)
      facet serve cpu-tier / facet serve ranker
      facet rollout --to 2                     a second version, under traffic, never mixed with the first
      facet retire 1                           the first deleted, once nobody serves it

    `facet demo` runs all of it on the data set that comes with the project.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.captureWarnings(True)  # what libraries say of their own future is for --verbose
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
    for library in ("feast", "numba", "matplotlib", "torchrec", "fbgemm_gpu", "urllib3", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # FBGEMM reports every library that it loads through the root logger itself.
    logging.getLogger().handlers[0].addFilter(lambda record: record.name != "root" or record.levelno > logging.INFO)
    ctx.obj = Workspace(workspace)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own); returns its exit status, 2 for what was refused."""
    try:
        facet(arguments, prog_name="facet")
    except FacetError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> NoReturn:
    """Entry point of the console script.

    Leaves without the interpreter's teardown, in which DuckDB would print pages about objects that Feast keeps open.
    """
    import_typeguard_optimized()
    status = run()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
