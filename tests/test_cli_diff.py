"""`repe-unlearn diff` and `repe-unlearn revert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import save, tiny_llama
from safetensors.torch import load_file
from tiny import random_plan
from typer.testing import CliRunner

from repe_unlearn.architectures import Architecture
from repe_unlearn.cli import app
from repe_unlearn.export import checkpoint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Patch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("diff")
    model = tiny_llama()
    patch = bake(model, random_plan(model, Architecture.of(model).sites("attn_in")))
    checkpoint(save(place / "base", model), patch, place / "edited", progress=False)
    return place


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_diff_and_revert(place: Path, tmp_path: Path) -> None:
    patch, originals, back = (tmp_path / name for name in ("patch", "originals", "back"))
    files = ("--out", patch, "--keep-originals", originals)
    code, text, _ = run("diff", place / "base", place / "edited", *files, "-q")
    assert code == 0
    assert "q_proj.weight" in text
    assert "rank 2" in text
    assert "new bias" in text
    assert "config: attention_bias = True" in text
    assert set(Patch.load(patch).edits) >= {"model.layers.0.self_attn.q_proj.weight"}
    code, _, _ = run("revert", place / "edited", originals, back)
    assert code == 0
    wanted, got = (load_file(folder / "model.safetensors") for folder in (place / "base", back))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_mistakes_are_one_line(place: Path, tmp_path: Path) -> None:
    for words, complaint in (
        (("diff", place / "base", place / "base"), "do not differ"),
        (("diff", place / "base", tmp_path), "no checkpoint folder"),
        (("diff", place / "base", place / "edited", "--out", place / "base"), "exists"),
        (("revert", place / "edited", place / "nothing", tmp_path / "back"), "is not a file"),
        (("revert", place / "edited", place / "nothing", place / "base"), "exists"),
    ):
        code, out, err = run(*words, *(("-q",) if words[0] == "diff" else ()))
        assert code == 1, words
        assert complaint in err
        assert err.startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert not out.strip()
    assert not list(tmp_path.iterdir())
