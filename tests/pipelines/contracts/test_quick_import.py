"""What a process imports in its own way, tried in processes of their own."""

import subprocess
import sys

import pytest

from tests.waiting import PROGRAM_S

ASKED = """
import typeguard

@typeguard.typechecked
def length(text: str) -> int:
    return len(text)

try:
    length([1, 2])
    print("nothing is checked")
except typeguard.TypeCheckError:
    print("types are checked")
"""
FEAST_IS_WHOLE = """
import feast
from feast.feature_view import FeatureView

print(feast.FeatureStore.__name__, FeatureView.with_name.__code__.co_name)
"""
OPTIMIZED = "from pipelines.contracts.quick_import import import_typeguard_optimized as first; first(); first()\n"
AS_FACET = f"""
from pipelines import cli
cli.run = lambda: exec({ASKED + FEAST_IS_WHOLE!r}, {{'__name__': 'asked'}}) or 0
cli.main()
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (ASKED, ["types are checked"]), (OPTIMIZED + ASKED, ["nothing is checked"]),
        (AS_FACET, ["nothing is checked", "FeatureStore with_name"]),
    ],
    ids=["by itself", "optimized", "facet"],
)
def test_typeguard_is_left_out_and_feast_is_whole(program: str, said: list[str], tmp_path) -> None:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    assert done.stdout.splitlines() == said, done.stderr
