"""A benchmark script as a module, for the tests of its parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def script(name: str) -> ModuleType:
    """Return ``benchmarks/NAME.py`` as the module ``NAME_benchmark``."""
    known = f"{name}_benchmark"
    spec = importlib.util.spec_from_file_location(known, Path(__file__).parent / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
