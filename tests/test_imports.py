"""Who may import whom, read off the source; and that importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import repe_unlearn

ROOT = Path(repe_unlearn.__file__).parent
PACKAGE = ROOT.name

# Lowest first: a module imports from its own layer and from those above it in this table, never from below.
# A package (builtin, solvers, audit, export) counts as one module. List a new module in the layer it belongs to.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "sites", "tokens", "example", "rows", "shrinkage", "placement", "inputs", "head"),
    (
        "eraser",
        "edit",
        "moments",
        "thin_moments",
        "concepts",
        "tensorfile",
        "fingerprints",
        "convert",
        "ranks",
        "resume",
        "shards",
        "tables",
    ),
    ("contrast", "splitting", "description", "chat", "readers", "builtin", "recipe", "facts", "facts_files"),
    ("solvers", "models", "gguf_cache"),
    (
        "plan",
        "patch",
        "encoding",
        "taps",
        "positions",
        "parking",
        "families",
        "architectures",
        "interventions",
        "block_probe",
        "discovery",
        "estimator",
        "diagnostics",
        "algebra",
        "quantisation",
    ),
    (
        "activations",
        "answers",
        "sequential",
        "hooks",
        "steering",
        "closed_form",
        "methods",
        "outlook",
        "survey",
        "gate",
        "linears",
        "stream",
        "folding",
        "localize",
        "train",
    ),
    ("export",),
    ("named_tensors", "difference", "undo"),
    ("audit", "measured", "sweep"),
    ("demo", "cli", "cli_unlearn", "cli_audit", "cli_compare", "cli_localize", "__main__"),
)
# Neighbours of one layer that must not know each other: that hooks and baked weights agree is a test.
STRANGERS = {
    ("hooks", "folding"),
    ("folding", "hooks"),
    ("activations", "hooks"),
    ("activations", "sequential"),
}
# The maths knows no model.
SOLVERS_MAY_IMPORT = {
    "torch",
    "concept_erasure",
    "solvers",
    "moments",
    "thin_moments",
    "shrinkage",
    "tensorfile",
    "eraser",
    "edit",
    "errors",
}
# Slow or optional; imported inside the functions that need them, and only in these modules.
HEAVY = {
    "transformers": {"models", "gguf_cache", "export", "train", "cli", "demo", "audit"},
    "sklearn": {"audit", "cli", "demo", "estimator"},
    "matplotlib": {"audit", "cli", "demo", "localize"},
    "jinja2": {"audit", "cli", "demo"},
    "datasets": {"contrast", "readers", "cli", "demo"},
    "rich": {"audit", "cli", "cli_compare", "cli_localize", "cli_unlearn", "demo"},
    "peft": {"export", "train"},
    "gguf": {"gguf_cache", "export"},
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: who imports what, and whether it runs when the module is imported."""

    by: str
    name: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.by} (line {self.line}) imports {self.name}"


def imports_of(source: str, module: tuple[str, ...], *, is_package: bool = False) -> Iterator[Import]:
    """Yield what a source file imports; names of this package without their prefix, type-only imports left out.

    Args:
        source: the text of the file.
        module: its dotted name below the package, in parts; empty for the package's own ``__init__``.
        is_package: the file is an ``__init__``.
    """
    by = module[0] if module else "__init__"
    here = module if is_package else module[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from visit(other, lazy)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(by, _top(tuple(alias.name.split("."))), child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                yield from from_import(child, lazy)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, lazy or inside)

    def from_import(node: ast.ImportFrom, lazy: bool) -> Iterator[Import]:
        parts = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            parts = (PACKAGE, *here[: len(here) - node.level + 1], *parts)
        for alias in node.names:
            yield Import(by, _top((*parts, alias.name)), node.lineno, lazy)

    yield from visit(ast.parse(source), False)


def _top(parts: tuple[str, ...]) -> str:
    """``repe_unlearn.solvers.leace.leace`` -> ``solvers``; ``torch.nn`` -> ``torch``."""
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in MODULES else "__init__"


def files() -> Iterator[tuple[Path, tuple[str, ...]]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {parts[0] for _, parts in files() if parts}
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def all_imports() -> list[Import]:
    return [
        found
        for path, parts in files()
        for found in imports_of(path.read_text("utf-8"), parts, is_package=path.name == "__init__.py")
    ]


def broken_layers(imports: list[Import]) -> list[str]:
    """Every import of a higher layer, of a stranger, or of the package's front door."""
    wrong = []
    for found in imports:
        if found.by == "__init__" or found.name == found.by:
            continue
        if found.name == "__init__" and LAYER_OF[found.by] < LAYER_OF["audit"]:
            wrong.append(f"{found}, the package itself, which imports everything")
        elif found.name in MODULES and LAYER_OF[found.name] > LAYER_OF[found.by]:
            wrong.append(f"{found}, which is a layer above")
        elif (found.by, found.name) in STRANGERS:
            wrong.append(f"{found}; the two must not know each other")
    return wrong


def heavy_imports(imports: list[Import]) -> list[str]:
    """Every heavy library that is imported at import time, or by a module that has no business with it."""
    wrong = []
    for found in imports:
        if found.name not in HEAVY:
            continue
        if found.by not in HEAVY[found.name]:
            allowed = ", ".join(sorted(HEAVY[found.name]))
            wrong.append(f"{found}; only {allowed} may (HEAVY in {__name__}.py)")
        # The command line is a program, and the estimator a scikit-learn class: the package imports neither.
        elif not found.lazy and found.by not in ("cli", "estimator"):
            wrong.append(f"{found} at import time; move it into the function that needs it")
    return wrong


def foreign_to_solvers(imports: list[Import]) -> list[str]:
    allowed = SOLVERS_MAY_IMPORT | set(sys.stdlib_module_names)
    return [str(found) for found in imports if found.by == "solvers" and found.name not in allowed]


def test_every_module_is_listed() -> None:
    missing = sorted(MODULES - LAYER_OF.keys())
    assert not missing, (
        f"{', '.join(missing)}: not in the table of layers. Add each to LAYERS in tests/test_imports.py, in the lowest "
        "layer whose modules and predecessors it imports."
    )
    gone = sorted(LAYER_OF.keys() - MODULES - {"demo", "cli"})
    assert not gone, f"{', '.join(gone)}: listed in LAYERS but no longer in the package; remove them there."


def test_layers_hold() -> None:
    found = [i for i in all_imports() if i.by in LAYER_OF and (i.name in LAYER_OF or i.name not in MODULES)]
    assert broken_layers(found) == []
    assert len(found) > 100  # the reader does read


def test_heavy_libraries_are_imported_where_they_are_needed() -> None:
    assert heavy_imports(all_imports()) == []


def test_solvers_know_no_model() -> None:
    assert foreign_to_solvers(all_imports()) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("hooks", "from .folding import bake", "must not know each other"),
        ("folding", "def f():\n    from repe_unlearn import hooks", "must not know each other"),
        ("moments", "from .plan import solve", "a layer above"),
        ("sites", "import repe_unlearn.audit.check", "a layer above"),
        ("solvers.leace", "from ..hooks import apply", "a layer above"),
        ("solvers", "from . import leace\nfrom ..plan import solve", "a layer above"),
        ("eraser", "from repe_unlearn import __version__", "the package itself"),
        ("plan", "import transformers", "only .* may"),
        ("plan", "def f():\n    from transformers import AutoModel", "only .* may"),
        ("models", "from transformers import AutoModel", "at import time"),
        (
            "audit.figures",
            "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    plt = None",
            "at import",
        ),
        ("solvers.leace", "import sklearn.svm", "only .* may"),
        ("solvers.leace", "from tqdm import tqdm", "solvers .* imports tqdm"),
        ("solvers.leace", "from ..sites import Site", "solvers .* imports sites"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str, complaint: str) -> None:
    import re

    parts = tuple(module.split("."))
    found = list(imports_of(source, parts, is_package=module == "solvers"))
    complaints = broken_layers(found) + heavy_imports(found) + foreign_to_solvers(found)
    assert any(re.search(complaint, text) for text in complaints), complaints


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hooks", "from .plan import ErasurePlan\nimport torch"),
        ("models", "def f():\n    from transformers import AutoModel"),
        ("models", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("example", "if TYPE_CHECKING:\n    from repe_unlearn.contrast import Contrast"),
        (
            "solvers.leace",
            "import math\nfrom concept_erasure import optimal_linear_shrinkage\nfrom .linalg import x",
        ),
        ("audit.report", "from repe_unlearn.audit import html\nfrom ..folding import bake"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    found = list(imports_of(source, tuple(module.split("."))))
    assert broken_layers(found) + heavy_imports(found) + foreign_to_solvers(found) == []


def loaded_by(statement: str) -> set[str]:
    """The heavy libraries that are in ``sys.modules`` of a fresh process after a statement."""
    program = f"{statement}\nimport sys\nprint(*(set({sorted(HEAVY)!r}) & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert loaded_by(f"import {PACKAGE}") == set()


def test_the_light_test_sees_a_heavy_import() -> None:
    assert loaded_by("import jinja2") == {"jinja2"}
