"""One of several workers of a host, from within: what its parent told it, and how it is directed and watched."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

from online.host_state import HostState
from online.rpc.limits import Limits
from online.rpc.server import Endpoint

__all__ = ["FOLDER_PREFIX", "state_from_parent", "worker_admin"]

SLOTS = 4

FOLDER_PREFIX = "facet-workers-"
"""Of the directory in which all workers of a host have their sockets."""


def state_from_parent(socket_path: str) -> tuple[HostState, bool]:
    """What this worker is to hold, and whether it must hold all of it. From now on it ends when its parent does."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(Path(socket_path).parent,), name="parent", daemon=True).start()
    return HostState.from_dict(told["state"]), told["whole"]


def _end_with_parent(folder: Path) -> None:
    sys.stdin.read()  # returns when the last writer is gone, which only the parent is
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)  # at once: whoever starts the host again needs the port


def worker_admin(socket_path: str) -> Endpoint:
    """A worker's admin service, on a socket that only its own user can reach. Its health is that of the process:
    changes, which may wait for one another for minutes, do not delay it.
    """
    return Endpoint("admin", "", 0, SLOTS, socket=socket_path, audited=True, limits=Limits().for_admin())
