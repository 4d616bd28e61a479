"""The committed gRPC code is what the .proto files generate."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROTO = ROOT / "online" / "proto"


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
def test_generated_files_are_up_to_date(tmp_path) -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in PROTO.glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}",
         *sources],
        cwd=ROOT, check=True,
    )
    generated = sorted((tmp_path / "online" / "proto").iterdir())
    assert [path.name for path in generated] == sorted(path.name for path in PROTO.glob("*_pb2*.py"))
    for path in generated:
        assert path.read_text() == (PROTO / path.name).read_text(), f"run `make proto`: {path.name} is stale"
