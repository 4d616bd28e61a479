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
        return [
            *(f"setting {line}" for line in _different(self.settings, _as_json(settings or {}), "")),
            *_different_inputs(self.inputs, dict(inputs or {})),
        ]

    # ---- Its file ----

    def write(self, path: Path) -> None:
        with replacing_file(path) as staging:
            staging.write_text(json.dumps(self.to_dict(), indent=1))

    def to_dict(self) -> dict[str, Any]:
        inputs = {name: lineage.to_dict() for name, lineage in self.inputs.items()}
        return {"what": self.what, "files": self.files, "settings": self.settings, "inputs": inputs}

    @classmethod
    def from_dict(cls, raw: Any, *, where: str) -> "Lineage":
        """Raises `InvalidConfig` for what is none."""
        written = build(_Written, raw, where=where, manual="pipelines/contracts/lineage.py")
        inputs = {name: cls.from_dict(each, where=f"{where}.inputs.{name}") for name, each in written.inputs.items()}
        return cls(written.what, written.files, written.settings, inputs)

    @classmethod
    def read(cls, path: Path, *, stage: str) -> "Lineage":
        """The lineage in a file, whose artefact lies beside it, whole and as it was made.

        Args:
            stage: what writes it, such as `prepare --run v1`, for the remedy.

        Raises:
            NotPrepared: no such file, or one of the artefact's is missing.
            StaleInput: a file is not the one that was made, or the lineage cannot be understood.
        """
        remedy = f"Run `facet {stage}`."
        try:
            lineage = cls.from_dict(json.loads(path.read_text()), where=str(path))
        except FileNotFoundError as error:
            raise NotPrepared(
                f"{path} is not there", expected=f"what `facet {stage}` writes", got="nothing", remedy=remedy
            ) from error
        except (ValueError, RecursionError, InvalidConfig) as error:
            raise StaleInput(
                f"{path} cannot be understood", expected="what an artefact was made of", got=str(error), remedy=remedy
            ) from error
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


@dataclass(frozen=True)
class _Written:
    what: str
    files: dict[str, str]
    settings: dict[str, Any]
    inputs: dict[str, Any]


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


def _different_inputs(before: dict[str, Lineage], now: dict[str, Lineage]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            lines.append(f"{name}, which is {'new' if old is None else 'no longer used'}")
        elif old.content != new.content:
            causes = old.changes(settings=new.settings, inputs=new.inputs)
            lines.append(f"{new.what}{' (' + '; '.join(causes) + ')' if causes else ''}")
    return lines
