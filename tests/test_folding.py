"""What baking promises apart from the per-family proofs in conformance/test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, VOCAB, D, assert_same, oblique, random_plan, snapshot, tiny, token_ids
from torch import nn

from repe_unlearn.architectures import Architecture, Kind
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    ModelMismatchError,
    NotBakeableError,
    ShapeError,
    UnknownSiteError,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

ALL: tuple[Kind, ...] = ("attn_in", "mlp_in", "attn_out", "mlp_out", "final")


def plan_for(model: nn.Module, *kinds: Kind, affine: bool = False, rank: int = 2) -> ErasurePlan:
    return random_plan(model, Architecture.of(model).sites(*kinds), affine=affine, rank=rank)


def test_reader_weights_and_biases_by_hand() -> None:
    model = tiny("qwen2")
    site = Architecture.of(model).sites("attn_in", layers=[1])[0]
    e = oblique(2)
    patch = bake(model, ErasurePlan({site: e}, fingerprint(model)))
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = model.get_submodule(f"model.layers.1.self_attn.{name}")
        edit = patch.edits[f"model.layers.1.self_attn.{name}.weight"]
        torch.testing.assert_close(edit.apply(linear.weight), linear.weight @ e.matrix())
        bias = patch.edits[f"model.layers.1.self_attn.{name}.bias"].apply(linear.bias)
        torch.testing.assert_close(bias, linear.bias + linear.weight @ e.bias())
        assert edit.rank == 2
    assert len(patch) == 6
    assert not patch.new_biases
    assert not patch.config_updates


def test_writer_weights_and_biases_by_hand() -> None:
    for model_type, name in (
        ("gpt_neox", "gpt_neox.layers.2.mlp.dense_4h_to_h"),
        ("gpt2", "transformer.h.2.mlp.c_proj"),
    ):
        model, e = tiny(model_type), oblique(2)
        site = Architecture.of(model).sites("mlp_out", layers=[-1])[0]
        patch = bake(model, ErasurePlan({site: e}, fingerprint(model)))
        module = model.get_submodule(name)
        weight = module.weight.T if model_type == "gpt2" else module.weight
        new = patch.edits[f"{name}.weight"].apply(module.weight)
        torch.testing.assert_close(new.T if model_type == "gpt2" else new, e.matrix() @ weight)
        torch.testing.assert_close(
            patch.edits[f"{name}.bias"].apply(module.bias), e.matrix() @ module.bias + e.bias()
        )
        assert len(patch) == 2


def test_the_patch_says_what_it_covers() -> None:
    model = tiny("llama")
    plan = plan_for(model, *ALL)
    patch = bake(model, ErasurePlan(plan.erasers, plan.fingerprint, {"concept": "gender"}))
    assert patch.fingerprint == fingerprint(model)
    assert patch.provenance["concept"] == "gender"
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")
    for name in names:
        assert f"{LAYERS} {name}" in patch.provenance["coverage"]
    assert "1 lm_head" in patch.provenance["coverage"]
    assert len(patch) == 7 * LAYERS + 1
    assert set(patch.exactness) == {str(site) for site in plan.sites}
    assert set(patch.exactness.values()) == {"exact"}
    assert patch.tied is None
    assert (
        bake(tiny("gpt2"), plan_for(tiny("gpt2"), "attn_in")).tied is None
    )  # tied, but neither side is edited
    assert bake(tiny("gpt2"), plan_for(tiny("gpt2"), "final")).tied == (
        "transformer.wte.weight",
        "lm_head.weight",
    )


def test_new_biases_and_their_silent_siblings() -> None:
    model = tiny("llama")
    patch = bake(model, random_plan(model, Architecture.of(model).sites("attn_in", layers=[1])))
    attention = [
        f"model.layers.{i}.self_attn.{n}.bias" for i in range(LAYERS) for n in "qkvo" for n in [f"{n}_proj"]
    ]
    new = [name for name in attention if ".1." in name and "o_proj" not in name]
    assert dict(patch.new_biases) == {
        f"model.layers.1.self_attn.{n}_proj.bias": (size,)
        for n, size in (("q", D), ("k", D // 2), ("v", D // 2))
    }
    assert set(patch.zero_biases) == set(attention) - set(new)
    assert dict(patch.config_updates) == {"attention_bias": True}
    assert not bake(model, plan_for(model, "attn_in")).config_updates  # control: a linear eraser needs none


def test_rank_zero() -> None:
    model, ids = tiny("llama"), token_ids()
    nothing = Eraser(torch.zeros(D, 0), torch.zeros(0, D), torch.ones(D))
    a, b = Architecture.of(model).sites("attn_in", layers=[0, 1])
    plan = ErasurePlan({a: nothing, b: oblique(affine=False)}, fingerprint(model))
    with apply(model, plan):
        hooked = model(ids).logits
    bake(model, plan).apply_(model)
    torch.testing.assert_close(model(ids).logits, hooked, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    plan = plan_for(model, "mlp_in")
    patch = bake(model, plan)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.clone()
    expected = (weight.double() @ plan[plan.sites[0]].matrix()).to(dtype)
    patch.apply_(model)
    assert model.get_submodule(name).weight.dtype == dtype
    # one rounding: never further than a unit in the last place from the float64 product
    got = model.get_submodule(name).weight
    assert (got != expected).float().mean() < 0.01
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_baking_reads_only() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    before = snapshot(model)
    bake(model, plan_for(model, *ALL))
    assert_same(before, model)


# Refusals


def test_all_or_nothing() -> None:
    """One site that cannot be baked refuses the whole plan."""
    model = tiny("llama")
    good, bad = Architecture.of(model).sites("attn_in", "resid_post", layers=[0])
    with pytest.raises(NotBakeableError) as caught:
        bake(model, random_plan(model, [good, bad], affine=False))
    assert caught.value.site == bad
    assert (
        str(caught.value) == f"{bad} cannot be baked: {caught.value.reason}. Instead: {caught.value.instead}."
    )
    with pytest.raises(NotBakeableError, match=r"the config of llama has no switch .*affine=False"):
        bake(model, random_plan(model, Architecture.of(model).sites("attn_in", "final")))


def test_other_models_and_sites() -> None:
    model = tiny("llama")
    with pytest.raises(ModelMismatchError, match="fit a new plan"):
        bake(tiny("llama", seed=1), plan_for(model, "attn_in"))
    with pytest.raises(UnknownSiteError):
        bake(model, ErasurePlan({Site("model.layers.9.mlp.down_proj"): oblique()}, fingerprint(model)))
    lonely = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedArchitectureError, match="supported: bert"):
        bake(lonely, ErasurePlan({Site("0"): oblique(d=2, rank=1)}, fingerprint(lonely)))


@pytest.mark.parametrize("kind", ALL)
def test_wrong_width(kind: Kind) -> None:
    model = tiny("llama")
    site = Architecture.of(model).sites(kind)[0]
    with pytest.raises(ShapeError, match="an eraser of width 16 does not fit"):
        bake(model, ErasurePlan({site: oblique(d=16, affine=False)}, fingerprint(model)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights(dtype: torch.dtype) -> None:
    model = tiny("llama")
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    module.weight = nn.Parameter(torch.ones(48, D).to(dtype), requires_grad=False)
    plan = plan_for(model, "mlp_in")
    with pytest.raises(
        UnsupportedModelError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight is quantised \({dtype}\)"
    ):
        bake(model, plan)
    assert bake(model, plan_for(model, "attn_in"))  # control: the others can be edited


def test_replaced_layers() -> None:
    """Quantisation libraries replace linear layers by modules without a plain weight."""
    model = tiny("llama")
    model.get_submodule("model.layers.1.mlp").up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        bake(model, plan_for(model, "mlp_in"))


def test_meta_weights() -> None:
    model = tiny("llama")
    plan = plan_for(model, "mlp_in")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        bake(tiny("llama").to("meta"), plan)


def test_vocabulary_of_a_grown_head() -> None:
    """The head is a reader like any other, whatever its number of rows."""
    model = tiny("llama", vocab_size=VOCAB + 11)
    assert bake(model, plan_for(model, "final")).edits["lm_head.weight"].shape == (VOCAB + 11, D)
