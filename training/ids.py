"""Which ids of a run have rows of their own and which share a bucket's: one answer for pretraining and ranker."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.workspace import Run, Workspace
from training.config import load_section

__all__ = ["ENTITIES", "IdsConfig", "RunIds", "load_ids"]

ENTITIES = ("user", "item")


@dataclass(frozen=True)
class IdsConfig:
    """Section `user_ids` or `item_ids` of the configuration; `training/defaults.yaml` explains every key.

    Raises:
        InvalidConfig: values that do not go together.
    """

    rule: str = "vocabulary"
    buckets: int = 0
    seed: int = 0
    min_events: int = 1

    def __post_init__(self) -> None:
        _ = self.id_rule  # refuses by itself
        if self.min_events < 1 or (self.min_events > 1 and self.rule != "vocabulary+buckets"):
            raise InvalidConfig(
                f"min_events with id rule {self.rule}", expected="1, or more where rare ids have buckets to share",
                got=str(self.min_events), remedy="Use the rule vocabulary+buckets, or leave min_events at 1.",
            )

    @property
    def id_rule(self) -> IdRule:
        return IdRule(self.rule, self.buckets, self.seed)


@dataclass(frozen=True)
class RunIds:
    """The stored id (`pipelines.contracts.idrule`) of every user and item of a run.

    Everything learned works on stored ids: what shares a bucket is one entity to the facets and to the ranker.

    Attributes:
        configs: entity -> its section; without one, an id is stored as it is.
        vocabularies: entity -> int64 (V,), ascending: ids of the pretraining window with a row of their own, for
            entities of the rule `vocabulary+buckets`.

    >>> ids = RunIds({"item": IdsConfig("vocabulary+buckets", buckets=2)}, {"item": np.array([10, 20])})
    >>> ids.stored("item", np.array([20, 99])).tolist(), ids.stored("user", np.array([7, 99])).tolist()
    ([20, -1], [7, 99])
    """

    configs: Mapping[str, IdsConfig] = field(default_factory=dict)
    vocabularies: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, workspace: Workspace, run: Run, configs: Mapping[str, IdsConfig]) -> "RunIds":
        """Derive the vocabularies from a run's pairs and graph, where a rule needs one.

        Raises:
            NotPrepared: the run was not prepared.
            InvalidConfig: a vocabulary with negative ids, which name buckets.
        """
        made = cls(configs, {
            entity: _frequent(workspace, run, entity, at_least=config.min_events)
            for entity, config in configs.items() if config.rule == "vocabulary+buckets"
        })
        for entity in configs:
            made.stored(entity, np.empty(0, np.int64))  # refuses by itself
        return made

    def rule(self, entity: str) -> IdRule:
        return self.configs.get(entity, IdsConfig()).id_rule

    def stored(self, kind: str, ids: np.ndarray) -> np.ndarray:
        """Stored ids of nodes of a type, int64 (N,) -> (N,); those that are no users or items stay as they are."""
        return self.rule(kind).stored_ids(ids, vocabulary=self.vocabularies.get(kind, np.empty(0, np.int64)))

    def describe(self) -> dict[str, dict[str, Any]]:
        """What the configuration says and two stages must agree on, as JSON: each entity's section."""
        return {entity: asdict(self.configs.get(entity, IdsConfig())) for entity in ENTITIES}

    def vocabularies_sha256(self) -> dict[str, str]:
        """What the run's pairs and graph say and two stages must agree on: entity -> SHA-256 of its vocabulary."""
        return {
            entity: hashlib.sha256(vocabulary.astype("<i8")).hexdigest()
            for entity, vocabulary in self.vocabularies.items()
        }


def load_ids(override: Path | None = None) -> dict[str, IdsConfig]:
    """Sections `user_ids` and `item_ids` of the configuration, by entity."""
    return {entity: load_section(f"{entity}_ids", IdsConfig, override) for entity in ENTITIES}


def _frequent(workspace: Workspace, run: Run, entity: str, *, at_least: int) -> np.ndarray:
    """Ids of the pretraining window with at least so many events, int64 (V,), ascending.

    An event is a (user, item, day), of the pairs or of the graph's edges from users to items, whichever are more. An id
    that has neither, such as an item that was only seen beside others, counts as one.
    """
    stage = f"prepare --run {run.name}"
    paired, pairs = np.unique(
        pq.read_table(workspace.require(run.pairs, stage), columns=[entity])[entity].to_numpy(), return_counts=True
    )
    folder = workspace.require(run.graph, stage)
    nodes = pq.read_table(folder / "nodes.parquet", columns=["type", "node", "id"]).to_pandas()
    edges = pq.read_table(folder / "edges.parquet", columns=["relation", "head", "tail", "weight"]).to_pandas()
    relations = json.loads((folder / "relations.json").read_text())
    between = [number for number, raw in enumerate(relations) if (raw["head"], raw["tail"]) == ENTITIES]
    edges = edges[edges["relation"].isin(between)]
    days = edges.groupby("head" if entity == "user" else "tail")["weight"].sum()
    nodes = nodes[nodes["type"] == entity]

    vocabulary = np.union1d(paired, nodes["id"])
    events = np.ones(len(vocabulary))
    for ids, counts in ((paired, pairs), (nodes["id"], days.reindex(nodes["node"], fill_value=0.0))):
        place = np.searchsorted(vocabulary, ids)
        events[place] = np.maximum(events[place], counts)
    return vocabulary[events >= at_least]
