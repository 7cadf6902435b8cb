"""The committed documentation says what the code does: tables, exactness classes, code blocks, links."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import repe_unlearn
from repe_unlearn.architectures import FAMILIES, KINDS, Architecture, Family, Kind
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NotBakeableError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.plan import ErasurePlan
from tests.tiny import D, tiny

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BAKED: tuple[Kind, ...] = ("attn_in", "mlp_in", "final", "attn_out", "mlp_out")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(model: torch.nn.Module, kind: Kind, *, affine: bool) -> ErasurePlan:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, 1, generator=generator, dtype=torch.float64)).Q
    shift = torch.randn(D, generator=generator, dtype=torch.float64) * affine
    sites = Architecture.of(model).sites(kind)
    return ErasurePlan({site: Eraser(basis, basis.T, shift) for site in sites}, fingerprint(model))


def page() -> str:
    return (DOCS / "architectures.md").read_text(encoding="utf-8")


def test_the_committed_tables_are_the_generated_ones(tables: ModuleType) -> None:
    assert tables.render(page()) == page(), "run: make tables"
    assert tables.main(["--check"]) == 0


def test_a_changed_row_makes_the_committed_tables_stale(tables: ModuleType) -> None:
    head, *rest = FAMILIES
    for change in (
        {"model_types": ("llama9",)},
        {"mlp_out": dataclasses.replace(head.mlp_out, norm="post_norm")},
        {"attn_in": dataclasses.replace(head.attn_in, readers=("self_attn.q_proj",))},
        {"bias_switches": {}},
    ):
        assert tables.render(page(), [dataclasses.replace(head, **change), *rest]) != page()


def test_check_fails_on_a_stale_page_and_rewriting_mends_it(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "architectures.md"
    stale.write_text(page().replace("erasure-exact", "exact"), encoding="utf-8")
    before = stale.read_bytes()
    monkeypatch.setattr(tables, "PAGE", stale)
    assert tables.main(["--check"]) == 1
    assert "make tables" in capsys.readouterr().err
    assert stale.read_bytes() == before, "--check must not write"
    assert tables.main([]) == 0
    assert stale.read_text(encoding="utf-8") == page()


def test_a_page_without_markers_is_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="summary: begin"):
        tables.render(page().replace("<!-- summary: begin -->", ""))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_types[0])
def test_the_exactness_in_the_table_is_what_bake_says(family: Family, tables: ModuleType) -> None:
    model = tiny(family.model_types[0])
    for kind in KINDS:
        claimed = tables.exactness(family, kind)
        if claimed == "hook only":
            with pytest.raises(NotBakeableError):
                bake(model, plan(model, kind, affine=False), allow="erasure-exact")
        else:
            patch = bake(model, plan(model, kind, affine=False), allow="erasure-exact")
            assert set(patch.exactness.values()) == {claimed}


def affine_cell(model: torch.nn.Module, kind: Kind, exactness: str) -> str:
    """Return what the page should say about the constant of an affine eraser."""
    if exactness == "erasure-exact":
        return "not needed"
    try:
        patch = bake(model, plan(model, kind, affine=True))
    except NotBakeableError:
        return "no"
    keys = ", ".join(f"`{key}`" for key in patch.config_updates)
    return f"switch {keys}" if keys else "has one"


def test_the_page_says_where_the_constant_of_an_affine_eraser_goes(tables: ModuleType) -> None:
    lines = [f"| family | {' | '.join(f'`{kind}`' for kind in BAKED)} |", "| --- " * (len(BAKED) + 1) + "|"]
    for family in FAMILIES:
        model = tiny(family.model_types[0])
        cells = [affine_cell(model, kind, tables.exactness(family, kind)) for kind in BAKED]
        lines.append(f"| {' | '.join([f'`{family.model_types[0]}`', *cells])} |")
    expected = "\n".join(lines)
    assert expected in page(), f"this table belongs between the affine markers:\n{expected}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_code_blocks_are_python(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, path.name, "exec")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_code_blocks_import_public_names(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "repe_unlearn":
                assert {alias.name for alias in node.names} <= set(repe_unlearn.__all__)


def test_the_code_block_about_training_prompts_holds() -> None:
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "faq.md", "exec"), {})
    with pytest.raises(AssertionError):  # without the eraser the covariance stays
        exec(compile(block.replace("solvers.leace(Moments.of(x, z))(x)", "x"), "faq.md", "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (DOCS / target).is_file(), f"{path.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert {p.name for p in PAGES} == set(re.findall(r": (\w+\.md)$", nav, re.MULTILINE))
