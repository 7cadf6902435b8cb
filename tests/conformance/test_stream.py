"""One map for the whole residual stream, and what becomes of tied embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rowkit import CASES, float64_throughout, gap, outputs, patched_row, stream_class
from tiny import LAYERS, assert_same, oblique, random_plan, reading, snapshot, tiny, tiny_inputs, token_ids
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, NotBakeableError, UnsupportedModelError
from repe_unlearn.export.checkpoint import checkpoint
from repe_unlearn.folding import bake
from repe_unlearn.hooks import apply
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.stream import plan_stream, stream_sites

EXACT = [name for name in CASES if stream_class(name) == "exact"]
ERASURE_EXACT = [name for name in CASES if stream_class(name) == "erasure-exact"]
affine_and_linear = pytest.mark.parametrize("affine", [True, False])


def read(model: nn.Module, plan: ErasurePlan, name: str) -> float:
    """Return how far what the eraser reads is from its constant, in the stream at every boundary of blocks."""
    arch = CASES[name].arch(model)
    e = plan[plan.sites[0]]
    with reading(model, arch.sites("resid_pre", "resid_post")) as seen, float64_throughout(), torch.no_grad():
        model(**tiny_inputs(CASES[name].model_type))
    return max(float(((x - e.shift) @ e.right.T).abs().max()) for x in seen.values())


def test_there_are_enough_families() -> None:
    assert len({CASES[name].model_type for name in EXACT}) >= 20
    assert len({CASES[name].model_type for name in (*EXACT, *ERASURE_EXACT)}) >= 27


@pytest.mark.parametrize("name", EXACT)
@affine_and_linear
def test_the_baked_stream_is_the_hooked_one_and_erased(name: str, affine: bool) -> None:
    case = CASES[name]
    model = case.model()
    plan = plan_stream(model, oblique(affine=affine), stack=case.stack)
    base, before, had = outputs(case, model), snapshot(model), read(model, plan, name)
    with apply(model, plan):
        hooked = outputs(case, model)
    patch = bake(model, plan).apply_(model)
    assert gap(hooked, outputs(case, model)) <= 1e-10
    assert gap(base, hooked) > 1e-3  # control
    assert read(model, plan, name) <= 1e-10 < 1e-2 < had
    assert set(patch.exactness.values()) == {"exact"}
    assert not patch.new_biases
    assert not patch.zero_biases
    patch.revert_(model)
    assert_same(before, model)


@pytest.mark.parametrize(
    ("name", "affine"),
    [
        (name, a)
        for name in ERASURE_EXACT
        for a in (True, False)
        if stream_class(name, affine=a) == "erasure-exact"
    ],
)
def test_behind_norms_the_stream_is_erased(name: str, affine: bool) -> None:
    model = CASES[name].model()
    plan = plan_stream(model, oblique(affine=affine))
    had = read(model, plan, name)
    with pytest.raises(NotBakeableError, match="stands between"):
        bake(model, plan)
    patch = bake(model, plan, allow="erasure-exact").apply_(model)
    assert read(model, plan, name) <= 1e-10 < 1e-2 < had
    assert "erasure-exact" in patch.exactness.values()


@pytest.mark.parametrize("name", [name for name in CASES if stream_class(name) == "impossible"])
def test_layernorms_on_the_stream_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="LayerNorm follows the sum"):
        plan_stream(CASES[name].model(), oblique())


@pytest.mark.parametrize("name", [name for name in CASES if stream_class(name, affine=True) == "hook only"])
def test_what_only_hooks_can_do_is_refused_with_the_reason(name: str) -> None:
    case = CASES[name]
    model = case.model()
    plan = plan_stream(model, oblique(), stack=case.stack)
    had = read(model, plan, name)
    with pytest.raises(NotBakeableError, match="share one embedding" if "t5" in name else "images enter"):
        bake(model, plan, allow="approximate")
    with apply(model, plan):
        assert read(model, plan, name) <= 1e-8 < 1e-2 < had


def test_coverage_is_told_and_a_plan_that_lacks_a_writer_is_refused() -> None:
    model = tiny("qwen2_moe", mlp_only_layers=[0])
    plan = plan_stream(model, oblique(), provenance={"concept": "gender"})
    patch = bake(model, plan)
    assert patch.provenance["concept"] == "gender"
    assert patch.provenance["coverage"] == (
        "1/1 embed_tokens, 3/3 o_proj, 1/1 down_proj, 2/2 experts.down_proj, 2/2 shared_expert.down_proj"
    )
    assert tuple(plan.sites) == stream_sites(Architecture.of(model))
    last = plan.sites[-1]
    short = plan.replace({site: e for site, e in plan.erasers.items() if site != last})
    with pytest.raises(NotBakeableError, match="lacks 1 of its writers") as caught:
        bake(model, short)
    assert caught.value.site == last
    # control: without the claim to be the whole stream it is a plan like others
    assert len(bake(model, replace(short, provenance={}))) == len(patch) - 2
    some = random_plan(model, Architecture.of(model).sites("attn_out", layers=[0, 2]), affine=False)
    assert bake(model, some).provenance["coverage"] == f"2/{LAYERS} o_proj"


@pytest.mark.parametrize(("name", "key"), [("granite", "embedding_scale"), ("gpt2", "embeddings")])
def test_a_wrong_row_is_detected(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    plan = plan_stream(model, oblique())
    wrong = None if key == "embedding_scale" else ("transformer.wte",)
    with patched_row(monkeypatch, name, **{key: wrong}):
        patch = bake(model, plan)
    patch.apply_(model)
    assert read(model, plan, name) > 1e-2


def test_embeddings_that_scale_need_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma")
    with patched_row(monkeypatch, "gemma", embedding_scale=None):
        with pytest.raises(NotBakeableError, match="may scale what it looks up"):
            bake(model, plan_stream(model, oblique()))
        assert bake(model, plan_stream(model, oblique(affine=False)))  # a linear map commutes with the factor


def test_only_the_first_block_has_weights_before_it() -> None:
    model = tiny("llama")
    first, second = Architecture.of(model).sites("resid_pre", layers=[0, 1])
    e = oblique()
    plan = random_plan(model, [first])
    with apply(model, plan):
        hooked = outputs(CASES["llama"], model)
    patch = bake(model, plan)
    assert list(patch.edits) == ["model.embed_tokens.weight"]
    patch.apply_(model)
    assert gap(hooked, outputs(CASES["llama"], model)) <= 1e-10
    patch.revert_(model)
    with pytest.raises(NotBakeableError, match="skip path"):
        bake(model, ErasurePlan({second: e}, plan.fingerprint))


@pytest.mark.parametrize("tied", [True, False])
def test_images_are_erased_in_files_too(tied: bool, tmp_path: Path) -> None:
    """The projector is a writer of the stream; plain transformers loads what was exported."""
    from transformers import AutoModelForImageTextToText

    model = tiny("gemma3", dtype=torch.float32, tie_word_embeddings=tied)
    inputs = tiny_inputs("gemma3", dtype=torch.float32)
    with pytest.raises(NotBakeableError, match=r"without a bias.*affine=False"):
        bake(model, plan_stream(model, oblique()), allow="erasure-exact")
    plan = plan_stream(model, oblique(affine=False))
    patch = bake(model, plan, allow="erasure-exact")
    assert "1/1 mm_input_projection_weight" in patch.provenance["coverage"]
    model.save_pretrained(tmp_path / "source")  # type: ignore[operator]
    out = checkpoint(tmp_path / "source", patch, tmp_path / "out", progress=False)
    loaded = AutoModelForImageTextToText.from_pretrained(out, attn_implementation="eager").eval()
    last = Architecture.of(loaded).sites("resid_post")[-1]
    e = plan[plan.sites[0]].to(dtype=torch.float32)
    read = {}
    for which, net in (("before", model), ("after", loaded)):
        with reading(net, [last]) as seen, torch.no_grad():
            net(**inputs)
        read[which] = (seen[last] @ e.right.T)[:, 2:6].abs().max()  # at the tokens of the images
    assert read["after"] < 1e-4 < 1e-1 < read["before"]
    patch.apply_(model)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


# Tied embeddings


@pytest.fixture
def tied() -> nn.Module:
    return tiny("llama", tie_word_embeddings=True)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(token_ids()).logits


def test_untied_by_default(tied: nn.Module) -> None:
    plan, old = plan_stream(tied, oblique()), tied.get_parameter("lm_head.weight").clone()
    patch = bake(tied, plan)
    assert (patch.untie, patch.adapter) == (True, False)
    patch.apply_(tied)
    assert torch.equal(tied.get_parameter("lm_head.weight"), old)  # the head is no writer
    assert not torch.equal(tied.get_parameter("model.embed_tokens.weight"), old)


def test_an_adapter_keeps_the_tie_in_files(tied: nn.Module, tmp_path: Path) -> None:
    plan = plan_stream(tied, oblique())
    patch = bake(tied, plan, tied="adapter")
    assert patch.adapter
    assert patch.untie
    assert Patch.load(patch.save(tmp_path / "patch.safetensors")).adapter
    before = snapshot(tied)
    with apply(tied, plan):
        hooked = logits(tied)
    patch.apply_(tied)
    torch.testing.assert_close(logits(tied), hooked, rtol=0, atol=1e-10)
    patch.revert_(tied)
    assert_same(before, tied)
    assert not bake(
        tiny("llama"), plan_stream(tiny("llama"), oblique()), tied="adapter"
    ).adapter  # nothing is tied


def test_skip_leaves_both_and_tells_the_share(tied: nn.Module) -> None:
    plan = plan_stream(tied, oblique())
    patch = bake(tied, plan, tied="skip")
    whole = bake(tied, plan)
    name = "model.embed_tokens.weight"
    assert set(whole.edits) - set(patch.edits) == {name}
    assert patch.tied is None
    assert patch.exactness[str(plan.sites[0])] == "approximate"
    weight = tied.get_parameter(name)
    share = float(whole.edits[name].delta().norm() / weight.norm())
    assert (
        patch.provenance["skipped"]
        == f"{name} keeps what its edit would have changed: {share:.2%} of its norm"
    )
    assert "skipped" not in bake(tiny("llama"), plan_stream(tiny("llama"), oblique()), tied="skip").provenance
    patch.apply_(tied)
    assert tied.get_parameter("lm_head.weight") is weight


def test_skip_at_the_head_drops_its_bias_too() -> None:
    model = tiny("phi", tie_word_embeddings=True)
    arch = Architecture.of(model)
    plan = random_plan(model, arch.sites("mlp_out", "final"))
    assert {"lm_head.weight", "lm_head.bias"} <= set(bake(model, plan).edits)
    patch = bake(model, plan, tied="skip")
    assert not any(name.startswith("lm_head") for name in patch.edits)
    assert patch.exactness[str(arch.sites("final")[0])] == "approximate"


def test_unknown_policies_are_refused(tied: nn.Module) -> None:
    with pytest.raises(InputError, match="needed one of untie, adapter, skip"):
        bake(tied, plan_stream(tied, oblique()), tied="keep")  # type: ignore[arg-type]
