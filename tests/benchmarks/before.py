"""Fleets of an earlier commit, in a worktree of its own, to be compared with those of this one in the same run.

```
git worktree add ../before HEAD~1
python -m tests.benchmarks.online --before ../before --only rank500_p50_vs_before
```

The earlier code publishes and serves its own repository: the same tables and models, since they are drawn by the same
seeds.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.contracts.errors import InvalidConfig
from tests.fleet import facet_environment

__all__ = ["EarlierFleets"]

PROGRAM = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from tests.benchmarks import serving
with ExitStack() as stack:
    made = serving.Serving(getattr(serving, sys.argv[1]), Path(sys.argv[2]), stack)
    made.repository
    print("published", flush=True)
    for _ in sys.stdin:
        with made.new_fleet() as fleet:
            print(json.dumps(fleet.rankers[0].address), flush=True)
            sys.stdin.readline()
        print("ended", flush=True)
"""


class EarlierFleets:
    """A process of the earlier code that starts and ends fleets when it is told to.

    Args:
        worktree: of the earlier commit.
        sizes: `FULL` or `QUICK`.
        scratch: an empty folder.

    Raises:
        InvalidConfig: there is no such code.
        RuntimeError: it did not start; its own error is on stderr.
    """

    def __init__(self, worktree: Path, sizes: str, scratch: Path) -> None:
        if not (worktree / "tests" / "benchmarks" / "serving.py").is_file():
            raise InvalidConfig(
                "code of an earlier commit", expected="a worktree of this repository", got=str(worktree),
                remedy="Make one by `git worktree add`.",
            )
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, sizes, str(scratch)], cwd=worktree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=facet_environment() | {"PYTHONPATH": str(worktree.resolve())},
        )
        self._said()

    @contextmanager
    def fleet(self) -> Iterator[str]:
        """A CPU host and a ranker that asks it: the ranker's address."""
        self._tell()
        try:
            yield json.loads(self._said())
        finally:
            self._tell()
            self._said()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _tell(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _said(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the earlier code ended; its error is above")
        return line
