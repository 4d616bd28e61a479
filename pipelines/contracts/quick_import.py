"""Importing Feast in half the time."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

__all__ = ["import_typeguard_optimized"]

TYPEGUARD = "typeguard"


def import_typeguard_optimized() -> None:
    """Have typeguard do from now on what `python -O` has it do: nothing; everything else is imported as always.

    Feast decorates its classes with typeguard's `typechecked`, which parses a module's source once for each method and
    compiles it again: half of what importing Feast takes. It is meant for development, and a no-op under `-O`;
    but `-O` itself would take the assertions out of every other library. Call it before Feast is imported.
    """
    if not any(isinstance(finder, _OptimizedTypeguard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OptimizedTypeguard())


class _OptimizedTypeguard(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != TYPEGUARD:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Optimized(fullname, spec.loader.path)
        return spec


class _Optimized(SourceFileLoader):
    """Compiles as `python -O` does, where `__debug__` is false; what Python has compiled before is not used."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        return compile(source, self.path, "exec", dont_inherit=True, optimize=1)
