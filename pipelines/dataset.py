"""A data set's definition: what its log means and what is learned from it, read from one YAML file."""

from dataclasses import dataclass, field
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import pipelines
from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.strict import build, read_yaml
from pipelines.contracts.windows import Window, Windows
from pipelines.relations import RELATION_TYPES, Relation
from pipelines.row_expressions import require_expressions
from pipelines.tasks import Followed, Sampled
from pipelines.text_log import TextFormat, quoted, typed_column

__all__ = ["OPTIONAL_COLUMNS", "REQUIRED_COLUMNS", "SURFACES", "Dataset", "LogLayout", "known_datasets", "load_dataset"]

REQUIRED_COLUMNS = ("user", "item", "kind", "event_timestamp")
OPTIONAL_COLUMNS = ("value", "session")
SURFACES = ("onsite", "offsite")
TASK_TYPES = {"sampled": Sampled, "followed": Followed}
MANUAL = "pipelines/datasets/online_retail.yaml"
PROJECT_ROOT = Path(pipelines.__file__).parents[1]
_HOME = Path(str(files("pipelines.datasets")))


@dataclass(frozen=True)
class LogLayout:
    """How the rows of a log become canonical events.

    All expressions are DuckDB SQL over the log's own columns, of the kind that `pipelines.row_expressions` lets pass.

    Attributes:
        columns: canonical column -> expression.
        ids: user and item -> `integer`, whose ids are kept, or `text`, which is hashed. Declared, because an id that is
            text in one log and a number in another would be two ids.
        kinds: event kind -> surface.
        time_range: first day and day after the last (UTC) that are plausible.
        text: name of a text attribute (`user_…` or `item_…`) -> expression.
        number: name of a number attribute -> expression.
        drop: reason -> condition of the rows to leave out.
        max_duplicate_share: rows equal to another in every column are dropped up to this share and refused above it;
            None keeps them.
        csv: how the text of a CSV log is laid out.
        types: column of text -> what it holds (`pipelines.text_log.typed_column`); others stay text.
    """

    columns: dict[str, str]
    ids: dict[str, str]
    kinds: dict[str, str]
    time_range: Window
    text: dict[str, str] = field(default_factory=dict)
    number: dict[str, str] = field(default_factory=dict)
    drop: dict[str, str] = field(default_factory=dict)
    max_duplicate_share: float | None = 0.0
    csv: TextFormat = field(default_factory=TextFormat)
    types: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
        if missing := [name for name in REQUIRED_COLUMNS if name not in self.columns]:
            raise _refusal("log.columns: missing column", f"an expression for each of {REQUIRED_COLUMNS}", missing)
        if unknown := [name for name in self.columns if name not in allowed]:
            raise _refusal("log.columns: unknown column", f"some of {allowed}", unknown)
        if sorted(self.ids) != ["item", "user"] or not {*self.ids.values()} <= {"integer", "text"}:
            raise _refusal("log.ids", "integer or text for user and item each", self.ids)
        if bad := [name for name in (*self.text, *self.number) if not name.startswith(("user_", "item_"))]:
            raise _refusal("log: attribute without an owner", "names that start with user_ or item_", bad)
        if both := sorted(self.text.keys() & self.number.keys()):
            raise _refusal("log: attribute declared twice", "a name under text or under number", both)
        if not self.kinds or (bad := sorted(set(self.kinds.values()) - set(SURFACES))):
            raise _refusal("log.kinds", f"kinds, each on one of {SURFACES}", bad if self.kinds else "none")
        if self.max_duplicate_share is not None and not 0 <= self.max_duplicate_share < 1:
            raise _refusal("log.max_duplicate_share", "a share in [0, 1), or null", self.max_duplicate_share)
        require_expressions(
            {
                f"log.{section}.{name}": expression
                for section in ("columns", "text", "number", "drop")
                for name, expression in getattr(self, section).items()
            }
        )
        for column, declared in self.types.items():
            typed_column(quoted(column), declared)


@dataclass(frozen=True)
class Dataset:
    """A checked definition.

    Attributes:
        reference: how it was asked for: a name that comes with the project, or the absolute path of a YAML file.
        source: the log's path, or None if the user has to give it.
        tasks: name -> task, in the order of the ranker's heads; the first is the one `Sampled`.
        relations: name -> relation of the knowledge graph, in the order of the file.
    """

    name: str
    reference: str
    source: Path | None
    log: LogLayout
    context_kinds: tuple[str, ...]
    pair_kinds: tuple[str, ...]
    tasks: dict[str, Sampled | Followed]
    runs: dict[str, Windows]
    relations: dict[str, Relation]

    @property
    def sampled(self) -> tuple[str, Sampled]:
        """Name and declaration of the first head, whose visits make the examples."""
        return next((name, task) for name, task in self.tasks.items() if isinstance(task, Sampled))

    @property
    def followed(self) -> dict[str, Followed]:
        return {name: task for name, task in self.tasks.items() if isinstance(task, Followed)}

    def windows(self, run: str) -> Windows:
        """Windows of a run by name; raises `InvalidConfig` naming those there are."""
        if run not in self.runs:
            raise InvalidConfig(
                f"run of {self.name}", expected=f"one of {sorted(self.runs)}", got=run,
                remedy="Choose one, or add it under `runs` in the data set's YAML.",
            )
        return self.runs[run]


@dataclass(frozen=True)
class _File:
    """The keys of a definition file, before its parts are read."""

    name: str
    log: Any
    context_kinds: tuple[str, ...]
    pair_kinds: tuple[str, ...]
    tasks: dict[str, Any]
    runs: dict[str, Any]
    graph: dict[str, Any]
    source: str | None = None


def known_datasets() -> list[str]:
    """Names of the data sets that come with the project."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _HOME.iterdir() if entry.name.endswith(".yaml"))


def load_dataset(reference: str) -> Dataset:
    """Read and check a definition.

    Args:
        reference: a name of `known_datasets()`, or the path of a YAML file.

    Raises:
        InvalidConfig: unknown name, or anything in the file that is not understood.
    """
    builtin = reference in known_datasets()
    path = _HOME / f"{reference}.yaml" if builtin else Path(reference)
    if not builtin and path.suffix not in (".yaml", ".yml"):
        raise InvalidConfig(
            "unknown data set", expected=f"one of {known_datasets()}, or the path of a YAML file", got=reference,
            remedy="Correct the name, or describe your log in a YAML file.",
        )
    raw = read_yaml(path)
    try:
        return _parse(raw, reference if builtin else str(path.resolve()), PROJECT_ROOT if builtin else path.parent)
    except InvalidConfig as error:
        raise InvalidConfig(
            f"{path.name}: {error.problem}", expected=error.expected, got=error.got, remedy=error.remedy
        ) from error


def _parse(raw: dict[str, Any], reference: str, home: Path) -> Dataset:
    file = build(_File, raw, where="data set", manual=MANUAL)
    log = dict(file.log) if isinstance(file.log, dict) else file.log
    if isinstance(log, dict) and "time_range" in log:
        log["time_range"] = _time_range(log["time_range"])
    tasks = {name: _typed(TASK_TYPES, task, f"tasks.{name}") for name, task in _entries(file.tasks, "tasks").items()}
    relations = {
        name: _typed(RELATION_TYPES, edge, f"graph.{name}") for name, edge in _entries(file.graph, "graph").items()
    }
    dataset = Dataset(
        name=file.name,
        reference=reference,
        source=None if file.source is None else (home / file.source),
        log=build(LogLayout, log, where="log", manual=MANUAL),
        context_kinds=file.context_kinds,
        pair_kinds=file.pair_kinds,
        tasks=tasks,
        runs={name: Windows.from_dict(windows) for name, windows in _entries(file.runs, "runs").items()},
        relations=relations,
    )
    _check_together(dataset)
    return dataset


def _check_together(dataset: Dataset) -> None:
    """Refuse parts that do not fit each other."""
    _check_tasks(dataset)
    for name, relation in dataset.relations.items():
        _check_relation(dataset, f"graph.{name}", relation)
    anchors = [name for name, relation in dataset.relations.items() if getattr(relation, "anchor", False)]
    if len(anchors) != 1:
        raise _refusal("graph: anchor", "`anchor: true` on exactly one relation of type events", anchors or "none")
    _check_kinds(dataset, "context_kinds", dataset.context_kinds)
    _check_kinds(dataset, "pair_kinds", dataset.pair_kinds)


def _check_tasks(dataset: Dataset) -> None:
    types = [type(task) for task in dataset.tasks.values()]
    if types != [Sampled] + [Followed] * (len(types) - 1):
        got = {name: type(task).__name__.lower() for name, task in dataset.tasks.items()}
        raise _refusal("tasks", "one task of type sampled, and it the first", got)
    if reserved := set(dataset.tasks) & {"fold", "user", "item", "event_timestamp"}:
        raise _refusal("tasks", "names that are not columns of the examples", sorted(reserved))
    name, sampled = dataset.sampled
    _check_kinds(dataset, f"tasks.{name}.kinds", sampled.kinds)
    for name, task in dataset.followed.items():
        _check_kinds(dataset, f"tasks.{name}.trigger", task.trigger)
        _check_kinds(dataset, f"tasks.{name}.outcome", task.outcome)
        if not set(task.trigger) <= set(sampled.kinds):
            raise _refusal(
                f"tasks.{name}.trigger", f"kinds of the sampled task, {list(sampled.kinds)}", list(task.trigger)
            )


def _check_relation(dataset: Dataset, where: str, relation: Relation) -> None:
    if hasattr(relation, "attribute"):
        declared = {"text": dataset.log.text, "number": dataset.log.number}[relation.ATTRIBUTE]
        if relation.attribute not in declared:
            raise _refusal(
                f"{where}.attribute", f"one of log.{relation.ATTRIBUTE}, {sorted(declared)}", relation.attribute
            )
    if getattr(relation, "within", None) == "session" and "session" not in dataset.log.columns:
        raise _refusal(f"{where}.within", "`visit`, because the log has no session column", "session")
    if hasattr(relation, "kinds"):
        _check_kinds(dataset, f"{where}.kinds", relation.kinds)
        if len({dataset.log.kinds[kind] for kind in relation.kinds}) > 1:
            raise _refusal(f"{where}.kinds", "kinds of one surface", list(relation.kinds))


def _check_kinds(dataset: Dataset, where: str, kinds: tuple[str, ...]) -> None:
    unknown = [kind for kind in kinds if kind not in dataset.log.kinds]
    if unknown or not kinds:
        raise _refusal(where, f"kinds of log.kinds, {sorted(dataset.log.kinds)}", unknown or "none")


def _typed(types: dict[str, type], raw: Any, where: str) -> Any:
    """Build the dataclass that `type:` names."""
    values = dict(raw) if isinstance(raw, dict) else {}
    name = values.pop("type", None)
    if name not in types:
        raise _refusal(f"{where}.type", f"one of {sorted(types)}", name if name is not None else raw)
    return build(types[name], values, where=where, manual=MANUAL)


def _entries(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if not raw:
        raise _refusal(where, "at least one named entry", raw)
    return raw


def _time_range(raw: Any) -> Window:
    try:
        start, end = (day if type(day) is date else date.fromisoformat(day) for day in raw)
    except (TypeError, ValueError) as error:
        raise _refusal("log.time_range", "[YYYY-MM-DD, YYYY-MM-DD]", raw) from error
    if start >= end:
        raise _refusal("log.time_range", "a first day before the day after the last", f"{start} to {end}")
    return Window(start, end)


def _refusal(problem: str, expected: str, got: object) -> InvalidConfig:
    return InvalidConfig(
        problem, expected=expected, got=got if isinstance(got, str) else repr(got),
        remedy="`pipelines/datasets/online_retail.yaml` explains every key.",
    )
