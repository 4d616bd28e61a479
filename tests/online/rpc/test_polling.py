"""A server's sockets are read by the thread that waits for them, unless the operator says otherwise."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from online.commands import serve as serve_module
from online.rpc.polling import VARIABLE
from tests.waiting import PROGRAM_S

PROGRAM = """
import os, sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from online.rpc.polling import read_in_waiting_threads
if "ours" in sys.argv:
    read_in_waiting_threads()
import grpc

def wakes():
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "event_engine\\n"]
    texts = [(task / "status").read_text() for task in tasks]
    return sum(int(text.partition("\\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)

handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", {"b": handler}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    echo = channel.unary_unary("/a/b")
    echo(b"")
    least = 1_000_000
    for _ in range(20):  # timers wake these threads too, the more often the slower the machine is
        before = wakes()
        for _ in range(300):
            echo(b"")
        least = min(least, wakes() - before)
        if least < 150:
            break
    print(least, flush=True)
os._exit(0)
"""


def wakes(*words: str, experiments: str | None = None) -> tuple[int, str]:
    """How often threads of gRPC's event engine were woken at least while 300 calls passed; what was said on stderr."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if experiments is not None:
        environment[VARIABLE] = experiments
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, check=True,
        timeout=PROGRAM_S,
    )
    return int(ran.stdout), ran.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts wakes of threads by /proc")
def test_no_other_thread_is_woken_by_a_call() -> None:
    assert wakes()[0] > 300, "gRPC reads sockets in threads of its own"
    woken, said = wakes("ours")
    assert woken < 150 and "Unknown experiment" not in said


def test_what_the_operator_has_set_stays() -> None:
    assert "Unknown experiment: nonsense" in wakes("ours", experiments="-nonsense")[1]


def test_servers_are_started_so(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(serve_module, "bound_heap", lambda: called.append("heap"))
    monkeypatch.setattr(serve_module, "read_in_waiting_threads", lambda: called.append("polling"))
    assert CliRunner().invoke(serve_module.serve, ["cpu-tier", "--help"]).exit_code == 0
    assert called == ["heap", "polling"]
