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
from repe_unlearn.architectures import FAMILIES, KINDS, Absent, Architecture, Kind, Read, Write
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NotBakeableError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake, exactness
from repe_unlearn.plan import ErasurePlan
from tests.rowkit import CASES
from tests.tiny import D

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
BAKED: tuple[Kind, ...] = ("attn_in", "cross_in", "mlp_in", "final", "attn_out", "cross_out", "mlp_out")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(model: torch.nn.Module, arch: Architecture, kind: Kind, layer: int, *, affine: bool) -> ErasurePlan:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, 1, generator=generator, dtype=torch.float64)).Q
    shift = torch.randn(D, generator=generator, dtype=torch.float64) * affine
    sites = arch.sites(kind, layers=[layer])
    return ErasurePlan({site: Eraser(basis, basis.T, shift) for site in sites}, fingerprint(model))


def page() -> str:
    return (DOCS / "architectures.md").read_text(encoding="utf-8")


def test_the_committed_tables_are_the_generated_ones(tables: ModuleType) -> None:
    assert tables.render(page()) == page(), "run: make tables"
    assert tables.main(["--check"]) == 0


def test_a_changed_row_makes_the_committed_tables_stale(tables: ModuleType) -> None:
    head, *rest = FAMILIES
    (layout,) = head.layouts
    for change in (
        {"model_types": ("llama9",)},
        {"layouts": (dataclasses.replace(layout, mlp_out=Write("mlp", ("mlp.down_proj",), "post_norm")),)},
        {"layouts": (dataclasses.replace(layout, attn_in=Read("norm", ("self_attn.q_proj",))),)},
        {"layouts": (dataclasses.replace(layout, mlp_in=Absent("there is none")),)},
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


@pytest.mark.parametrize("name", CASES)
def test_the_exactness_in_the_table_is_what_bake_says(name: str, tables: ModuleType) -> None:
    model = CASES[name].model()
    arch = CASES[name].arch(model)
    for layer, layout in enumerate(arch.layouts[:2]):
        for kind in KINDS:
            claimed = tables.exactness(arch.family, layout, kind)
            assert (claimed == "–") == (kind not in arch.kinds)
            if kind == "resid_pre" and layer == 0:
                continue  # before the first block the embeddings can be edited
            if claimed == "hook only":
                with pytest.raises(NotBakeableError):
                    bake(model, plan(model, arch, kind, layer, affine=False), allow="erasure-exact")
            elif claimed != "–":
                patch = bake(model, plan(model, arch, kind, layer, affine=False), allow="erasure-exact")
                assert set(patch.exactness.values()) == {claimed}


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].stack is None])
def test_the_class_of_the_stream_in_the_table_is_what_bake_says(name: str, tables: ModuleType) -> None:
    model = CASES[name].model()
    arch = CASES[name].arch(model)
    claimed = tables.stream(arch.family, arch.layouts[0])
    assert exactness(model)["stream"]["linear"].split(":")[0] == claimed


def affine_cell(model: torch.nn.Module, arch: Architecture, kind: Kind, layer: int, exactness: str) -> str:
    """Return what the page should say about the constant of an affine eraser."""
    if exactness in ("–", "hook only"):
        return "–"
    if exactness == "erasure-exact":
        return "not needed"
    try:
        patch = bake(model, plan(model, arch, kind, layer, affine=True))
    except NotBakeableError:
        return "no"
    keys = ", ".join(f"`{key}`" for key in patch.config_updates)
    return f"switch {keys}" if keys else "has one"


def test_the_page_says_where_the_constant_of_an_affine_eraser_goes(tables: ModuleType) -> None:
    lines = {}
    for case in CASES.values():
        model = case.model()
        arch = case.arch(model)
        for layer, layout in enumerate(arch.layouts):
            name = tables.label(arch.family, layout)
            if name not in lines:
                claimed = {kind: tables.exactness(arch.family, layout, kind) for kind in BAKED}
                cells = [affine_cell(model, arch, kind, layer, claimed[kind]) for kind in BAKED]
                lines[name] = f"| {' | '.join([name, *cells])} |"
    head = f"| family | {' | '.join(f'`{kind}`' for kind in BAKED)} |", "| --- " * (len(BAKED) + 1) + "|"
    ordered = [lines[tables.label(*pair)] for pair in tables.each(FAMILIES)]
    expected = "\n".join([*head, *ordered])
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


@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda p: p.stem)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name} links to {target}"
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{path.name} links to {target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    own = {m[1] for title in titles if (m := re.search(r"\{ #(\S+) \}", title))}
    return own | {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_anchors_are_those_of_headings() -> None:
    found = anchors(DOCS / "faq.md")
    assert {"the-bfloat16-floor", "an-eraser-is-a-matrix"} <= found
    assert "an-eraser-is-no-matrix" not in found


def test_every_page_is_in_the_navigation() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)
    assert {p.relative_to(DOCS).as_posix() for p in PAGES} == set(listed)
    assert len(listed) == len(set(listed))


def test_the_list_of_references_and_the_bibliography_are_one() -> None:
    page, bib = ((DOCS / f"references.{end}").read_text(encoding="utf-8") for end in ("md", "bib"))
    entries = dict(re.findall(r"^@\w+\{(\w+),.*?eprint = \{([\d.]+)\}", bib, re.MULTILINE | re.DOTALL))
    rows = re.findall(r"^\| `(\w+)` \|.*\[([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", page, re.MULTILINE)
    assert {key: number for key, number, _ in rows} == entries
    assert all(number == link for _, number, link in rows)
    assert len(entries) == bib.count("\n@") + bib.startswith("@")


def test_papers_that_docstrings_name_are_in_the_bibliography() -> None:
    bib = (DOCS / "references.bib").read_text(encoding="utf-8")
    named = {
        number
        for path in (DOCS.parent / "repe_unlearn").rglob("*.py")
        for number in re.findall(r"arXiv:? ?(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert sorted(number for number in named if number not in bib) == []


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: repe_unlearn\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    modules = {name for name in repe_unlearn.__all__ if isinstance(getattr(repe_unlearn, name), ModuleType)}
    assert sorted(set(repe_unlearn.__all__) - modules - listed - {"Example"}) == []
    for name in modules:  # at least one name of each
        assert re.search(rf"^::: repe_unlearn\.{name}\.", text, re.MULTILINE), name
