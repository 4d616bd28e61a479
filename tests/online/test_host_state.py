"""A host with a name comes back as what it was."""

from dataclasses import dataclass, field

import pytest

from online.host_state import HostMemory, HostState, restore
from pipelines.contracts.errors import IntegrityError, InvalidConfig, VersionNotFound


@dataclass
class Holder:
    """Holds whatever it is told to, of versions 1 to 3."""

    held: HostState = field(default_factory=lambda: HostState(()))
    whole: list[bool] = field(default_factory=list)

    def restore(self, state: HostState, *, whole: bool = False) -> None:
        self.whole.append(whole)
        if set(state.loaded) - {1, 2, 3}:
            raise VersionNotFound("version", expected="1 to 3", got=str(state.loaded), remedy="Publish it.")
        self.held = state

    def state(self) -> HostState:
        return self.held


def test_it_becomes_what_it_was_or_else_what_it_is_told_to_be(own_workspace) -> None:
    memory, first = HostMemory(own_workspace.workspace, "cpu-7"), HostState.at_first((2, 1, 2))
    assert first == HostState((1, 2), preferred=2)
    assert HostState.at_first((1, 3)) == HostState((1, 3), preferred=1)
    holder = Holder()
    restore(holder, memory, first)
    assert holder.whole == [True] and holder.held == memory.recall() == first, "remembered from the first moment on"
    memory.remember(HostState((2, 3), (2,), 3))
    again = Holder()
    restore(again, memory, first)
    assert again.whole == [False] and again.held == HostState((2, 3), (2,), 3)
    without_a_name = Holder()
    restore(without_a_name, None, first)
    assert without_a_name.whole == [True] and without_a_name.held == first


def test_what_could_not_be_held_is_not_remembered(own_workspace) -> None:
    memory = HostMemory(own_workspace.workspace, "cpu-7")
    with pytest.raises(VersionNotFound):
        restore(Holder(), memory, HostState.at_first((4,)))
    assert memory.recall() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"loaded": 3, "draining": []}', '{"loaded": [1], "new": 1}'])
def test_a_memory_that_cannot_be_read_says_so(own_workspace, text) -> None:
    memory = HostMemory(own_workspace.workspace, "cpu-1")
    memory.remember(HostState((1,)))
    memory.path.write_text(text)
    with pytest.raises(IntegrityError, match="Delete it"):
        memory.recall()


def test_a_name_is_one_running_hosts_alone(own_workspace) -> None:
    mine = HostMemory(own_workspace.workspace, "cpu-1").claimed()
    with pytest.raises(InvalidConfig, match="named cpu-1: expected a name that no running host"):
        HostMemory(own_workspace.workspace, "cpu-1").claimed()
    HostMemory(own_workspace.workspace, "cpu-2").claimed()
    mine.remember(HostState((1,)))  # which replaces the file beside the lock
    with pytest.raises(InvalidConfig, match="taken"):
        HostMemory(own_workspace.workspace, "cpu-1").claimed()
