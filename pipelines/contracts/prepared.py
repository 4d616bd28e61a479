"""What `facet prepare` made, for the stages that read it: whole, and from the events that are there now."""

from pathlib import Path

from pipelines.contracts.errors import StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.workspace import Run, Workspace

__all__ = ["prepared"]


def prepared(workspace: Workspace, run: Run, path: Path) -> Lineage:
    """The lineage of a file or folder that `facet prepare` made.

    The events' files are not read, only what `facet ingest` wrote of them; where they are not at hand, nothing is
    compared with them.

    Args:
        path: a run's pairs, graph or examples, or a view.

    Raises:
        NotPrepared: it is not there.
        StaleInput: it is not what was made, or it was made from other events than are there now.
    """
    stage = f"prepare --run {run.name}"
    made, recorded = Lineage.read(lineage_of(path), stage=stage), lineage_of(workspace.events)
    if recorded.is_file():
        events = Lineage.recorded(recorded, stage="ingest")
        if changes := made.changes(settings=made.settings, inputs={"events": events}):
            raise StaleInput(
                f"{path} was made from other events", expected=f"{made.what} from those that are there now",
                got="; ".join(changes), remedy=f"Run `facet {stage}`, which makes anew what no longer fits.",
            )
    return made
