"""What a host serves, written down at every change, so that a restarted host comes back as what it was.

```
<workspace>/hosts/<name>.json     {"loaded": [1, 2], "draining": [1], "preferred": 2, "canary": 0, "canary_share": 0.0}
```

A rollout does not go on while a host is away, so what a host held when it died is what the fleet expects it to hold.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, Self

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import IntegrityError, InvalidConfig
from pipelines.contracts.locks import locked
from pipelines.contracts.workspace import Workspace

__all__ = ["HostMemory", "HostState", "recalled", "restore"]


@dataclass(frozen=True)
class HostState:
    """What one host holds.

    Attributes:
        loaded: versions, ascending.
        draining: those of them that answer nothing new.
        preferred: answered first where accepted; of no meaning on a ranker.
        canary, canary_share: tried on this share of the requests; 0: none.
    """

    loaded: tuple[int, ...]
    draining: tuple[int, ...] = ()
    preferred: int = 0
    canary: int = 0
    canary_share: float = 0.0

    @classmethod
    def at_first(cls, versions: Sequence[int]) -> Self:
        """Of a host that is started with these, the preferred one first."""
        return cls(tuple(sorted(set(versions))), preferred=versions[0])

    @classmethod
    def from_dict(cls, raw: dict) -> "HostState":
        """What `asdict` and JSON made of one."""
        return cls(**{**raw, "loaded": tuple(raw["loaded"]), "draining": tuple(raw["draining"])})


class HostMemory:
    """The state file of a host that has a name.

    Raises:
        InvalidConfig: the name is no plain file name.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        if not name or Path(name).name != name or name.startswith("."):
            raise InvalidConfig(
                "name of a host", expected="a plain name such as cpu-1", got=repr(name), remedy="Choose another."
            )
        self.path = workspace.root / "hosts" / f"{name}.json"
        self._claim = ExitStack()  # open as long as this process lives

    def claimed(self) -> Self:
        """This memory, the name being this process's alone until it ends; raises `InvalidConfig` if another has it."""
        mine = self.path.with_suffix(".lock")
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.touch()
        if not self._claim.enter_context(locked(mine)):
            raise InvalidConfig(
                f"a host named {self.path.stem}", expected="a name that no running host of this workspace has",
                got="one that is taken", remedy="Choose another, or stop the process that has it.",
            )
        return self

    def recall(self) -> HostState | None:
        """What it held last; None if it never held anything. Raises `IntegrityError` if the file cannot be read."""
        if not self.path.is_file():
            return None
        try:
            return HostState.from_dict(json.loads(self.path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.path} cannot be read", expected="what the host held", got=repr(error),
                remedy="Delete it, and start the host with --versions.",
            ) from error

    def remember(self, state: HostState) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(self.path) as staging:
            staging.write_text(json.dumps(asdict(state)))


class Holder(Protocol):
    """What comes back as what it was."""

    def restore(self, state: HostState, *, whole: bool = False) -> None: ...

    def state(self) -> HostState: ...


def recalled(memory: HostMemory | None, first: HostState) -> tuple[HostState, bool]:
    """What to hold: what the memory has, or else `first`; and whether it is `first`, all of which has to be there."""
    remembered = memory.recall() if memory else None
    return remembered or first, remembered is None


def restore(holder: Holder, memory: HostMemory | None, first: HostState) -> None:
    """Become what it was; without a memory, or with an empty one, `first`, which is remembered once it is held."""
    state, is_first = recalled(memory, first)
    holder.restore(state, whole=is_first)
    if memory and is_first:
        memory.remember(holder.state())
