"""Checkpoints whose tensors are called otherwise than the model's parameters, or cut otherwise."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, HEADS, tiny
from torch import Tensor, nn

from repe_unlearn.errors import InputError, ModelMismatchError
from repe_unlearn.export import checkpoint
from repe_unlearn.export.names import parameters
from repe_unlearn.export.safetensors_io import TensorSpec, index, read_header
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.placement import stored_parameters

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
RENAMED = ("gpt_neox", "gemma3", "vit")


def write(model: nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def loaded(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    auto = getattr(transformers, HEADS.get(model_type, "AutoModelForCausalLM"))
    return auto.from_pretrained(folder, dtype=dtype)


def edit_of(weight: Tensor, seed: int, rank: int = 2) -> Edit:
    """A low-rank edit of a matrix or a stack, an edit with one shared factor, or a dense one of a vector."""
    generator = torch.Generator().manual_seed(seed)
    if weight.ndim < 2:
        return Edit(torch.randn(weight.shape, generator=generator), None, "dense")
    *stack, rows, columns = weight.shape
    left = torch.randn(*(stack if seed % 2 else ()), rows, rank, generator=generator)
    right = torch.randn(*(() if seed % 2 else stack), rank, columns, generator=generator)
    return Edit(left, right, "low rank")


def patch_of(model: nn.Module) -> Patch:
    """Edits every second parameter, all stacks of experts among them."""
    names = [name for name, p in model.named_parameters() if p.ndim <= 3]
    chosen = [name for i, name in enumerate(names) if i % 2 or "experts" in name or "gate" in name]
    weights = dict(model.named_parameters())
    return Patch({name: edit_of(weights[name], i) for i, name in enumerate(chosen)}, fingerprint(model))


@pytest.mark.parametrize("model_type", [*MOE, *RENAMED])
@pytest.mark.parametrize("shard", [None, "40KB"])
def test_reloaded_equals_the_patch_in_memory_bit_for_bit(
    tmp_path: Path, model_type: str, shard: str | None
) -> None:
    model = tiny(model_type, dtype=torch.float32)
    options = {} if shard is None else {"max_shard_size": shard}
    source = write(model, tmp_path / "source", **options)
    patch = patch_of(model)
    assert any(name not in index(source) for name in patch.edits) or model_type in ("gpt_oss", "llama4_text")
    out = checkpoint(source, patch, tmp_path / "out", progress=False)
    got = loaded(model_type, out).state_dict()
    before = copy.deepcopy(model.state_dict())
    patch.apply_(model)
    wanted = model.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
    assert all(not torch.equal(before[name], wanted[name]) for name in patch.edits)  # control


def test_a_fresh_process_gives_the_logits_of_the_patched_model(tmp_path: Path) -> None:
    model = tiny("mixtral", dtype=torch.float32)
    patch = patch_of(model)
    out = checkpoint(write(model, tmp_path / "source"), patch, tmp_path / "out", progress=False)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="eager", attn_implementation="eager")
with torch.no_grad():
    torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
assert "repe_unlearn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(out), str(tmp_path / "logits.pt")], check=True)
    with torch.no_grad():
        before = model(torch.arange(3, 20)[None]).logits
        patch.apply_(model)
        wanted = model(torch.arange(3, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
    assert not torch.allclose(before, wanted)  # control


def test_names_on_disk_and_in_memory_are_both_understood(tmp_path: Path) -> None:
    """transformers can write its own names too; the same patch fits both folders."""
    model = tiny("mixtral", dtype=torch.bfloat16)
    patch = patch_of(model)
    disk = write(model, tmp_path / "disk")
    memory = write(model, tmp_path / "memory", save_original_format=False)
    assert index(disk).keys() != index(memory).keys()
    outs = [
        checkpoint(source, patch, tmp_path / f"{source.name}-out", progress=False)
        for source in (disk, memory)
    ]
    one, other = (loaded("mixtral", out, torch.bfloat16).state_dict() for out in outs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_manifest_names_the_parameter_of_every_expert(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", dtype=torch.float32)
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    patch = Patch({stack: edit_of(model.get_parameter(stack), 0)}, fingerprint(model))
    out = checkpoint(write(model, tmp_path / "source"), patch, tmp_path / "out", progress=False)
    edited = json.loads((out / "repe_manifest.json").read_text())["edited"]
    assert len(edited) == 2 * 4
    assert {entry["parameter"] for entry in edited.values()} == {stack}
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", out))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(edited)


def test_a_missing_expert_is_told(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", dtype=torch.float32)
    source = write(model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelMismatchError, match="part 1 of expert 2 is missing"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_one_expert_more_is_another_model(tmp_path: Path) -> None:
    model = tiny("qwen3_moe", dtype=torch.float32)
    larger = tiny("qwen3_moe", dtype=torch.float32, num_experts=5)
    source = write(larger, tmp_path / "source")
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False)
    with pytest.raises(ModelMismatchError, match="the checkpoint has"):
        checkpoint(source, patch_of(model), tmp_path / "out", progress=False, check_fingerprint=False)


def test_an_edit_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    class Opaque:
        def apply(self, weight: Tensor) -> Tensor:
            return weight + 1

    model = tiny("mixtral", dtype=torch.float32)
    patch = patch_of(model)
    name = "model.layers.0.mlp.experts.down_proj"
    object.__setattr__(patch, "edits", {name: Opaque()})
    with pytest.raises(InputError, match="4 tensors on disk"):
        checkpoint(write(model, tmp_path / "source"), patch, tmp_path / "out", progress=False)


# XLM-RoBERTa among them: it registers its head before its embeddings, and files keep the tied tensor by the latter.
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_family_is_found_on_disk(tmp_path: Path, model_type: str) -> None:
    """All parameters by name and shape, and the fingerprint of the model, from the files alone."""
    model = tiny(model_type, dtype=torch.float32)
    source = write(model, tmp_path / "source")
    header = read_header(source / "model.safetensors")
    found = parameters(model_type, header.specs)
    stored = dict(stored_parameters(model))
    wanted = {name: tuple(p.shape) for name, p in stored.items()}
    assert {name: parameter.shape for name, parameter in found.items() if name in wanted} == wanted
    name = next(name for name, p in reversed(stored.items()) if p.ndim == 2)
    patch = Patch({name: edit_of(stored[name], 0)}, fingerprint(model))
    assert checkpoint(source, patch, tmp_path / "out", progress=False).is_dir()


def test_names_of_an_unknown_family_stay() -> None:
    spec = TensorSpec("tower.block_sparse_moe.experts.0.w1.weight", "F32", (2, 3))
    assert list(parameters("nobody", {spec.name: spec})) == [spec.name]
    with pytest.raises(ModelMismatchError, match=r"tower\.mlp\.experts\.gate_up_proj"):  # control
        parameters("mixtral", {spec.name: spec})
