"""What a command and its children hold beyond the page cache, watched while it runs."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Watched", "run_watched"]

EVERY_S = 0.02
COUNTED = ("RssAnon:", "RssShmem:")  # the rest of a process's pages are the file system's


@dataclass(frozen=True)
class Watched:
    """How long a command took, and the most it held at once: anonymous and shared memory of all its processes."""

    seconds: float
    peak_bytes: int
    output: str


def run_watched(command: Sequence[str], *, cwd: Path) -> Watched:
    """Run a command to its end; raises `RuntimeError` with its output if it fails."""
    start, peak = time.perf_counter(), 0
    log = cwd / "command.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(_held_bytes, _tree(process.pid))))
            time.sleep(EVERY_S)
    seconds, output = time.perf_counter() - start, log.read_text(errors="replace")
    log.unlink()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{output[-4000:]}")
    return Watched(seconds, peak, output)


def _tree(pid: int) -> list[int]:
    """A process and all that it started, and they in turn."""
    pids = [pid]
    for one in pids:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return pids


def _held_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(COUNTED))
