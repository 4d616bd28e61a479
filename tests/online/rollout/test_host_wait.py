"""Waiting for hosts that are away: for so long in one stretch, said once."""

import pytest

from online.rollout.host_wait import RETRY_S, HostWait
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import Unavailable
from tests.waiting import FakeClock

REFUSAL = RpcError(Code.LOOKUP_UNAVAILABLE, "cpu-1 did not answer", expected="an answer", got="none", remedy="Wait.")
PATIENCE_S = 4 * RETRY_S


def test_a_host_is_asked_again_until_the_stretch_is_too_long() -> None:
    clock, said = FakeClock(), []
    wait = HostWait(PATIENCE_S, said.append, clock)
    for _ in range(4):
        wait.wait(REFUSAL)
    with pytest.raises(Unavailable, match=r"cpu-1 did not answer, for 1 s.*--change-hosts"):
        wait.wait(REFUSAL)
    assert clock.slept == [RETRY_S] * 4 and said == ["waiting up to 1 s: cpu-1 did not answer"]


def test_progress_begins_another_stretch() -> None:
    clock, said = FakeClock(), []
    wait = HostWait(PATIENCE_S, said.append, clock)
    for _ in range(3):
        for _ in range(4):
            wait.wait(REFUSAL)
        wait.restored()
    assert len(clock.slept) == 12 and len(said) == 3


def test_time_that_passes_elsewhere_counts() -> None:
    clock = FakeClock()
    wait = HostWait(PATIENCE_S, lambda text: None, clock)
    wait.wait(REFUSAL)
    clock.advance(PATIENCE_S)  # asking takes its time too
    with pytest.raises(Unavailable):
        wait.wait(REFUSAL)


def test_without_patience_nothing_is_slept() -> None:
    clock = FakeClock()
    with pytest.raises(Unavailable):
        HostWait(0.0, lambda text: None, clock).wait(REFUSAL)
    assert clock.slept == []
