from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from textkit import text_tokenizer
from tiny import VOCAB, D, assert_same, hook_count, oblique, random_plan, reading, snapshot, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture, supported
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    ShapeError,
    UnknownSiteError,
    UnsupportedModelError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.hooks import Applied, apply, fused
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

families = pytest.mark.parametrize("model_type", supported())


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def plan_for(model: nn.Module, *, affine: bool = True, rank: int = 1) -> ErasurePlan:
    sites = Architecture.of(model).sites("attn_in", "mlp_in", "attn_out", "mlp_out", "final")
    return random_plan(model, sites, affine=affine, rank=rank)


def generate(model: nn.Module, ids: Tensor, cache: bool) -> list[list[int]]:
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            use_cache=cache,
        )
    return out[:, ids.shape[1] :].tolist()


# What hooks do


@families
def test_generation_with_and_without_cache(model_type: str) -> None:
    model, ids = tiny(model_type), token_ids(2, 6)
    plain = generate(model, ids, cache=True)
    with apply(model, plan_for(model)):
        cached, uncached = generate(model, ids, cache=True), generate(model, ids, cache=False)
    assert len(cached[0]) == 20
    assert cached == uncached
    assert cached != plain  # control
    assert generate(model, ids, cache=True) == plain


@families
def test_left_and_right_padding_give_the_same_next_token(model_type: str) -> None:
    """In float32: eager attention in float64 has no finite value for a query that sees only padding."""
    model = tiny(model_type, dtype=torch.float32)
    short, long = token_ids(1, 5)[0], token_ids(1, 9, seed=8)[0]
    pad, no, yes = torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.ones(5)
    right_ids, right_mask = (
        torch.stack([torch.cat([short, pad]), long]),
        torch.stack([torch.cat([yes, no]), torch.ones(9)]),
    )
    left_ids, left_mask = (
        torch.stack([torch.cat([pad, short]), long]),
        torch.stack([torch.cat([no, yes]), torch.ones(9)]),
    )

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask.long()
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits

    with apply(model, plan_for(model)):
        right, left, alone = run(right_ids, right_mask), run(left_ids, left_mask), model(short[None]).logits
    nexts = [right[0, 4], left[0, 8], alone[0, 4]]
    for other in nexts[1:]:
        torch.testing.assert_close(nexts[0], other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(right[1, 8], left[1, 8], rtol=1e-3, atol=1e-4)
    assert (nexts[0] - run(right_ids, right_mask)[0, 4]).abs().max() > 1e-2  # control: without the plan


@families
def test_what_the_eraser_reads_is_constant(model_type: str) -> None:
    model = tiny(model_type)
    plan = plan_for(model, rank=2)
    with apply(model, plan) as handle, reading(model, plan.sites) as seen:
        model(token_ids())
    assert handle.sites == plan.sites
    with reading(model, plan.sites) as before:
        model(token_ids())
    for site in plan.sites:
        e = plan[site]
        torch.testing.assert_close(
            seen[site] @ e.right.T, (e.right @ e.shift).expand(2, 9, 2), rtol=0, atol=1e-10
        )
        assert ((before[site] - e.shift) @ e.right.T).abs().max() > 1e-2  # control


def test_hooks_equal_the_eraser_itself() -> None:
    for dtype in (torch.float64, torch.float32):
        for shape in ((D,), (3, D), (2, 5, D), (0, D)):
            x, e = torch.randn(shape, dtype=dtype), oblique(3)
            y = fused(e)(x)
            assert y.dtype == dtype
            assert y.shape == x.shape
            torch.testing.assert_close(y, e(x), rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)
    with pytest.raises(ShapeError, match="got activations of width 31; the eraser at this site needs 32"):
        fused(oblique())(torch.randn(2, 31))


def test_input_is_not_written_into() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    kept = x.clone()
    assert not torch.equal(fused(oblique())(x), kept)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_half_precision_models(precision: torch.dtype) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    plan = plan_for(model)
    plan = plan.replace({site: plan[site].to(dtype=precision) for site in plan.sites})
    ids = token_ids()
    with apply(model, plan), apply(wide, plan):  # one fingerprint for both
        half, full = model(ids).logits, wide(ids).logits
    assert half.dtype == torch.bfloat16
    base = wide(ids).logits
    error = float((half.float() - full).norm() / full.norm())
    assert error < 0.15
    assert float((base - full).norm() / full.norm()) > 4 * error  # control: bfloat16 is nearer than no plan


def test_families_without_a_row_and_tuple_outputs() -> None:
    """A site is any module; Falcon's attention returns a tuple, BLOOM's block may too."""
    from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": VOCAB, "hidden_size": D, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    falcon = (
        FalconForCausalLM(FalconConfig(**small, num_hidden_layers=2, num_attention_heads=4)).eval().double()
    )
    bloom = BloomForCausalLM(BloomConfig(**small, n_layer=2, n_head=4)).eval().double()
    for model in (falcon, bloom):
        sites = [
            Site("transformer.h.0.self_attention"),
            Site("transformer.h.1"),
            Site("transformer.h.1.mlp", "input"),
        ]
        plan = ErasurePlan({s: oblique(seed=i) for i, s in enumerate(sites)}, fingerprint(model))
        ids = token_ids(2, 6)
        plain = model(ids).logits
        with apply(model, plan):
            assert generate(model, ids, True) == generate(model, ids, False)
            with reading(model, sites[:2]) as seen:
                hooked = model(ids).logits
        for site in sites[:2]:
            e = plan[site]
            torch.testing.assert_close(
                seen[site] @ e.right.T, (e.right @ e.shift).expand(2, 6, 2), rtol=0, atol=1e-10
            )
        assert (plain - hooked).abs().max() > 1e-3
        assert torch.equal(model(ids).logits, plain)


# Strength


def test_strength() -> None:
    model, ids = tiny("llama"), token_ids()
    plan = plan_for(model)
    plain = model(ids).logits
    with apply(model, plan, strength=0.0):
        assert torch.equal(model(ids).logits, plain)
    one = plan.replace({plan.sites[-1]: plan[plan.sites[-1]]})  # the head reads it linearly
    with apply(model, one):
        full = model(ids).logits
    with apply(model, one, strength=0.5):
        half = model(ids).logits
    torch.testing.assert_close(half, (plain + full) / 2)
    with apply(model, one, strength=-1):
        torch.testing.assert_close(model(ids).logits, 2 * plain - full)
    assert (plain - full).abs().max() > 1e-2
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"got strength={wrong}; needed a finite number"):
            apply(model, plan, strength=wrong)
    assert hook_count(model) == 0


def test_erasers_of_rank_zero_cost_nothing() -> None:
    model = tiny("llama")
    nothing = Eraser(torch.zeros(D, 0), torch.zeros(0, D), torch.zeros(D))
    a, b = Architecture.of(model).sites("attn_in", layers=[0, 1])
    with apply(model, ErasurePlan({a: nothing, b: oblique()}, fingerprint(model))) as handle:
        assert handle.sites == (b,)
        assert hook_count(model) == 1
        assert repr(handle) == "Applied(1 sites)"


# Coming and going


def test_handle() -> None:
    model, ids = tiny("gpt2"), token_ids()
    plan, before = plan_for(model), snapshot(model)
    plain = model(ids).logits
    handle = apply(model, plan)
    assert isinstance(handle, Applied)
    assert hook_count(model) == len(plan)
    assert not torch.equal(model(ids).logits, plain)
    handle.remove()
    handle.remove()
    assert hook_count(model) == 0
    with handle:  # a spent handle does not come back
        assert torch.equal(model(ids).logits, plain)
    assert_same(before, model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_inside_leave_no_hook(error: type[BaseException]) -> None:
    model = tiny("llama")
    with pytest.raises(error), apply(model, plan_for(model)):
        raise error
    assert hook_count(model) == 0


def test_an_error_in_the_forward_leaves_no_hook() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError), apply(model, plan_for(model)):
        model(torch.tensor([[VOCAB + 5]]))
    assert hook_count(model) == 0


def test_two_plans_on_two_copies() -> None:
    model, ids = tiny("llama"), token_ids()
    other = copy.deepcopy(model)
    sites = Architecture.of(model).sites("attn_in")
    one = random_plan(model, sites)
    two = one.replace({site: oblique(seed=50 + i) for i, site in enumerate(sites)})
    plain = model(ids).logits
    with apply(model, one):
        alone_one = model(ids).logits
    with apply(model, two):
        alone_two = model(ids).logits
    with apply(model, one), apply(other, two):
        assert torch.equal(model(ids).logits, alone_one)
        assert torch.equal(other(ids).logits, alone_two)
    assert torch.equal(other(ids).logits, plain)
    assert (alone_one - alone_two).abs().max() > 1e-3


def test_plans_stack_in_the_order_of_application() -> None:
    model = tiny("llama")
    site = Site("model.norm")
    a, b = (ErasurePlan({site: oblique(seed=s)}, fingerprint(model)) for s in (1, 2))
    with reading(model, [site]) as seen:
        model(token_ids())
    x = seen[site]
    with apply(model, a), apply(model, b), reading(model, [site]) as seen:
        model(token_ids())
    torch.testing.assert_close(seen[site], b[site](a[site](x)))
    assert (seen[site] - a[site](b[site](x))).abs().max() > 1e-3  # control


# Refusals


def test_another_model_is_refused() -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    with pytest.raises(
        ModelMismatchError, match=rf"fingerprint {fingerprint(model)}; this one has {fingerprint(other)}"
    ):
        apply(other, plan_for(model))
    assert hook_count(other) == 0
    model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(2)
    with pytest.raises(ModelMismatchError, match="fit a new plan"):
        apply(model, plan_for(tiny("llama")))


def test_unknown_sites_are_refused() -> None:
    model = tiny("llama")
    plan = ErasurePlan({Site("model.norm"): oblique(), Site("model.nrom"): oblique()}, fingerprint(model))
    with pytest.raises(UnknownSiteError, match=r"nearest: model\.norm"):
        apply(model, plan)
    assert hook_count(model) == 0


def test_wrong_width_is_an_error_of_ours() -> None:
    model = tiny("llama")
    plan = ErasurePlan({Site("model.norm"): oblique(d=16)}, fingerprint(model))
    with pytest.raises(ShapeError, match="width 32; the eraser at this site needs 16"), apply(model, plan):
        model(token_ids())
    assert hook_count(model) == 0


def test_compiled_models_are_refused() -> None:
    model = tiny("llama")
    plan = plan_for(model)
    with pytest.raises(UnsupportedModelError, match="Apply the plan first and compile afterwards"):
        apply(torch.compile(copy.deepcopy(model), backend="eager"), plan)  # type: ignore[arg-type]
    part = copy.deepcopy(model)
    part.get_submodule("model.layers.1").compile(backend="eager")
    with pytest.raises(UnsupportedModelError):
        apply(part, plan)
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError):
        apply(model, plan)
    assert hook_count(part) == hook_count(model) == 0


def test_gradients_flow_through_hooks_after_inference() -> None:
    model = tiny("llama").requires_grad_(True)
    with apply(model, plan_for(model)):
        with torch.inference_mode():
            model(token_ids())
        with torch.enable_grad():
            model(token_ids()).logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_text_goes_through_generate() -> None:
    """A batch of texts padded on the left, as users do it."""
    from textkit import text_model

    model, tokenizer = text_model("llama", dtype=torch.float32), text_tokenizer("left")
    inputs = tokenizer(["he ran", "if she ran"], padding=True, return_tensors="pt")
    with apply(model, plan_for(model)):
        both = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        alone = model.generate(
            **tokenizer(["he ran"], return_tensors="pt"), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
    assert both[0, -8:].tolist() == alone[0, -8:].tolist()
