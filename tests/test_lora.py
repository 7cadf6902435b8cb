"""LoRA export: what PEFT computes with the adapter is what the patched weights compute, or there is no adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same, oblique, random_plan, snapshot, tiny, tiny_inputs
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture, Kind
from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    NumericalWarning,
    OutputExistsError,
    UnsupportedModelError,
    VerificationError,
)
from repe_unlearn.export.lora import lora
from repe_unlearn.export.peft_check import check_with_peft
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan

peft = pytest.importorskip("peft")

_READS: tuple[Kind, ...] = ("attn_in", "mlp_in", "final")
_WEIGHTS = "adapter_model.safetensors"


def made(family: str, *kinds: Kind, rank: int = 2, **settings: Any) -> tuple[nn.Module, Patch]:
    """Return a model and the patch of random linear erasers at sites of the given kinds (default: all that read)."""
    model = tiny(family, dtype=torch.float32, **settings)
    arch = Architecture.of(model)
    wanted = kinds or tuple(kind for kind in _READS if kind in arch.kinds)
    return model, bake(model, random_plan(model, arch.sites(*wanted), rank=rank, affine=False))


def made_with_experts(family: str) -> tuple[nn.Module, Patch]:
    """Return the same with routers, shared experts and routed experts among what is edited."""
    return made(family, "attn_in", "mlp_in")


def embedding_patch(model: nn.Module) -> Patch:
    """Return a patch that erases in all embeddings, with the head left alone."""
    arch = Architecture.of(model)
    names = [f"{arch.path(name)}.weight" for name in arch.family.embeddings]
    e = oblique(affine=False)
    edits = {n: Edit(model.get_parameter(n).double() @ e.right.T, -e.left.T, "embedding") for n in names}
    tied = model.get_parameter("lm_head.weight") is model.get_parameter(names[0])
    return Patch(edits, fingerprint(model), tied=(names[0], "lm_head.weight") if tied else None)


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family)).logits.double()


def reloaded(model: nn.Module, folder: Path, family: str) -> Tensor:
    """Return the logits with the adapter, loaded as its users do."""
    return logits(peft.PeftModel.from_pretrained(model, str(folder)).eval(), family)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "repe_manifest.json").read_text())


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


DENSE = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "phi3", "falcon", "bloom")
EXPERTS = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_reloaded_by_peft_it_equals_the_baked_model(family: str, tmp_path: Path) -> None:
    model, patch = made_with_experts(family) if family in EXPERTS else made(family)
    before, plain = snapshot(model), logits(model, family)
    folder = lora(model, patch, tmp_path / "adapter")
    assert_same(before, model)

    patch.apply_(model)
    baked = logits(model, family)
    patch.revert_(model)
    adapted = reloaded(model, folder, family)
    assert (adapted - baked).abs().max() <= 1e-5 * baked.abs().max()
    assert (plain - baked).abs().max() > 1e-2 * baked.abs().max()  # the patch does something


@pytest.mark.parametrize("family", EXPERTS)
def test_what_experts_write_is_edited_too(family: str, tmp_path: Path) -> None:
    model, patch = made(family, "attn_in", "mlp_in", "attn_out", "mlp_out")
    assert "model.layers.0.mlp.experts.down_proj" in patch.edits
    plain = logits(model, family)
    folder = lora(model, patch, tmp_path / "adapter")
    patch.apply_(model)
    baked = logits(model, family)
    patch.revert_(model)
    readers = Patch({n: e for n, e in patch.edits.items() if "down_proj" not in n}, patch.fingerprint)
    readers.apply_(model)
    without = logits(model, family)
    readers.revert_(model)
    adapted = reloaded(model, folder, family)
    assert (adapted - baked).abs().max() <= 1e-5 * baked.abs().max()
    for other in (plain, without):  # controls
        assert (other - baked).abs().max() > 1e-2 * baked.abs().max()


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("gemma", True), ("gpt2", True)]
)
def test_embeddings_are_edited_in_the_lookup_only(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32, tie_word_embeddings=tied)
    patch = embedding_patch(model)
    assert patch.untie is tied
    folder = lora(model, patch, tmp_path / "adapter")
    keys = load_file(folder / _WEIGHTS)
    assert all("lora_embedding" in key for key in keys)  # never a whole matrix
    patch.apply_(model)
    baked = logits(model, family)
    patch.revert_(model)
    assert (reloaded(model, folder, family) - baked).abs().max() <= 1e-5 * baked.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_layout_is_the_one_that_all_read(family: str, tmp_path: Path) -> None:
    model, patch = made_with_experts(family) if family in EXPERTS else made(family)
    extra = next(iter(patch.edits))  # one edit of rank 1 among those of rank 2
    small = Edit(patch.edits[extra].left[:, :1], patch.edits[extra].right[:1], "rank 1")  # type: ignore[index]
    patch = replace(patch, edits={**patch.edits, extra: small})
    folder = lora(model, patch, tmp_path / "adapter")
    written, tensors = config(folder), load_file(folder / _WEIGHTS)
    assert written["r"] == written["lora_alpha"] == 2
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {2}  # padded
    assert (written["rank_pattern"], written["alpha_pattern"], written["bias"]) == ({}, {}, "none")
    assert written["modules_to_save"] is None
    assert written["task_type"] == "CAUSAL_LM"
    assert written["fan_in_fan_out"] is (family == "gpt2")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    if family == "llama":
        assert set(written["target_modules"]) == {name.removesuffix(".weight") for name in patch.edits}
    if family == "mixtral":
        expert = "base_model.model.model.layers.0.block_sparse_moe.experts.3"
        assert {f"{expert}.{w}.lora_{side}.weight" for w in ("w1", "w2", "w3") for side in "AB"} <= set(
            tensors
        )
        assert not tensors[f"{expert}.w2.lora_B.weight"].any()  # not edited, but readers want all three


def test_manifest_and_card(tmp_path: Path) -> None:
    model, patch = made("llama")
    folder = lora(model, patch, tmp_path / "adapter", base="someone/llama", dtype=torch.bfloat16)
    facts = manifest(folder)
    assert facts["fingerprint"] == patch.fingerprint
    assert facts["exactness"] == dict(patch.exactness)
    assert set(facts["edited"]) == set(patch.edits)
    first = facts["edited"]["model.layers.0.self_attn.q_proj.weight"]
    assert first["rule"].startswith("reader")
    assert 1e-4 < first["rounding"] < 5e-3  # bfloat16
    fine = manifest(lora(model, patch, tmp_path / "fine"))["edited"]
    assert all(entry["rounding"] < 1e-6 for entry in fine.values())
    assert facts["verified"]["effect"] > facts["verified"]["difference"]
    card = (folder / "README.md").read_text()
    assert "base_model: someone/llama" in card
    assert "vllm serve someone/llama --enable-lora --max-lora-rank 8" in card
    assert "base_model:" not in (tmp_path / "fine" / "README.md").read_text()  # no name to give
    assert config(folder)["base_model_name_or_path"] == "someone/llama"


def test_biases_are_refused(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    sites = Architecture.of(model).sites("attn_in")
    with pytest.raises(InputError, match=r"biases.*affine=False"):
        lora(model, bake(model, random_plan(model, sites)), tmp_path / "adapter")
    gpt2, patch = made("gpt2", "attn_out")  # the writers have biases of their own
    with pytest.raises(InputError, match="sites that are read"):
        lora(gpt2, patch, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_dense_edits_need_a_rank(tmp_path: Path) -> None:
    model, patch = made("llama")
    dense = replace(patch, edits={n: Edit(e.delta(), None, "dense") for n, e in patch.edits.items()})
    with pytest.raises(InputError, match="max_rank"):
        lora(model, dense, tmp_path / "adapter")
    facts = manifest(lora(model, dense, tmp_path / "whole", max_rank=2))
    assert max(entry["cut"] for entry in facts["edited"].values()) < 1e-12
    with pytest.warns(NumericalWarning, match="loses"):
        facts = manifest(lora(model, dense, tmp_path / "cut", max_rank=1))
    name, edit = next(iter(patch.edits.items()))
    spectrum = torch.linalg.svdvals(edit.delta())
    expected = float(spectrum[1:].norm() / spectrum.norm())
    assert facts["edited"][name]["cut"] == pytest.approx(expected, rel=1e-6)
    with pytest.warns(NumericalWarning, match="loses"):  # the same for low-rank edits
        assert manifest(lora(model, patch, tmp_path / "low", max_rank=1))["edited"][name][
            "cut"
        ] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["stacked", "dense"])
def test_edits_of_experts_are_cut_one_by_one(form: str, tmp_path: Path) -> None:
    model, patch = made_with_experts("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    if form == "dense":
        patch = replace(patch, edits={**patch.edits, name: Edit(patch.edits[name].delta(), None, "dense")})
    spectra = torch.linalg.svdvals(patch.edits[name].delta())
    with pytest.warns(NumericalWarning, match="loses"):
        facts = manifest(lora(model, patch, tmp_path / "adapter", max_rank=1))
    assert facts["edited"][name]["cut"] == pytest.approx(
        float(spectra[:, 1:].norm() / spectra.norm()), rel=1e-6
    )
    assert facts["verified"]["difference"] < 1e-5  # against the patch as it was cut


def test_high_ranks_warn_of_vllm(tmp_path: Path) -> None:
    model, patch = made("llama", "attn_in", rank=17)
    with pytest.warns(UserWarning, match="--max-lora-rank 17"):
        folder = lora(model, patch, tmp_path / "adapter")
    assert "--max-lora-rank 32" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_what_peft_would_drop_is_refused(family: str, tmp_path: Path) -> None:
    """PEFT takes every gate_proj for one of a routed expert: shared experts and dense layers lose their part."""
    model, patch = made_with_experts(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"leaves out|cannot load"):
        lora(model, patch, tmp_path / "adapter")
    assert_same(before, model)
    assert not any(tmp_path.iterdir())
    lora(model, patch, tmp_path / "unchecked", verify=False)  # for other readers
    assert manifest(tmp_path / "unchecked")["verified"] is None
    _, attention = made(family, "attn_in")
    assert manifest(lora(model, attention, tmp_path / "attention"))["verified"]["difference"] < 1e-5


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_experts_that_are_fused_on_disk_are_refused(family: str, tmp_path: Path) -> None:
    model, patch = made_with_experts(family)
    with pytest.raises(UnsupportedModelError, match="one tensor"):
        lora(model, patch, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_the_check_sees_wrong_numbers_and_unused_tensors(tmp_path: Path) -> None:
    model, patch = made("llama")
    folder = lora(model, patch, tmp_path / "adapter")
    before, tensors = snapshot(model), load_file(folder / _WEIGHTS)
    check_with_peft(model, patch, folder)
    name = next(name for name in tensors if "lora_B" in name)

    save_file({**tensors, name: 1.01 * tensors[name]}, folder / _WEIGHTS)
    with pytest.raises(VerificationError, match="differs"):
        check_with_peft(model, patch, folder)
    save_file({**tensors, name.replace("layers.0", "layers.9"): tensors[name].clone()}, folder / _WEIGHTS)
    with pytest.raises(UnsupportedModelError, match="leaves out 1"):
        check_with_peft(model, patch, folder)
    save_file({**tensors, name: tensors[name][:1].clone()}, folder / _WEIGHTS)
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        check_with_peft(model, patch, folder)
    assert_same(before, model)


def test_the_check_leaves_no_trace(tmp_path: Path) -> None:
    model, patch = made_with_experts("mixtral")
    next(model.parameters()).requires_grad_(True)
    model.train()
    model.get_submodule("model.layers.0").eval()
    attributes = set(vars(model))

    def state() -> tuple[list[Any], ...]:
        modules = [(name, type(m), id(m), m.training) for name, m in model.named_modules()]
        return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    before = state()
    lora(model, patch, tmp_path / "adapter")
    assert state() == before
    assert set(vars(model)) == attributes


def test_from_a_folder_without_its_weights(tmp_path: Path) -> None:
    model, patch = made("llama")
    source = tmp_path / "model"
    model.save_pretrained(source)  # type: ignore[operator]
    from_model = load_file(lora(model, patch, tmp_path / "a") / _WEIGHTS)
    folder = lora(source, patch, tmp_path / "b")
    assert config(folder)["base_model_name_or_path"] == str(source)
    from_folder = load_file(folder / _WEIGHTS)
    assert from_model.keys() == from_folder.keys()
    assert all(torch.equal(from_model[name], from_folder[name]) for name in from_model)
    assert manifest(folder)["verified"]["difference"] is None  # keys only
    assert manifest(lora(source, patch, tmp_path / "c", verify=True))["verified"]["difference"] < 1e-5
    tiny("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        lora(tmp_path / "other", patch, tmp_path / "d", verify=True)
    assert not (tmp_path / "d").exists()


def test_wrong_models_and_arguments(tmp_path: Path) -> None:
    model, patch = made("llama")
    out = tmp_path / "adapter"
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        lora(tiny("llama", dtype=torch.float32, seed=1), patch, out)
    with pytest.raises(InputError, match="dtype"):
        lora(model, patch, out, dtype=torch.int8)
    with pytest.raises(InputError, match="max_rank"):
        lora(model, patch, out, max_rank=0)
    strange = replace(patch, edits={"model.layers.0.nothing.weight": next(iter(patch.edits.values()))})
    with pytest.raises(ModelMismatchError, match="does not have"):
        lora(model, strange, out)
    narrow = replace(patch, edits={n: Edit(e.left[:-1], e.right, e.rule) for n, e in patch.edits.items()})
    with pytest.raises(ModelMismatchError, match="shape"):
        lora(model, narrow, out)
    assert not any(tmp_path.iterdir())


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    model, patch = made("llama", "attn_in")
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            lora(model, patch, out, force=force)
    assert (out / "precious.txt").read_text() == "mine"
    lora(model, patch, tmp_path / "b")
    with pytest.raises(OutputExistsError, match="force"):
        lora(model, patch, tmp_path / "b")
    lora(model, patch, tmp_path / "b", force=True)


@pytest.mark.real
@pytest.mark.slow
def test_the_small_real_model(tmp_path: Path) -> None:
    """Rank 1 at every site that is read: the file is under 1 % of the checkpoint, the greedy tokens are the same."""
    from repe_unlearn.audit.equivalence import outputs
    from repe_unlearn.models import load

    model, tokenizer, _ = loaded = load(progress=False)
    arch = Architecture.of(model)
    erasers = {
        site: oblique(1, d=model.config.hidden_size, affine=False, seed=i)
        for i, site in enumerate(arch.sites("attn_in", "mlp_in"))
    }
    patch = bake(model, ErasurePlan(erasers, fingerprint(model)))
    prompts = [tokenizer.encode("The capital of France is"), tokenizer.encode("She said that her brother")]
    folder = lora(model, patch, tmp_path / "adapter")
    patch.apply_(model)
    baked = outputs(model, prompts, 16)
    patch.revert_(model)
    plain = outputs(model, prompts, 16)

    checkpoint = sum(file.stat().st_size for file in loaded.source.glob("*.safetensors"))
    assert (folder / _WEIGHTS).stat().st_size <= 0.01 * checkpoint
    adapted = outputs(peft.PeftModel.from_pretrained(model, str(folder)).eval(), prompts, 16)
    scale = max(float(of.abs().max()) for of in baked.logits)
    assert adapted.far_from(baked) <= 1e-5 * scale
    assert adapted.tokens == baked.tokens
    assert plain.far_from(baked) > 1e-2 * scale
