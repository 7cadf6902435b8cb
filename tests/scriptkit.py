"""A benchmark script as a module, for the tests of its parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent / "benchmarks"


def script(name: str) -> ModuleType:
    """Return ``benchmarks/NAME.py`` as the module ``NAME_benchmark``."""
    known = f"{name}_benchmark"
    if str(FOLDER) not in sys.path:  # a script finds its neighbours as when it is run
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
