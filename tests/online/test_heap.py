"""A process that has freed what its threads allocated gives it back."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from online.commands import serve as serve_module
from tests.waiting import PROGRAM_S

THREADS = 16

ALLOCATE = """
import os, random, sys, threading
from online.heap import bound_heap
from tests.fleet import anonymous_bytes

if sys.argv[1] == "bounded" and not bound_heap():
    sys.exit(77)

def work(seed):
    draw = random.Random(seed)
    held = []
    for _ in range(400):
        held.append(bytearray(b"x") * draw.randrange(10_000, 3_000_000))
        if len(held) > 8:
            held.pop(draw.randrange(8))
    together.wait()

before, together = anonymous_bytes(os.getpid()), threading.Barrier(int(sys.argv[2]))
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(int(sys.argv[2]))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(anonymous_bytes(os.getpid()) - before)
"""


def kept(how: str) -> int:
    """Bytes that a process keeps after threads have allocated, and freed all of it."""
    ran = subprocess.run(
        [sys.executable, "-c", ALLOCATE, how, str(THREADS)], capture_output=True, text=True, timeout=PROGRAM_S
    )
    if ran.returncode == 77:
        pytest.skip("the C library has no mallopt")
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def test_what_was_freed_is_given_back() -> None:
    assert kept("bounded") < kept("as it comes") / 2


def test_servers_are_bounded_before_they_start(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(serve_module, "bound_heap", lambda: called.append("heap"))
    assert CliRunner().invoke(serve_module.serve, ["cpu-tier", "--help"]).exit_code == 0
    assert called == ["heap"]
