"""The commands and the code on docs/export.md run as they stand."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from test_cli import ok, text_like_llama
from textkit import text_tokenizer
from tiny import random_plan

from repe_unlearn import load
from repe_unlearn.architectures import Architecture

TEXT = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text_like_llama(0).save_pretrained(tmp_path / "my-model")
    text_tokenizer().save_pretrained(tmp_path / "my-model")
    model = load(tmp_path / "my-model", progress=False).model
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "mlp_in"), affine=False)
    plan.save(tmp_path / "plan.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(place: Path) -> None:
    pytest.importorskip("peft")
    lines = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("repe-unlearn ")]
    assert {words[1] for words in commands} == {"bake", "export"}
    with warnings.catch_warnings():
        for words in commands:
            assert "written: " in ok(*words[1:])
    assert load("edited-model", progress=False).fingerprint != load("my-model", progress=False).fingerprint


def test_the_code(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile("\n".join(blocks), "export.md", "exec"), {})
    assert (place / "served-model" / "model.safetensors").is_file()
    wrong = (
        "\n".join(blocks)
        .replace("export.torch_module(model, plan)", "model")
        .replace("served-model", "second")
    )
    with pytest.raises(AssertionError):  # the module without erasers is not the hooked model
        exec(compile(wrong, "export.md", "exec"), {})
