"""What a facet is made from, and whether one that lies there fits what is there now."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.contracts.errors import StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.prepared import prepared
from pipelines.contracts.workspace import Run, Workspace
from training.ids import RunIds

__all__ = ["FacetOrigin", "current_facet"]

FORMAT = 1
"""Raised when the same pairs or graph and settings lead to other rows than before."""


@dataclass(frozen=True)
class FacetOrigin:
    """All that a facet depends on, in three parts, since each asks for another answer when it changes.

    A facet of other inputs is of no use and is trained anew. One of another configuration may be an hour's work, which
    a forgotten `--config` must not undo: it is refused.

    Attributes:
        inputs: `pairs` or `graph`.
        given: settings that follow from the run, such as its window's end and which ids have rows of their own.
        chosen: settings that the configuration says.
    """

    inputs: Mapping[str, Lineage]
    given: Mapping[str, Any]
    chosen: Mapping[str, Any]

    @classmethod
    def of(
        cls, workspace: Workspace, run: Run, facet: str, *, seed: int, window_end: datetime, ids: RunIds,
        sections: Mapping[str, Any],
    ) -> "FacetOrigin":
        """What a facet would be made from now.

        Args:
            sections: the configuration's other sections, as JSON.

        Raises:
            NotPrepared: the run has not been prepared.
            StaleInput: what was prepared is not what lies there, or was made from other events than are there now.
        """
        given = {
            "format": FORMAT, "seed": seed, "window_end": window_end.isoformat(),
            "vocabularies": ids.vocabularies_sha256(),
        }
        return cls(_inputs(workspace, run, facet), given, {**sections, "ids": ids.describe()})

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.given, **self.chosen}

    def require_choices_of(self, made: Lineage, *, stage: str) -> None:
        """Raise `StaleInput` if the configuration says otherwise than when a facet was made.

        Args:
            stage: the command that makes it.
        """
        if choices := made.changes(settings={**made.settings, **self.chosen}, inputs=made.inputs):
            raise StaleInput(
                f"{made.what} is of another configuration", expected="the one that it was trained with",
                got="; ".join(choices),
                remedy="Give the --config it was trained with, or train it anew with this one: "
                f"`facet {stage} --force`.",
            )

    def other_inputs(self, made: Lineage) -> list[str]:
        """What else is not as it was then."""
        return made.changes(settings={**made.settings, **self.given}, inputs=self.inputs)


def current_facet(
    workspace: Workspace, run: Run, facet: str, *, seed: int, origin: FacetOrigin | None = None
) -> Lineage:
    """The lineage of a pretrained facet that fits what is there now.

    Args:
        origin: what it has to be made from; `chosen` may be part of it. By default the pairs or graph alone decide.

    Raises:
        NotPrepared: it was not pretrained.
        StaleInput: it was made from something else; the message names it.
    """
    stage = f"pretrain {facet} --run {run.name} --seed {seed}"
    made = Lineage.read(lineage_of(run.facet(facet, seed)), stage=stage)
    origin = origin or FacetOrigin(_inputs(workspace, run, facet), {}, {})
    origin.require_choices_of(made, stage=stage)
    if changes := origin.other_inputs(made):
        raise StaleInput(
            f"{made.what} was trained from something else", expected="what is there now", got="; ".join(changes),
            remedy=f"Run `facet {stage}`, which trains it anew.",
        )
    return made


def _inputs(workspace: Workspace, run: Run, facet: str) -> dict[str, Lineage]:
    name, path = {"contrastive": ("pairs", run.pairs), "kge": ("graph", run.graph)}[facet]
    return {name: prepared(workspace, run, path)}
