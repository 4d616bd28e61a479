"""Coverage-guided fuzzing of the services and what they parse.

    python -m tests.online.fuzz lookup                        until something is found, or Ctrl-C
    python -m tests.online.fuzz rank -max_total_time=60       options with one dash are libFuzzer's
    python -m tests.online.fuzz rank --workspace DIR -runs=1000 -seed=1

Without --workspace it makes two small versions and serves those. What it finds it writes to the folder it runs in.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[3]


def compiled_modules() -> list[str]:
    """Those with functions that Numba compiles: their bytecode must stay as it is."""
    files = [path for room in ("online", "pipelines") for path in (ROOT / room).rglob("*.py")]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if "import njit" in path.read_text()
    ]


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with atheris.instrument_imports(include=["online", "pipelines"], exclude=compiled_modules()):
        from tests.online.fuzz.targets import TARGETS

    from pipelines.contracts.workspace import Workspace

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--workspace", type=Path)
    given, libfuzzer = parser.parse_known_args()
    workspace = Workspace(given.workspace) if given.workspace else _made_workspace()
    logging.disable(logging.CRITICAL)  # a refusal a line is no finding
    atheris.Setup([sys.argv[0], "-len_control=0", *libfuzzer, str(_first_inputs())], TARGETS[given.target](workspace))
    atheris.Fuzz()


def _first_inputs() -> Path:
    """Long enough for a whole message each: beginning with nothing, libFuzzer would take long to get there."""
    folder = Path(tempfile.mkdtemp(prefix="facet-fuzz-"))
    for number in range(64):
        size = 16 << number % 6
        (folder / str(number)).write_bytes(random.Random(number).randbytes(size))
    return folder


def _made_workspace():
    from pipelines.publish import publish
    from tests.releases import FeastRepository, entity_ids, write_context_views, write_release

    root = Path(tempfile.mkdtemp(prefix="facet-fuzz-"))
    repository = FeastRepository.create(root)
    for version in (1, 2):
        release = write_release(root / f"release{version}", seed=version)
        publish(repository.workspace, release, parents=() if version == 1 else (1,))
    write_context_views(repository.workspace, entity_ids("user", 200), entity_ids("item", 200))
    repository.apply()
    repository.materialize()
    return repository.workspace


if __name__ == "__main__":
    main()
