"""The patch between two checkpoints: rank, bits, new biases, untied heads, settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import save, tiny_llama
from tiny import random_plan, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from repe_unlearn.architectures import Architecture
from repe_unlearn.difference import diff
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NonFiniteError,
    UnsupportedModelError,
)
from repe_unlearn.export import checkpoint
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Patch


def wide(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A llama whose matrices are large enough for a rank to be small."""
    return tiny("llama", dtype=dtype, hidden_size=96, intermediate_size=128, num_hidden_layers=2)


def made(model: nn.Module, *kinds: str, affine: bool = True) -> Patch:
    width = model.config.hidden_size  # type: ignore[union-attr]
    from tiny import oblique

    from repe_unlearn.plan import ErasurePlan

    sites = Architecture.of(model).sites(*kinds)  # type: ignore[arg-type]
    erasers = {site: oblique(2, d=width, affine=affine, seed=i) for i, site in enumerate(sites)}  # type: ignore[arg-type]
    return bake(model, ErasurePlan(erasers, fingerprint(model)))


def pair(tmp_path: Path, patch: Patch, model: nn.Module) -> tuple[Path, Path]:
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base", checkpoint(tmp_path / "base", patch, tmp_path / "edited", progress=False)


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_rank_of_a_bake_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wide(dtype)
    patch = made(model, "attn_in", "mlp_out")
    base, edited = pair(tmp_path, patch, model)
    found = diff(base, edited)
    assert set(found.edits) == set(patch.edits)
    weights = [name for name in patch.edits if name.endswith("weight")]
    assert {found.edits[name].rank for name in weights} == {2}
    assert found.fingerprint == patch.fingerprint == fingerprint(model)
    assert dict(found.new_biases) == dict(patch.new_biases)
    assert dict(found.zero_biases) == dict(patch.zero_biases)
    assert dict(found.config_updates) == dict(patch.config_updates)
    # What the checkpoint holds besides is rounding only.
    for name in weights:
        exact, got = patch.edits[name].delta(), found.edits[name].delta()
        size = model.get_parameter(name).double().norm()
        assert (got - exact).norm() <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("bitwise", [False, True])
def test_what_it_reproduces_is_what_it_says(bitwise: bool, tmp_path: Path) -> None:
    model = wide(torch.bfloat16)
    base, edited = pair(tmp_path, made(model, "attn_in", "mlp_out"), model)
    found = diff(base, edited, bitwise=bitwise)
    got, wanted = loaded(base), loaded(edited)
    found.apply_(got)
    off = changed = 0
    for name, value in wanted.named_parameters():
        have = got.get_parameter(name)
        if name in found.edits and name not in found.new_biases:
            off += int((have != value).sum())
            changed += value.numel()
        else:
            assert torch.equal(have, value), name
        # A rounding step of the largest element bounds them all.
        assert (have - value).abs().max() <= torch.finfo(torch.bfloat16).eps * value.abs().max()
    if bitwise:
        assert off == 0
        assert found.provenance["reproduces"] == "bit for bit"
        assert {edit.rank for edit in found.edits.values()} == {None}
    else:
        assert 0 < off < 0.2 * changed
        assert found.provenance["reproduces"] == f"{changed - off} of {changed} changed elements bit for bit"
        assert sum("a rounding step off" in edit.rule for edit in found.edits.values()) > 0


def test_small_changes_that_are_no_low_rank_stay_dense() -> None:
    base, edited = wide(torch.bfloat16), wide(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    name, sparse = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():  # of the size of a rounding step, everywhere; and a few single elements
        weight = edited.get_parameter(name)
        weight += 0.005 * weight * torch.randn(weight.shape, generator=generator).to(weight)
        weight = edited.get_parameter(sparse)
        weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 1.01
    found = diff(base, edited)
    assert set(found.edits) == {name, sparse}
    assert {edit.rank for edit in found.edits.values()} == {None}
    found.apply_(base)
    for which in (name, sparse):
        assert torch.equal(base.get_parameter(which), edited.get_parameter(which))


def test_max_rank() -> None:
    base, edited = wide(), wide()
    made(edited, "mlp_out").apply_(edited)
    name = "model.layers.0.mlp.down_proj.weight"
    assert diff(base, edited, max_rank=2).edits[name].rank == 2
    assert diff(base, edited, max_rank=1).edits[name].rank is None
    with pytest.raises(InputError, match="got max_rank=0"):
        diff(base, edited, max_rank=0)


def test_stacked_experts() -> None:
    base = tiny("mixtral", hidden_size=64, num_hidden_layers=1)
    edited = tiny("mixtral", hidden_size=64, num_hidden_layers=1)
    name = "model.layers.0.mlp.experts.down_proj"
    r = torch.nn.functional.normalize(
        torch.randn(64, generator=torch.Generator().manual_seed(0)).double(), dim=0
    )
    with torch.no_grad():
        weight = edited.get_parameter(name)
        weight -= torch.einsum("o,p,epi->eoi", r, r, weight)
        weight[1] = base.get_parameter(name)[1]  # one expert is not edited
    edit = diff(base, edited).edits[name]
    assert tuple(edit.left.shape) == (4, 64, 1)
    torch.testing.assert_close(edit.delta(), weight.detach() - base.get_parameter(name), rtol=0, atol=1e-13)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_of_a_folder_get_the_names_of_the_model(model_type: str, tmp_path: Path) -> None:
    base, edited = (tiny(model_type, hidden_size=64, num_hidden_layers=1) for _ in range(2))
    for part in ("gate_up_proj", "down_proj"):
        weight = edited.get_parameter(f"model.layers.0.mlp.experts.{part}").data
        column, line = torch.ones(weight.shape[1], 1).double(), torch.ones(1, weight.shape[2]).double()
        weight += 0.1 * column @ line
    for model, name in ((base, "base"), (edited, "edited")):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    found = diff(tmp_path / "base", tmp_path / "edited")
    again = diff(base, edited)
    assert set(found.edits) == set(again.edits)
    assert {edit.rank for edit in found.edits.values()} == {1}
    assert found.fingerprint == fingerprint(base)
    for name, edit in found.edits.items():
        torch.testing.assert_close(edit.delta(), again.edits[name].delta(), rtol=0, atol=1e-13)
        assert float(edit.delta().mean()) == pytest.approx(0.1)


def test_untied_head(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    patch = bake(model, random_plan(model, Architecture.of(model).sites("final"), affine=False))
    save(tmp_path / "base", model)
    edited = checkpoint(tmp_path / "base", patch, tmp_path / "edited", progress=False)
    found = diff(tmp_path / "base", edited)
    assert found.tied == patch.tied
    assert set(found.edits) == {"lm_head.weight"}
    assert found.edits["lm_head.weight"].rank == 2
    assert found.fingerprint == patch.fingerprint
    # Between the models in memory it is the same.
    after = loaded(edited)
    again = diff(model, after)
    assert again.tied == patch.tied
    assert torch.equal(again.edits["lm_head.weight"].delta(), found.edits["lm_head.weight"].delta())
    found.apply_(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(model.lm_head.weight, after.get_parameter("lm_head.weight"))


def test_folder_against_model(tmp_path: Path) -> None:
    base = save(tmp_path / "base", shard="20KB")
    model = tiny_llama()
    patch = bake(model, random_plan(model, Architecture.of(model).sites("attn_in")))
    patch.apply_(model)
    found = diff(base, model)
    assert found.fingerprint == patch.fingerprint
    assert set(found.edits) == set(patch.edits)
    assert dict(found.config_updates) == {"attention_bias": True}
    assert dict(found.zero_biases) == dict(patch.zero_biases)


def test_the_same_and_the_wrong(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    same = shutil.copytree(base, tmp_path / "same")
    with pytest.raises(InputError, match="every tensor is the same, bit for bit"):
        diff(base, same)
    with pytest.raises(ModelMismatchError, match="base is a llama model, edited a gpt2 model"):
        diff(base, tiny("gpt2"))
    with pytest.raises(ModelMismatchError, match="no two versions of one model"):
        diff(base, wide())
    with pytest.raises(FileFormatError, match=r"config\.json"):
        diff(base, tmp_path / "nowhere")
    broken = tiny_llama()
    with torch.no_grad():
        broken.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="up_proj"):
        diff(base, broken)
    coded = tiny_llama()
    coded.model.norm._parameters["weight"] = nn.Parameter(
        torch.ones(32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="quantised"):
        diff(base, coded)


def test_settings(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    other = tiny_llama()
    with torch.no_grad():
        other.get_parameter("model.norm.weight").add_(1)
    edited = save(tmp_path / "edited", other)
    config = json.loads((edited / "config.json").read_text())
    config |= {"rms_norm_eps": 0.5, "quirks": {"a": 1}, "transformers_version": "0"}
    (edited / "config.json").write_text(json.dumps(config))
    found = diff(base, edited)
    assert dict(found.config_updates) == {"rms_norm_eps": 0.5}
    assert found.provenance["config keys left out"] == "quirks"
