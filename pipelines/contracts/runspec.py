"""What a run is about: its dataset, its windows, its tasks. Written by `facet prepare`, read by everything after."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.windows import Windows

__all__ = ["ARMS", "FACETS", "RunSpec"]

FACETS = ("contrastive", "kge")
ARMS = {"scratch": (), "contrastive": ("contrastive",), "kge": ("kge",), "both": FACETS}
"""Arms of the experiment: which facets' tables start from pretraining; the others start at random."""


@dataclass(frozen=True)
class RunSpec:
    """Dataset, windows and binary tasks of a run.

    Attributes:
        tasks: names of the label columns in `examples.parquet`, in the order of the ranker's heads.
    """

    dataset: str
    windows: Windows
    tasks: tuple[str, ...]

    def write(self, path: Path) -> None:
        with replacing_file(path) as staging:
            staging.write_text(
                json.dumps(
                    {"dataset": self.dataset, "windows": self.windows.to_dict(), "tasks": list(self.tasks)}, indent=1
                )
            )

    @classmethod
    def read(cls, path: Path) -> "RunSpec":
        raw = json.loads(path.read_text())
        return cls(raw["dataset"], Windows.from_dict(raw["windows"]), tuple(raw["tasks"]))
