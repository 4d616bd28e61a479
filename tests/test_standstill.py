"""Which failures a test is forgiven: those of a machine that stood still, and no other."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine_watch import BEAT_S, MachineWatch
from tests.standstill import RUNS, STANDSTILL_S
from tests.waiting import until

STOPPED_S = STANDSTILL_S + 2 * BEAT_S
TESTS = f"""
import signal, time
from collections import Counter
import pytest
from tests.standstill import WATCH

runs = Counter()

def stand_still(config):
    watch = config.stash[WATCH]
    watch.process.send_signal(signal.SIGSTOP)  # to it, that is a machine that stands still
    time.sleep({STOPPED_S})
    watch.process.send_signal(signal.SIGCONT)
    while watch.longest_since(time.monotonic()) > {BEAT_S}:  # the next test began after it
        pass

@pytest.fixture(scope="session")
def touched():
    return []

@pytest.fixture
def run(request, touched):
    assert touched == [], "as the run before left it"
    runs[request.node.name] += 1
    yield runs[request.node.name]
    touched.clear()

def test_forgiven(run, touched, request):
    touched.append("by the first run")
    stand_still(request.config)
    assert run == 2

def test_not_forgiven(run):
    assert run == 2

def test_forgiven_no_more(run, request):
    stand_still(request.config)
    assert run == {RUNS + 1}

def test_not_even_failed(run, request):
    stand_still(request.config)

def test_how_often_they_ran():
    assert runs == dict(test_forgiven=2, test_not_forgiven=1, test_forgiven_no_more={RUNS}, test_not_even_failed=1)
"""


@pytest.fixture
def watch() -> Iterator[MachineWatch]:
    watch = MachineWatch()
    yield watch
    watch.close()


def stop(process: subprocess.Popen, seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def test_a_standstill_is_seen_by_those_who_were_there(watch: MachineWatch) -> None:
    before = time.monotonic()
    stop(watch.process, STOPPED_S)
    assert watch.longest_since(before) >= STOPPED_S - 2 * BEAT_S
    until(lambda: watch.longest_since(time.monotonic()) < BEAT_S)  # it is over


def test_a_busy_machine_does_not_stand_still(watch: MachineWatch) -> None:
    before = time.monotonic()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        time.sleep(2.0)
        assert watch.longest_since(before) < STANDSTILL_S
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_who_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.standstill", "--numprocesses=1", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    failed = re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)
    assert failed == ["test_not_forgiven", "test_forgiven_no_more"], done.stdout + done.stderr
    assert done.stdout.count("MachineStoodStill: the machine stood still for") == 1 + RUNS - 1, done.stdout
