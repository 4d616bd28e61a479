"""Which version of a host answers: the state machine itself, without a channel, and what it remembers."""

import logging
import threading
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.host_state import HostMemory, HostState
from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import Unavailable, VersionNotFound
from tests.online.recorded_pin import recorded_pin
from tests.waiting import PATIENCE_S, joined

CANARY_ID = next(name for name in map(str, range(100)) if zlib.crc32(name.encode()) < 2**28)
OTHER_ID = next(name for name in map(str, range(100)) if zlib.crc32(name.encode()) >= 2**31)


@pytest.fixture(scope="module")
def opened(workspace_with_versions):
    workspace = workspace_with_versions.workspace
    return {version: VersionReader.open(workspace, version, verify=False) for version in (1, 2)}


@pytest.fixture
def hosted(opened) -> HostedVersions:
    hosted = HostedVersions(opened.__getitem__, unload_wait_s=0.0)
    hosted.load(1)
    return hosted


def answering(hosted, accepted=(1, 2), request_id="") -> int:
    with hosted.answering_from(accepted, request_id) as held:
        return held.reader.version


def refused(change, *arguments) -> Code:
    with pytest.raises(RpcError) as caught:
        change(*arguments)
    return caught.value.code


class TestChanges:
    def test_a_loaded_version_waits_for_its_promotion(self, hosted) -> None:
        hosted.load(2)
        assert answering(hosted) == 1
        hosted.promote(2)
        assert answering(hosted) == 2
        hosted.promote(1)
        assert answering(hosted) == 1

    def test_to_load_an_older_version_prefers_nothing_else(self, opened) -> None:
        hosted = HostedVersions(opened.__getitem__)
        hosted.load(2)
        hosted.load(1)
        assert answering(hosted) == 2

    def test_a_drained_version_answers_nothing_new_and_comes_back_by_loading(self, hosted) -> None:
        hosted.load(2)
        hosted.drain(1)
        with pytest.raises(RpcError) as caught, hosted.answering_from([1]):
            pass
        assert caught.value.code is Code.VERSION_NOT_AVAILABLE and caught.value.versions == (2,)
        with pytest.raises(RpcError, match="draining"):
            hosted.promote(1)
        hosted.load(1)
        assert answering(hosted, [1]) == 1
        assert answering(hosted) == 2

    def test_the_last_version_cannot_be_drained(self, hosted) -> None:
        assert refused(hosted.drain, 1) is Code.LAST_VERSION and answering(hosted) == 1

    def test_unloading_needs_a_drain_and_no_request_under_way(self, hosted) -> None:
        hosted.load(2)
        assert refused(hosted.unload, 1) is Code.STILL_ANSWERING
        with hosted.answering_from([1]) as held:
            hosted.drain(1)
            assert refused(hosted.unload, 1) is Code.IN_FLIGHT
            assert held.reader.lookup("item.kge", np.array([1]))[0].shape == (1, 10)
        hosted.unload(1)
        assert [entry.version for entry in hosted.status().versions] == [2]

    @pytest.mark.parametrize("loaded_again", [False, True])
    def test_unloading_waits_for_requests_under_way_or_for_another_loading(self, opened, loaded_again) -> None:
        waits, outcomes = threading.Event(), []

        def wait_for(changed: threading.Condition, unused: Callable[[], bool], seconds: float) -> bool:
            waits.set()
            return changed.wait_for(unused, seconds)

        def unload() -> None:
            try:
                outcomes.append(hosted.unload(1))
            except RpcError as refusal:
                outcomes.append(refusal.code)

        hosted = HostedVersions(opened.__getitem__, unload_wait_s=PATIENCE_S, wait_for=wait_for)
        hosted.load(1)
        hosted.load(2)
        unloading = threading.Thread(target=unload)
        with hosted.answering_from([1]):
            hosted.drain(1)
            unloading.start()
            assert waits.wait(PATIENCE_S)
            if loaded_again:
                hosted.load(1)
                joined(unloading)
        joined(unloading)
        assert outcomes == [Code.VERSION_NOT_LOADED if loaded_again else None]
        assert [entry.version for entry in hosted.status().versions] == ([1, 2] if loaded_again else [2])

    def test_every_change_may_be_repeated(self, hosted) -> None:
        for change, arguments in [("load", (2,)), ("promote", (2, 0.1)), ("promote", (2,)), ("drain", (1,)),
                                  ("unload", (1,))]:  # fmt: skip
            getattr(hosted, change)(*arguments)
            once = hosted.status()
            getattr(hosted, change)(*arguments)
            assert hosted.status() == once

    def test_loading_does_not_hold_up_reads(self, opened) -> None:
        began, go_on = threading.Event(), threading.Event()

        def slowly(version: int) -> VersionReader:
            if version == 2:
                began.set()
                assert go_on.wait(PATIENCE_S)
            return opened[version]

        hosted = HostedVersions(slowly)
        hosted.load(1)
        loading = threading.Thread(target=hosted.load, args=(2,))
        loading.start()
        assert began.wait(PATIENCE_S)
        assert answering(hosted) == 1
        go_on.set()
        joined(loading)
        assert answering(hosted, [2]) == 2

    def test_a_request_that_fails_is_no_answer(self, hosted) -> None:
        with pytest.raises(KeyError), hosted.answering_from([1]):
            raise KeyError
        assert answering(hosted) == 1
        entry = hosted.status().versions[0]
        assert (entry.in_flight, entry.answered) == (0, 1)


class TestCanary:
    @pytest.fixture
    def trying(self, hosted) -> HostedVersions:
        hosted.load(2)
        hosted.promote(2, 1 / 16)
        return hosted

    def test_it_answers_its_share_of_those_that_accept_it(self, trying) -> None:
        assert answering(trying, request_id=CANARY_ID) == 2
        assert answering(trying, request_id=OTHER_ID) == 1
        assert answering(trying, [1], CANARY_ID) == 1
        assert answering(trying, [2], OTHER_ID) == 2

    def test_it_ends_by_a_promotion_of_either_and_by_its_drain(self, trying) -> None:
        trying.promote(1)
        assert answering(trying, request_id=CANARY_ID) == 1 and trying.state().canary == 0
        trying.promote(2, 1 / 16)
        trying.drain(2)
        assert answering(trying, request_id=CANARY_ID) == 1 and trying.state().canary == 0
        trying.load(2)
        trying.promote(2, 1 / 16)
        trying.drain(1)  # it is all that is left
        assert trying.state() == HostState((1, 2), (1,), 2)

    def test_it_does_not_become_preferred_while_another_version_answers(self, opened) -> None:
        """Though it is older than the other one."""
        hosted = HostedVersions(lambda version: opened[min(version, 2)])
        for version in (1, 2, 3):
            hosted.load(version)
        hosted.promote(3)
        hosted.promote(1, 1 / 16)
        hosted.drain(3)
        assert hosted.state() == HostState((1, 2, 3), (3,), preferred=2, canary=1, canary_share=1 / 16)
        assert (answering(hosted, request_id=CANARY_ID), answering(hosted, request_id=OTHER_ID)) == (1, 2)

    @pytest.mark.parametrize("share", [0, -1, 1.0001, float("nan"), float("inf")])
    def test_a_share_is_of_the_requests(self, trying, share) -> None:
        assert refused(trying.promote, 2, share) is Code.INVALID_SHARE
        assert trying.state().canary_share == 1 / 16

    def test_what_is_preferred_cannot_be_tried_as_well(self, trying) -> None:
        assert refused(trying.promote, 1, 0.5) is Code.INVALID_SHARE

    @settings(max_examples=50, deadline=None)
    @given(request_id=st.text(max_size=20), share=st.floats(0, 1, exclude_min=True))
    def test_who_is_in_the_share_is_in_every_larger_one(self, opened, request_id, share) -> None:
        hosted = HostedVersions(opened.__getitem__)
        hosted.restore(HostState((1, 2), preferred=1, canary=2, canary_share=share))
        in_share = zlib.crc32(request_id.encode()) / 2**32 < share
        assert answering(hosted, request_id=request_id) == (2 if in_share else 1)


class TestMemory:
    def test_every_change_is_written_before_it_returns(self, opened, workspace_with_versions) -> None:
        written: list[HostState] = []
        hosted = HostedVersions(opened.__getitem__, remember=written.append)
        for change, arguments in [("load", (1,)), ("load", (2,)), ("promote", (2, 0.5)), ("promote", (2,)),
                                  ("drain", (1,)), ("drain", (1,)), ("unload", (1,))]:  # fmt: skip
            getattr(hosted, change)(*arguments)
            assert written[-1] == hosted.state()
        assert len(written) == 6

    def test_a_change_that_was_not_written_is_no_success_and_may_be_repeated(self, opened) -> None:
        written: list[HostState] = []

        def remember(state: HostState) -> None:
            if not written:
                written.append(state)
                raise OSError("disk full")
            written.append(state)

        hosted = HostedVersions(opened.__getitem__, remember=remember)
        with pytest.raises(OSError, match="disk full"):
            hosted.load(1)
        hosted.load(1)
        assert written[-1] == HostState((1,), preferred=1)

    @pytest.mark.parametrize("state", [
        HostState((1,), preferred=1), HostState((1, 2), preferred=2), HostState((1, 2), (1,), 2),
        HostState((1, 2), preferred=1, canary=2, canary_share=0.1),
    ])  # fmt: skip
    def test_a_host_comes_back_as_what_it_was(self, opened, own_workspace, state) -> None:
        memory = HostMemory(own_workspace.workspace, "cpu-1")
        memory.remember(state)
        hosted = HostedVersions(opened.__getitem__)
        hosted.restore(memory.recall())
        assert hosted.state() == state

    @staticmethod
    def without(opened, *missing: int) -> HostedVersions:
        def open_version(version: int) -> VersionReader:
            if version in missing:
                raise VersionNotFound(f"version {version}", expected="it", got="it was retired", remedy="None.")
            return opened[version]

        return HostedVersions(open_version)

    def test_a_version_that_is_gone_is_logged_and_left_out(self, opened, caplog) -> None:
        hosted = self.without(opened, 2)
        with caplog.at_level(logging.ERROR):
            hosted.restore(HostState((1, 2), preferred=2, canary=0))
        assert "version 2, which this host served, cannot be served any more" in caplog.text
        assert hosted.state() == HostState((1,), preferred=1)

    def test_a_host_without_any_version_that_answers_does_not_start(self, opened) -> None:
        with pytest.raises(VersionNotFound, match="retired"):
            self.without(opened, 2).restore(HostState((1, 2), (1,), 2))
        with pytest.raises(VersionNotFound):
            self.without(opened, 2).restore(HostState((1, 2), preferred=1), whole=True)


def test_a_version_is_pinned_from_before_it_is_opened_until_after_it_is_let_go(opened) -> None:
    """Else it could be retired in between, and its files be gone from under whoever opens them."""
    happened: list[str] = []

    def open_version(version: int) -> VersionReader:
        happened.append(f"open {version}")
        if version == 3:
            raise VersionNotFound("version 3", expected="it", got="it was retired", remedy="None.")
        return opened[version]

    hosted = HostedVersions(open_version, pin=recorded_pin(happened))
    for version in (1, 2):
        hosted.load(version)
    with pytest.raises(VersionNotFound):
        hosted.load(3)
    assert happened == ["pin 1", "open 1", "pin 2", "open 2", "pin 3", "open 3", "release 3"]
    hosted.drain(1)
    hosted.unload(1)
    hosted.unload(1)
    assert happened[7:] == ["release 1"]
    hosted.close()
    assert happened[8:] == ["release 2"]


def test_a_version_whose_rows_cannot_be_read_never_answers(opened, monkeypatch) -> None:
    """A row of every table is read before: on a new machine, the first lookup also compiles for seconds."""

    def unreadable(ids) -> None:
        raise Unavailable("rows", expected="an answer", got="none", remedy="Start the server.")

    monkeypatch.setattr(opened[2].tables["item.kge"], "lookup", unreadable)
    hosted = HostedVersions(opened.__getitem__)
    hosted.load(1)
    with pytest.raises(Unavailable):
        hosted.load(2)
    assert hosted.state() == HostState((1,), preferred=1)
