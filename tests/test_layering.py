"""The import rules: data flows one way through the rooms, `contracts` is all that they share, and `online` is built in
layers."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipelines", "training", "online", "feature_repo")
CONTRACTS = "pipelines.contracts"
FILES = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if not path.stem.endswith(("_pb2", "_grpc"))
)


def imported_modules(path: Path) -> set[str]:
    """Every module named in an import statement of a file, at any depth."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative imports hide which room is imported"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def forbidden(room: str, in_contracts: bool, module: str) -> bool:
    """Whether a file of `room` may not import `module`."""
    if within(module, "feature_repo"):
        return True  # Feast loads its files under other names: a class imported both ways would exist twice
    if within(module, CONTRACTS):
        return False
    if in_contracts or room == "feature_repo":
        return any(within(module, other) for other in ROOMS)
    return any(within(module, other) for other in ROOMS if other != room)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_itself_and_the_contracts(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    in_contracts = within(".".join(path.relative_to(ROOT).with_suffix("").parts), CONTRACTS)
    bad = [module for module in imported_modules(path) if forbidden(room, in_contracts, module)]
    assert not bad, f"{room} may import only itself and {CONTRACTS}, not {bad}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if "contracts" in path.parts], ids=lambda path: path.name
)
def test_contracts_need_only_numpy_pyarrow_and_numba(path: Path) -> None:
    exceptions = {
        "upper_model": {"torch"}, "upper_files": {"torch", "safetensors"},
        "strict": {"yaml"}, "redis_client": {"redis"},
    }
    allowed = {"numba", "numpy", "pyarrow", "pipelines"} | exceptions.get(path.stem, set())
    tops = {module.partition(".")[0] for module in imported_modules(path)}
    assert tops - allowed <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ["pipelines", "feature_repo"])
def test_torch_stays_with_those_who_learn_and_score(room: str) -> None:
    importers = [
        path.name
        for path in FILES
        if path.relative_to(ROOT).parts[0] == room and any(within(module, "torch") for module in imported_modules(path))
    ]
    assert importers in ([], ["upper_files.py", "upper_model.py"])


@pytest.mark.parametrize(
    ("room", "module", "verdict"),
    [
        ("online", "training.quantize", True),
        ("training", "online.lookup.reader", True),
        ("training", "pipelines.events", True),
        ("pipelines", "pipelines.events", False),
        ("online", "pipelines.contracts.segment", False),
        ("pipelines", "feature_repo.entities", True),
    ],
)
def test_the_rule_itself(room: str, module: str, verdict: bool) -> None:
    assert forbidden(room, False, module) is verdict


LAYERS = (
    {"proto", "printable", "clock", "heap", "host_state", "stock_store", "feast_request"},
    {"rpc_error"},
    {"security", "store"},  # the store is Feast's: it knows no server
    {"observe"},
    {"rpc"},
    {"lookup"},
    {"ranking"},
    {"rollout", "load"},
    {"commands"},
)
"""Parts of `online`, the lowest first. A part imports itself and parts of lower layers."""

ONLINE = [path for path in FILES if path.is_relative_to(ROOT / "online") and path != ROOT / "online" / "__init__.py"]


def part_of(module: str) -> str:
    """`online.rpc.server` -> `rpc`."""
    return module.split(".")[1]


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def upward(part: str, module: str) -> bool:
    """Whether a file of this part of `online` may not import `module`."""
    other = part_of(module)
    return other != part and layer_of(other) >= layer_of(part)


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_online_imports_downwards(path: Path) -> None:
    part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    bad = [module for module in imported_modules(path) if within(module, "online") and upward(part, module)]
    assert not bad, f"{part} is below {sorted(map(part_of, bad))}: {bad}"


def test_each_part_of_online_has_its_layer() -> None:
    there = {part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in ONLINE} | {"proto"}
    assert sorted(part for parts in LAYERS for part in parts) == sorted(there)


@pytest.mark.parametrize(
    ("part", "module", "verdict"),
    [
        ("security", "online.observe.metrics", True),
        ("observe", "online.security.roles", False),
        ("rpc", "online.rpc.limits", False),
        ("rpc", "online.lookup.wire", True),
        ("lookup", "online.rpc.server", False),
        ("rollout", "online.load.drive", True),
        ("store", "online.security.roles", True),
        ("store", "online.stock_store", False),
        ("printable", "online.rpc_error", True),
    ],
)
def test_the_rule_of_layers_itself(part: str, module: str, verdict: bool) -> None:
    assert upward(part, module) is verdict
