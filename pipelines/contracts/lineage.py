"""What an artefact was made from, down to the log: the content of its inputs, and the settings.

```
log ──► events ─┬─► pairs ────► contrastive ─┐
                ├─► graph ────► kge ─────────┤
                ├─► examples ────────────────┼─► ranker ──► release ──► version
                └─► views ───────────────────┘
```

Every stage writes a lineage beside what it makes. A stage asks it what no longer fits: an input whose content is
another one now, or a setting. Times of files say nothing, nor do their names.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.contracts.durable import replacing_file, sha256_of
from pipelines.contracts.errors import InvalidConfig, NotPrepared, StaleInput
from pipelines.contracts.names import sha256_name
from pipelines.contracts.strict import build

__all__ = ["Lineage", "lineage_of"]


def lineage_of(path: Path) -> Path:
    """Where the lineage of a file or a folder lies: beside it.

    >>> lineage_of(Path("runs/v1/pairs.parquet")).name, lineage_of(Path("runs/v1/graph")).name
    ('pairs.lineage.json', 'graph.lineage.json')
    """
    return path.with_name(f"{path.name.removesuffix('.parquet')}.lineage.json")


@dataclass(frozen=True)
class Lineage:
    """How one artefact came about.

    Attributes:
        what: its name, such as `pairs of run v1`.
        files: name -> SHA-256 of each of its files.
        settings: what else its content depends on, as JSON values.
        inputs: name -> lineage of what it was made from.
    """

    what: str
    files: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, "Lineage"] = field(default_factory=dict)

    @classmethod
    def of(
        cls, what: str, files: Iterable[Path], *, within: Path, settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, "Lineage"] | None = None,
    ) -> "Lineage":
        """The lineage of files that were just made; they are hashed.

        Args:
            within: the folder that their names are relative to.
        """
        hashes = {str(path.relative_to(within)): sha256_of(path) for path in sorted(files)}
        return cls(what, hashes, _as_json(settings or {}), dict(inputs or {}))

    @classmethod
    def record(
        cls, what: str, path: Path, *, settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, "Lineage"] | None = None, files: Iterable[Path] | None = None,
    ) -> "Lineage":
        """Write the lineage of what was just made at `path`, a file or a folder, beside it.

        Args:
            files: those that count as its content, where some do not; by default all of them.
        """
        if files is None:
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        lineage = cls.of(what, files, within=path.parent, settings=settings, inputs=inputs)
        lineage.write(lineage_of(path))
        return lineage

    @cached_property
    def content(self) -> str:
        """SHA-256 of what the files hold: artefacts of one content are the same, however they came about."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def changes(
        self, *, settings: Mapping[str, Any] | None = None, inputs: Mapping[str, "Lineage"] | None = None
    ) -> list[str]:
        """What is not as it was when this was made, in words; nothing: it can stay as it is.

        Args:
            settings, inputs: what it would be made from now.
        """
        return self._changes(dict(settings or {}), dict(inputs or {}), set())

    def _changes(self, settings: dict[str, Any], inputs: dict[str, "Lineage"], told: set[tuple[str, str]]) -> list[str]:
        return [
            *(f"setting {line}" for line in _different(self.settings, _as_json(settings), "")),
            *_different_inputs(self.inputs, inputs, told),
        ]

    # ---- Its file ----

    def write(self, path: Path) -> None:
        with replacing_file(path) as staging:
            staging.write_text(json.dumps(self.to_dict(), indent=1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON: each artefact once, after those that it was made from, which it names by their places; itself last.

        ```
        {"artefacts": [{"what": "the log", …, "inputs": {}}, {"what": "the events", …, "inputs": {"log": 0}}]}
        ```
        """
        places: dict[str, int] = {}
        placed: dict[int, int] = {}  # by identity: what several were made from is gone through once

        def place(lineage: Lineage) -> int:
            if id(lineage) not in placed:
                inputs = {name: place(lineage.inputs[name]) for name in sorted(lineage.inputs)}
                entry = {"what": lineage.what, "files": lineage.files, "settings": lineage.settings, "inputs": inputs}
                placed[id(lineage)] = places.setdefault(json.dumps(entry, sort_keys=True), len(places))
            return placed[id(lineage)]

        place(self)
        return {"artefacts": [json.loads(entry) for entry in places]}

    @classmethod
    def from_dict(cls, raw: Any, *, where: str) -> "Lineage":
        """What `to_dict` gave; raises `InvalidConfig` for anything else."""
        written = build(_Written, raw, where=where, manual=_MANUAL)
        made: list[Lineage] = []
        try:
            for each in written.artefacts:
                for sha256 in each.files.values():
                    sha256_name(sha256)
                if wrong := [place for place in each.inputs.values() if not 0 <= place < len(made)]:
                    raise ValueError(f"{each.what} made from places {wrong}, which do not stand before it")
                inputs = {name: made[place] for name, place in each.inputs.items()}
                made.append(cls(each.what, each.files, each.settings, inputs))
            if not made or made[-1].to_dict() != raw:
                raise ValueError(f"{[each.what for each in made]}, of which some stand twice or led to nothing")
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(
                where, expected="each artefact once, after all that it was made from", got=str(error),
                remedy=f"`{_MANUAL}` explains it.",
            ) from error
        return made[-1]

    @classmethod
    def recorded(cls, path: Path, *, stage: str) -> "Lineage":
        """The lineage in a file; whether its artefact is there and whole is not looked at.

        Args:
            stage: what writes it, such as `prepare --run v1`, for the remedy.

        Raises:
            NotPrepared: no such file.
            StaleInput: it cannot be understood.
        """
        remedy = f"Run `facet {stage}`."
        try:
            return cls.from_dict(json.loads(path.read_text()), where=str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotPrepared(
                f"{path} is not there", expected=f"what `facet {stage}` writes", got="nothing", remedy=remedy
            ) from error
        except (ValueError, RecursionError, InvalidConfig) as error:
            raise StaleInput(
                f"{path} cannot be understood", expected="what an artefact was made of", got=str(error), remedy=remedy
            ) from error

    @classmethod
    def read(cls, path: Path, *, stage: str) -> "Lineage":
        """The lineage in a file, whose artefact lies beside it, whole and as it was made.

        Args:
            stage: what writes it, such as `prepare --run v1`, for the remedy.

        Raises:
            NotPrepared: no such file, or one of the artefact's is missing.
            StaleInput: a file is not the one that was made, or the lineage cannot be understood.
        """
        lineage, remedy = cls.recorded(path, stage=stage), f"Run `facet {stage}`."
        for name, sha256 in lineage.files.items():
            file = path.parent / name
            if not file.is_file():
                raise NotPrepared(f"{file} is not there", expected=lineage.what, got="nothing", remedy=remedy)
            if (found := sha256_of(file)) != sha256:
                raise StaleInput(
                    f"{file}", expected=f"the file that `facet {stage}` wrote, sha256 {sha256}", got=found,
                    remedy=remedy,
                )
        return lineage


_MANUAL = "pipelines/contracts/lineage.py"


@dataclass(frozen=True)
class _Artefact:
    what: str
    files: dict[str, str]
    settings: dict[str, Any]
    inputs: dict[str, int]


@dataclass(frozen=True)
class _Written:
    """A lineage as JSON has it."""

    artefacts: tuple[_Artefact, ...]


def _as_json(value: Any) -> Any:
    """A value as JSON gives it back; dates as text."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _different(before: Any, now: Any, name: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in _different(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name}: {json.dumps(before)}, now {json.dumps(now)}"]


def _different_inputs(before: dict[str, Lineage], now: dict[str, Lineage], told: set[tuple[str, str]]) -> list[str]:
    """The inputs whose content changed, each with its causes unless `told` has them: (content before, content now)."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            lines.append(f"{name}, which is {'new' if old is None else 'no longer used'}")
        elif old.content != new.content:
            known = (old.content, new.content) in told
            told.add((old.content, new.content))
            causes = [] if known else old._changes(new.settings, new.inputs, told)
            lines.append(f"{new.what}{' (' + '; '.join(causes) + ')' if causes else ''}")
    return lines
