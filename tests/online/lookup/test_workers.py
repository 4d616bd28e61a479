"""Workers of one host, as processes: they answer as one, share pages, come back as they were, end with their parent."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

import grpc
import numpy as np
import pytest

from online.clock import Clock
from online.host_state import HostState
from online.lookup import workers as workers_of_a_host
from online.lookup.client import LookupClient
from online.lookup.worker_process import Watch, WorkerProcess, exit_status
from online.lookup.workers import Workers, merged, reserve_port, state_of
from online.proto import admin_pb2, admin_pb2_grpc
from online.rpc.channel import open_channel
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import InvalidConfig, Unavailable
from tests.fleet import FACET, descendants, free_ports
from tests.releases import published_rows
from tests.waiting import PATIENCE_S, FakeClock, joined, until

IDS = {"item.kge": np.arange(3)}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def is_stopped(pid: int) -> bool:
    """Whether every thread is: on another core one may go on for a moment after SIGSTOP was sent, and answer."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in threads} == {"T"}


class Traffic:
    """Lookups without pause from a thread; every failure is kept."""

    def __init__(self, address: str) -> None:
        self._client = LookupClient([address], timeout_s=PATIENCE_S, attempts=20, connections=4)
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._send)
        self.versions: list[int] = []
        self.failures: list[BaseException] = []

    def _send(self) -> None:
        while not self._stop.is_set():
            try:
                self.versions.append(self._client.lookup([1, 2], IDS).version)
            except Exception as error:
                self.failures.append(error)
                return

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        joined(self._thread)
        self._client.close()

    def more(self, count: int = 200) -> list[int]:
        """Versions of so many answers from now on."""
        begin = len(self.versions)
        until(lambda: len(self.versions) >= begin + count or self.failures)
        return self.versions[begin:]


def shared_and_private_bytes(pid: int, name: str) -> tuple[int, int]:
    """Of this process's maps of files whose path contains `name`."""
    shared = private = 0
    mine = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mine = name in line
        elif mine and (match := re.match(r"(Shared|Private)_(?:Clean|Dirty): +(\d+) kB", line)):
            if match[1] == "Shared":
                shared += int(match[2])
            else:
                private += int(match[2])
    return shared, private


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Workers in this process give one that has just come up minutes to say what it holds."""
    monkeypatch.setattr(workers_of_a_host, "STATUS_S", PATIENCE_S)


def when_all_answer(admin: admin_pb2_grpc.CpuTierAdminStub) -> admin_pb2.CpuTierStatus:
    """The status of a host once its two workers answer in the few seconds that it gives them."""
    answers: list[admin_pb2.CpuTierStatus] = []

    def all_answer() -> bool:
        try:
            answers.append(admin.Status(admin_pb2.StatusRequest(), timeout=PATIENCE_S))
        except grpc.RpcError as error:
            assert dict(error.trailing_metadata())["facet-error"] == "DEADLINE"
            return False
        return answers[-1].workers == 2

    until(all_answer)
    return answers[-1]


@pytest.mark.slow
def test_a_host_with_workers_from_start_to_stop(own_workspace, launch) -> None:
    workspace, (port, admin_port) = own_workspace.workspace, free_ports(2)
    words = ("serve", "cpu-tier", "--versions", "1,2", "--workers", "2", "--name", "cpu-1", "--metrics-port", "0")
    words += ("--port", str(port), "--admin-port", str(admin_port))
    host = launch(workspace, *words).wait_ready()
    first, second = workers = host.ready["workers"]
    assert sorted(workers) == sorted(descendants(host.process.pid)) and host.ready["versions"] == [1, 2]
    for pid in workers:  # the same pages
        shared, private = shared_and_private_bytes(pid, "rows.npy")
        assert shared > 0 and private == 0

    with open_channel(host.port("admin")) as channel, Traffic(host.port("lookup")) as traffic:
        admin = admin_pb2_grpc.CpuTierAdminStub(channel)
        # a change reaches all before it is answered
        promoted = admin.Promote(admin_pb2.VersionRequest(version=2), timeout=PATIENCE_S)
        assert (promoted.preferred, promoted.workers) == (2, 2)
        assert set(traffic.more()[4:]) == {2}
        with pytest.raises(grpc.RpcError) as caught:
            admin.Load(admin_pb2.VersionRequest(version=9), timeout=PATIENCE_S)
        assert dict(caught.value.trailing_metadata())["facet-error"] == "VERSION_NOT_PUBLISHED"
        # each worker is killed, so that then only restarted ones answer: as the host was, not as it was started
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: pid not in descendants(host.process.pid))
            when_all_answer(admin)
        assert not {first, second} & set(descendants(host.process.pid))
        assert set(traffic.more()) == {2} and not traffic.failures
        # a change while a worker is away waits for it
        os.kill(descendants(host.process.pid)[0], signal.SIGKILL)
        for change in (admin.Drain, admin.Unload):
            change(admin_pb2.VersionRequest(version=1), timeout=PATIENCE_S)
        assert {2} == set(traffic.more()) and not traffic.failures
        assert [entry.version for entry in when_all_answer(admin).versions] == [2]

    # killed, the parent takes its workers along; started again with other --versions, the host is what it was
    workers = descendants(host.process.pid)
    host.kill()
    until(lambda: all(map(is_gone, workers)))
    again = launch(workspace, *words).wait_ready()
    assert again.ready["versions"] == [2] and again.ready["ports"]["lookup"] == port
    taken = launch(workspace, "serve", "cpu-tier", "--versions", "1", "--workers", "2", "--port", str(port))
    ids, rows = published_rows(workspace, 2, "item.kge")
    client = LookupClient([again.port("lookup")], timeout_s=PATIENCE_S)
    np.testing.assert_array_equal(client.lookup([1, 2], {"item.kge": ids}).rows["item.kge"], rows)
    client.close()
    status, said, errors = taken.finish()
    assert (status, said) == (2, "") and f"cannot listen on 127.0.0.1:{port}" in errors and "Traceback" not in errors
    workers = descendants(again.process.pid)
    assert again.stop() == 0
    assert all(map(is_gone, workers))


def test_a_named_host_of_one_process_comes_back_as_what_it_was(own_workspace, launch) -> None:
    words = ("serve", "cpu-tier", "--versions", "1", "--name", "cpu-1", "--port", str(free_ports(1)[0]))
    host = launch(own_workspace.workspace, *words).wait_ready()
    with open_channel(host.port("admin")) as channel:
        admin = admin_pb2_grpc.CpuTierAdminStub(channel)
        admin.Load(admin_pb2.VersionRequest(version=2), timeout=PATIENCE_S)
        admin.Promote(admin_pb2.VersionRequest(version=2, share=0.25), timeout=PATIENCE_S)
    host.kill()
    host = launch(own_workspace.workspace, *words).wait_ready()
    with open_channel(host.port("admin")) as channel:
        status = admin_pb2_grpc.CpuTierAdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=PATIENCE_S)
    assert (status.preferred, status.canary, status.canary_share, status.workers) == (1, 2, 0.25, 1)
    assert [entry.version for entry in status.versions] == [1, 2]


class Looks:
    """A watch that looks at a worker when the test says so, and else only notices its end."""

    def __init__(self) -> None:
        self._due: Counter[int] = Counter()
        self._taken: Counter[int] = Counter()

    def exit_status(self, process: subprocess.Popen, within_s: float) -> int | None:
        while (status := exit_status(process, 0.005)) is None:
            if self._taken[process.pid] < self._due[process.pid]:
                self._taken[process.pid] += 1
                return None
        return status

    def give(self, pid: int, count: int) -> None:
        """Have so many looks taken; returns when the worker is watched again after the last."""
        self._due[pid] += count + 1
        until(lambda: self._taken[pid] == self._due[pid] or is_gone(pid))


def test_a_worker_that_hangs_is_killed_and_another_one_answers(workspace_with_versions, caplog) -> None:
    workspace, looks = workspace_with_versions.workspace, Looks()
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        command = [*FACET, "--workspace", str(workspace.root), "serve", "cpu-tier", "--port", str(port), "--worker"]
        watch = Watch(answer_s=0.5, exit_status=looks.exit_status)
        workers = Workers(command, 2, state=HostState.at_first((1,)), whole=True, watch=watch)
        try:
            workers.start()
            hangs, works = workers.pids
            os.kill(hangs, signal.SIGSTOP)
            until(lambda: is_stopped(hangs))
            looks.give(hangs, watch.missed)
            until(lambda: is_gone(hangs))
            assert re.search(rf"worker 0 \(pid {hangs}\) hangs: killed", caplog.text)
            until(lambda: workers.status(PATIENCE_S).workers == 2)
            assert hangs not in workers.pids and workers.pids[1] == works
            os.kill(works, signal.SIGSTOP)  # a pause that is over in time
            until(lambda: is_stopped(works))
            with pytest.raises(RpcError) as refused:
                workers.status(0.5)
            assert refused.value.code is Code.DEADLINE
            os.kill(works, signal.SIGCONT)
            assert workers.status(PATIENCE_S).workers == 2 and workers.pids[1] == works
        finally:
            workers.stop()


class Scripted(WorkerProcess):
    """Answers whether it is there as it is told, and so long as it lives."""

    def __init__(self, answers: str) -> None:
        super().__init__(0, [], Path("none"), {}, Watch(exit_status=lambda process, within_s: process.poll()))
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self._script = iter(answers)
        self.looked = 0

    def is_there(self, timeout_s: float, *, wait_for_ready: bool = False) -> bool:
        self.looked += 1
        answer = next(self._script, None)
        if answer is None:  # nothing is left to be said: it ends by itself
            self.process.communicate(b"\n", PATIENCE_S)
        return answer != "-"


@pytest.mark.parametrize(
    ("answers", "looked", "status"),
    [("---", 3, -signal.SIGKILL), ("--+--+---", 9, -signal.SIGKILL), ("--+--+--", 9, 0), ("", 1, 0)],
)
def test_who_does_not_answer_three_times_in_a_row_is_killed(answers, looked, status) -> None:
    worker = Scripted(answers)
    try:
        assert worker.ended(threading.Event()) == status
        assert looked <= worker.looked if status else looked == worker.looked
    finally:
        worker.process.kill()
        worker.process.communicate()


def test_a_host_that_stops_kills_nobody_for_its_silence() -> None:
    worker, stopping = Scripted("-----"), threading.Event()
    stopping.set()
    ending = threading.Thread(target=worker.ended, args=(stopping,))
    ending.start()
    worker.process.communicate(b"\n", PATIENCE_S)
    joined(ending)
    assert worker.process.returncode == 0 and worker.looked == 0


WORKER = """
import sys
from threading import Event
from types import SimpleNamespace
from online.lookup.hosted import HostedVersions
from online.lookup.service import CpuTierAdminService
from online.lookup.worker import state_from_parent, worker_admin
from online.proto import admin_pb2_grpc
from online.rpc.server import serve_until_stopped
from pipelines.contracts.errors import Unavailable

def opened(version):
    if version == 2:
        raise Unavailable("Redis", expected="an answer", got="none", remedy="Start it.")
    if version == 3:
        Event().wait()
    return SimpleNamespace(tables={}, manifest=SimpleNamespace(sha256=str(version)))

state, whole = state_from_parent(sys.argv[1])
hosted = HostedVersions(opened)
hosted.restore(state, whole=whole)
admin = worker_admin(sys.argv[1])
admin_pb2_grpc.add_CpuTierAdminServicer_to_server(CpuTierAdminService(hosted), admin.server)
serve_until_stopped([admin], dict)
"""


def test_a_worker_that_refuses_or_is_busy_with_changes_lives_on() -> None:
    looks = Looks()
    watch = Watch(answer_s=PATIENCE_S, exit_status=looks.exit_status)
    workers = Workers([sys.executable, "-c", WORKER], 2, state=HostState.at_first((1,)), whole=True, watch=watch)
    try:
        workers.start()
        pids = workers.pids
        with pytest.raises(RpcError) as refused:
            workers.change("Load", admin_pb2.VersionRequest(version=2), PATIENCE_S)
        assert refused.value.code is Code.LOOKUP_UNAVAILABLE and "Redis" in str(refused.value)
        for _ in range(8):  # loads that nobody waits for any more hold all their threads
            with pytest.raises(RpcError) as refused:
                workers.change("Load", admin_pb2.VersionRequest(version=3), 0.1)
            assert refused.value.code is Code.DEADLINE
        for pid in pids:
            looks.give(pid, watch.missed + 1)
        assert workers.pids == pids and not any(map(is_gone, pids))
    finally:
        workers.stop()


def test_pauses_before_a_worker_is_started_again_grow_and_begin_anew(tmp_path) -> None:
    broken, pauses = tmp_path / "broken", []

    def pause(stopping: threading.Event, seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) in (8, 9):
            broken.unlink()
        return stopping.is_set()

    def answers() -> bool:
        with suppress(RpcError):
            return workers.status(PATIENCE_S).workers == 1
        return False

    script = f"import os, sys\nif os.path.exists({str(broken)!r}): sys.exit(3)\n{WORKER}"
    workers = Workers(
        [sys.executable, "-c", script], 1, state=HostState.at_first((1,)), whole=True, watch=Watch(pause=pause)
    )
    try:
        workers.start()
        for expected in ([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], [0.1]):
            before = len(pauses)
            broken.touch()
            os.kill(workers.pids[0], signal.SIGKILL)
            until(lambda: not broken.exists() and answers())
            assert pauses[before:] == expected
    finally:
        workers.stop()


def test_a_worker_that_does_not_come_up_is_killed(caplog) -> None:
    watch = Watch(clock=Clock(now=count(0, 2000).__next__), start_s=3600)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]  # lives, and never listens
    workers = Workers(command, 1, state=HostState.at_first((1,)), whole=True, watch=watch)
    with pytest.raises(Unavailable, match="workers did not start"):
        workers.start()
    assert re.search(r"worker 0 \(pid \d+\) does not come up: killed", caplog.text)
    assert all(map(is_gone, workers.pids))


def test_workers_that_cannot_start_say_why(workspace_with_versions, launch) -> None:
    status, said, errors = launch(
        workspace_with_versions.workspace, "serve", "cpu-tier", "--versions", "9", "--workers", "2"
    ).finish()
    assert (status, said) == (2, "")
    assert "version 9" in errors and "workers did not start" in errors and "Traceback" not in errors


def status_of(*versions: tuple[int, bool, int, int], preferred: int = 1) -> admin_pb2.CpuTierStatus:
    return admin_pb2.CpuTierStatus(
        versions=[
            admin_pb2.HostedVersion(version=v, manifest_sha256=str(v), draining=d, in_flight=i, answered=a)
            for v, d, i, a in versions
        ],
        preferred=preferred, canary=2, canary_share=0.5, shard=1, shards=2, workers=1,
    )  # fmt: skip


def test_a_version_answers_if_any_worker_answers_it_and_counts_add_up() -> None:
    one = status_of((1, True, 2, 10), (2, False, 0, 5))
    other = status_of((1, False, 1, 20), (2, False, 3, 6), (3, True, 0, 0))
    host = merged([one, other])
    assert host == admin_pb2.CpuTierStatus(
        versions=[
            admin_pb2.HostedVersion(version=1, manifest_sha256="1", draining=False, in_flight=3, answered=30),
            admin_pb2.HostedVersion(version=2, manifest_sha256="2", draining=False, in_flight=3, answered=11),
            admin_pb2.HostedVersion(version=3, manifest_sha256="3", draining=True),
        ],
        preferred=1, canary=2, canary_share=0.5, shard=1, shards=2, workers=2,
    )  # fmt: skip
    assert merged([one]) == one
    state = state_of(host)
    assert (state.loaded, state.draining, state.preferred, state.canary) == ((1, 2, 3), (3,), 1, 2)


class TestReservePort:
    def test_only_workers_share_it(self) -> None:
        with reserve_port("127.0.0.1", 0) as held:
            port = held.getsockname()[1]
            workers = [Endpoint("lookup", "127.0.0.1", port, 1, reuse_port=True) for _ in range(2)]
            for worker in workers:
                worker.start()
            with pytest.raises(InvalidConfig, match="cannot listen"):
                Endpoint("lookup", "127.0.0.1", port, 1)
            with pytest.raises(InvalidConfig, match="cannot listen"):
                reserve_port("127.0.0.1", port, patience_s=0)
            for worker in workers:
                worker.stop().wait(PATIENCE_S)

    def test_it_waits_for_workers_of_a_parent_that_was_killed(self) -> None:
        clock = FakeClock()
        with socket.socket() as left:
            left.bind(("127.0.0.1", 0))
            left.listen()
            port = left.getsockname()[1]
            with pytest.raises(InvalidConfig, match="cannot listen"):
                reserve_port("127.0.0.1", port, patience_s=1.0, clock=clock)
            assert sum(clock.slept) == pytest.approx(1.0, abs=0.06)
            clock.meanwhile = left.close
            with reserve_port("127.0.0.1", port, patience_s=1.0, clock=clock) as held:
                assert held.getsockname()[1] == port

    def test_addresses_in_brackets_and_those_that_are_none(self) -> None:
        with reserve_port("[::1]", 0) as held:
            assert held.getsockname()[1]
        with pytest.raises(InvalidConfig, match="Correct --host"):
            reserve_port("no such host", 0)

    def test_nobody_else_may_listen_there_even_if_they_would_share_it(self) -> None:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            with pytest.raises(InvalidConfig, match="cannot listen"):
                reserve_port("127.0.0.1", other.getsockname()[1], patience_s=0)
