"""A patched checkpoint back to its original bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from folders import save, tiny_llama
from safetensors.torch import load_file, save_file
from tiny import random_plan

from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import FileFormatError, InputError, ModelMismatchError, OutputExistsError
from repe_unlearn.export import checkpoint
from repe_unlearn.folding import bake
from repe_unlearn.undo import keep_originals, revert


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(params=["single", "sharded", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    tied = request.param == "tied"
    model = tiny_llama(dtype=torch.bfloat16, tied=tied)
    base = save(tmp_path / "base", model, shard="20KB" if request.param == "sharded" else None)
    # New biases, or an untied head: both must be gone afterwards.
    plan = random_plan(model, Architecture.of(model).sites("final" if tied else "attn_in"), affine=not tied)
    return base, checkpoint(base, bake(model, plan), tmp_path / "edited", progress=False)


def test_every_bit_comes_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, edited = folders
    path = keep_originals(base, edited, tmp_path / "undo.safetensors")
    back = revert(edited, path, tmp_path / "back")
    wanted, got, patched = tensors(base), tensors(back), tensors(edited)
    assert wanted.keys() == got.keys() != patched.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert (
        any(not torch.equal(wanted[n], patched[n]) for n in wanted) or "lm_head.weight" in patched
    )  # control
    assert (back / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (back / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (back / "repe_manifest.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    base = save(tmp_path / "base", model)
    plan = random_plan(model, Architecture.of(model).sites("mlp_in"), affine=False)
    edited = checkpoint(base, bake(model, plan), tmp_path / "edited", progress=False)
    path = keep_originals(base, edited, tmp_path / "undo.safetensors")
    with pytest.raises(OutputExistsError):
        keep_originals(base, edited, path)
    with pytest.raises(InputError, match="the same tensors"):
        keep_originals(base, shutil.copytree(base, tmp_path / "copy"), tmp_path / "none")
    with pytest.raises(ModelMismatchError, match="not the checkpoint"):
        revert(base, path, tmp_path / "back")
    with pytest.raises(OutputExistsError):
        revert(edited, path, base)
    with pytest.raises(FileFormatError, match="needed 'originals'"):
        revert(edited, bake(model, plan).save(tmp_path / "patch"), tmp_path / "back")
    other = tmp_path / "other"
    shutil.copytree(edited, other)
    changed = tensors(other)
    changed["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelMismatchError, match="up_proj"):
        revert(other, path, tmp_path / "back")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="does not have its hash"):
        revert(edited, path, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "none").exists()
