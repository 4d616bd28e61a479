"""Our commands choose gRPC's poller, unless who runs them does; and this gRPC still has it."""

import json
import os
import subprocess
import sys

from online.rpc.poller import POLLER

OPEN_A_SERVER = """
import json, os, sys
import online.commands
import grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
server.add_insecure_port("127.0.0.1:0")
server.start()
server.stop(None).wait()
print(json.dumps({name: os.environ[name] for name in sys.argv[1:]}))
"""


def opened(**chosen: str) -> tuple[dict[str, str], str]:
    """What gRPC is told in a process of ours, and what it says to that."""
    unset = {name: value for name, value in os.environ.items() if name not in POLLER}
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_A_SERVER, *POLLER], env=unset | {"GRPC_VERBOSITY": "ERROR"} | chosen,
        capture_output=True, text=True, timeout=60, check=True,
    )
    return json.loads(ran.stdout), ran.stderr


def test_our_poller_is_one_that_grpc_has() -> None:
    told, said = opened()
    assert told == dict(POLLER)
    assert "Unknown" not in said, f"gRPC does not have it any more: measure without it, and drop it ({said})"


def test_who_runs_a_command_may_choose_another() -> None:
    assert opened(GRPC_POLL_STRATEGY="epoll1")[0] == {**POLLER, "GRPC_POLL_STRATEGY": "epoll1"}


def test_what_grpc_does_not_have_it_says() -> None:
    assert "Unknown" in opened(GRPC_EXPERIMENTS="-no_such_experiment")[1], "then the first test says nothing"
