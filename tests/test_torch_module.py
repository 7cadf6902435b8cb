"""The module without hooks computes what hooks compute, at every site of every family, and can be exported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from rowkit import CASES
from tiny import (
    assert_same,
    hook_count,
    oblique,
    random_plan,
    reading,
    snapshot,
    tiny,
    tiny_inputs,
    token_ids,
)
from torch import nn

from repe_unlearn import ErasurePlan, Site, apply, fingerprint
from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import ModelMismatchError, ShapeError, UnknownSiteError, UnsupportedModelError
from repe_unlearn.export.torch_module import Erase, torch_module


def logits(model: nn.Module, **inputs: object) -> torch.Tensor:
    return next(iter(model(**inputs).values()))


def everywhere(arch: Architecture) -> list[Site]:
    """Every site of every kind, the residual stream and inputs of blocks included."""
    return list(dict.fromkeys(arch.sites(*arch.kinds)))


@pytest.mark.parametrize("name", CASES)
def test_it_equals_hooks_at_every_site(name: str) -> None:
    model = CASES[name].model()
    sites = everywhere(CASES[name].arch(model))
    # What one eraser adds the next one takes away only in part: keep them small, so that rounding stays rounding.
    plan = random_plan(model, sites, rank=1)
    plan = plan.replace({site: eraser.partial(0.1) for site, eraser in plan.erasers.items()})
    inputs = tiny_inputs(CASES[name].model_type)
    untouched, before = logits(model, **inputs), snapshot(model)
    erased = torch_module(model, plan)
    with apply(model, plan):
        hooked = logits(model, **inputs)
    torch.testing.assert_close(logits(erased, **inputs), hooked, rtol=0, atol=1e-10)
    assert (hooked - untouched).abs().max() > 1e-3  # else nothing was tested
    assert_same(before, model)
    assert torch.equal(logits(model, **inputs), untouched)
    assert hook_count(erased) == 0


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_is_read_is_constant_there(side: str) -> None:
    model = tiny("llama")
    site = Site("model.layers.1.self_attn", side)  # type: ignore[arg-type]
    eraser = oblique()
    erased = torch_module(model, ErasurePlan({site: eraser}, fingerprint(model)))
    inner = Site("model.layers.1.self_attn.q_proj", "input") if side == "input" else site
    with reading(erased, [inner]) as seen:
        erased(token_ids())
    read = seen[inner] @ eraser.right.T
    torch.testing.assert_close(read, (eraser.right @ eraser.shift).expand_as(read))
    with reading(model, [inner]) as seen:
        model(token_ids())
    assert ((seen[inner] @ eraser.right.T) - read).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_autocast_equal_hooks(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "resid_post"), rank=1)
    erased = torch_module(model, plan)
    assert {b.dtype for n, b in erased.named_buffers() if "erase_" in n} == {torch.float32}
    ids = token_ids()
    with apply(model, plan):
        hooked = logits(model, input_ids=ids)
        with torch.autocast("cpu", torch.bfloat16):
            hooked_autocast = logits(model, input_ids=ids)
    step = torch.finfo(dtype).eps * hooked.abs().max().item()
    torch.testing.assert_close(logits(erased, input_ids=ids), hooked, rtol=0, atol=8 * step)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(erased, input_ids=ids), hooked_autocast, rtol=0.1, atol=0.1)


def test_generation_with_a_cache_equals_hooks() -> None:
    model = tiny("gpt2")
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "mlp_out", "resid_pre"), rank=1)
    erased = torch_module(model, plan)
    options = {"max_new_tokens": 8, "do_sample": False}
    with apply(model, plan):
        hooked = model.generate(token_ids(), **options)  # type: ignore[operator]
    assert torch.equal(erased.generate(token_ids(), **options), hooked)  # type: ignore[operator]
    assert not torch.equal(model.generate(token_ids(), **options), hooked)  # type: ignore[operator]


# The module as an object


def test_state_holds_the_erasers_and_names_stay() -> None:
    model = tiny("llama")
    site, other = Site("model.layers.0.input_layernorm"), Site("model.layers.1", "input")
    plan = ErasurePlan({site: oblique(), other: oblique(seed=1)}, fingerprint(model))
    erased = torch_module(model, plan)
    state, old = erased.state_dict(), model.state_dict()
    assert [name for name in state if name in old] == list(old)
    assert set(state) - set(old) == {
        f"model.layers.{where}.0.{part}"
        for where in ("0.input_layernorm.erase_output", "1.erase_input")
        for part in ("left", "right", "shift")
    }
    kept = erased.get_submodule("model.layers.0.input_layernorm.erase_output.0")
    assert isinstance(kept, Erase)
    assert Eraser(kept.left, kept.right, kept.shift).allclose(plan[site])
    assert repr(kept) == "Erase(d=32, rank=2)"
    assert type(erased) is type(model)
    assert isinstance(erased.get_submodule("model.layers.1"), type(model.get_submodule("model.layers.1")))

    other_plan = plan.replace({site: oblique(seed=5), other: oblique(seed=6)})
    blank = torch_module(model, other_plan)
    ids = token_ids()
    assert not torch.equal(logits(blank, input_ids=ids), logits(erased, input_ids=ids))
    blank.load_state_dict(state)
    assert torch.equal(logits(blank, input_ids=ids), logits(erased, input_ids=ids))


def test_copies_and_pickles_compute_the_same_and_stand_alone() -> None:
    model = tiny("gpt2", tie_word_embeddings=True)
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "resid_post"))
    erased = torch_module(model, plan)
    assert erased.get_parameter("transformer.wte.weight") is erased.get_parameter(
        "lm_head.weight"
    )  # still tied
    ids = token_ids()
    expected = logits(erased, input_ids=ids)
    for twin in (copy.deepcopy(erased), pickle.loads(pickle.dumps(erased))):
        assert torch.equal(logits(twin, input_ids=ids), expected)
        twin.get_submodule("transformer.h.0.ln_1.erase_output.0").left.zero_()  # type: ignore[union-attr]
        assert not torch.equal(logits(twin, input_ids=ids), expected)
    assert torch.equal(logits(erased, input_ids=ids), expected)


def test_weights_share_memory_but_a_cast_does_not_reach_the_model() -> None:
    model = tiny("llama")
    erased = torch_module(model, random_plan(model, Architecture.of(model).sites("attn_in")))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), model.named_parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
    before = snapshot(model)
    erased.to(torch.float32)
    assert_same(before, model)


def test_two_paths_to_one_module_act_in_the_order_of_the_plan() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = Twice().double()
    a, b = oblique(1, d=6), oblique(1, d=6, seed=1)
    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for erasers in ({Site("first"): a, Site("second"): b}, {Site("second"): b, Site("first"): a}):
        plan = ErasurePlan(erasers, fingerprint(model))
        with apply(model, plan):
            hooked = model(x)
        found.append(torch_module(model, plan)(x))
        torch.testing.assert_close(found[-1], hooked)
    assert not torch.allclose(*found)


def test_an_eraser_of_rank_0_leaves_no_trace() -> None:
    model = tiny("llama")
    nothing = Eraser(*(torch.zeros(s, dtype=torch.float64) for s in ((32, 0), (0, 32), (32,))))
    erased = torch_module(model, ErasurePlan({Site("model.norm"): nothing}, fingerprint(model)))
    assert erased.state_dict().keys() == model.state_dict().keys()


# torch.export


@pytest.mark.parametrize(
    ("name", "strict"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", False)]
)
def test_torch_export_has_only_aten_operators_and_survives_a_file(
    name: str, strict: bool, tmp_path: Path
) -> None:
    model = tiny(name, dtype=torch.float32)
    arch = Architecture.of(model)
    sites = [*arch.sites("attn_in", "mlp_out", "resid_post", layers=[0, 1]), Site(arch.block(1), "input")]
    plan = random_plan(model, sites, rank=1)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        torch_module(model, plan),
        (),
        {"input_ids": token_ids(), "use_cache": False},
        dynamic_shapes={"input_ids": {0: auto, 1: auto}, "use_cache": None},
        strict=strict,
    )
    assert sum(".erase_" in key for key in program.state_dict) == 3 * len(sites)
    program = program.run_decompositions()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    # Asserts and size arithmetic of the dynamic shapes are no operators of the model.
    foreign = {
        str(n.target) for n in calls if not str(n.target).startswith(("aten.", "<built-in", "<function sym"))
    }
    assert foreign == set()
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    ids = token_ids(3, 6, seed=1)
    with apply(model, plan):
        hooked = model(ids).logits
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, hooked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, hooked, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
def test_onnx_runtime_computes_what_hooks_compute(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny(name, dtype=torch.float32)
    arch = Architecture.of(model)
    sites = [*arch.sites("attn_in", "mlp_out", "resid_post", layers=[0, 1]), Site(arch.block(1), "input")]
    plan = random_plan(model, sites, rank=1)
    kwargs = {"input_ids": token_ids(), **({} if name == "bert" else {"use_cache": False})}
    auto = torch.export.Dim.AUTO
    torch.onnx.export(
        torch_module(model, plan),
        (),
        str(tmp_path / "model.onnx"),
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes={key: {0: auto, 1: auto} if key == "input_ids" else None for key in kwargs},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    ids = token_ids(3, 6, seed=1)
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    with apply(model, plan):
        hooked = logits(model, input_ids=ids)
    torch.testing.assert_close(torch.tensor(found), hooked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, input_ids=ids), hooked, atol=1e-2)


# What cannot be expressed


def test_what_cannot_be_expressed_is_refused() -> None:
    model = tiny("llama")
    plan = random_plan(model, Architecture.of(model).sites("attn_in"))
    with apply(model, plan), pytest.raises(UnsupportedModelError, match="remove it first"):
        torch_module(model, plan)
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        torch_module(tiny("llama", seed=1), plan)

    def at(path: str) -> ErasurePlan:
        return ErasurePlan({Site(path): oblique()}, fingerprint(model))

    with pytest.raises(UnknownSiteError, match="no module of that name"):
        torch_module(model, at("model.layers.9"))
    with pytest.raises(UnsupportedModelError, match="ModuleList only holds other modules"):
        torch_module(model, at("model.layers"))
    with pytest.raises(UnsupportedModelError, match="begins with one"):
        torch_module(model, at("model"))(token_ids())
    with pytest.raises(ShapeError, match="width 48; the eraser here needs 32"):
        torch_module(model, at("model.layers.0.mlp.up_proj"))(token_ids())
    model.get_submodule("model.layers.0").compile()
    with pytest.raises(UnsupportedModelError, match="compiled"):
        torch_module(model, plan)


def test_hooks_of_accelerate_are_refused_and_those_of_transformers_stay() -> None:
    model = tiny("llama")
    plan = random_plan(model, Architecture.of(model).sites("attn_in"), rank=1)
    model(token_ids(), output_hidden_states=True)  # transformers puts hooks of its own there for this
    erased = torch_module(model, plan)
    assert len(erased(token_ids(), output_hidden_states=True).hidden_states) == 4
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model)
    with pytest.raises(UnsupportedModelError, match="accelerate; load the model without device_map"):
        torch_module(model, plan)


def test_a_fast_path_that_would_skip_the_eraser_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)).eval().requires_grad_(False)
    eraser, x = oblique(1, d=6).to(dtype=torch.float32), torch.randn(2, 3, 6)
    inside, whole = (ErasurePlan({Site(path): eraser}, fingerprint(model)) for path in ("0.norm1", "0"))
    with pytest.raises(UnsupportedModelError, match=r"0 \(TransformerEncoderLayer\) has a fast path"):
        torch_module(model, inside)
    with apply(model, whole):
        hooked = model(x)
    torch.testing.assert_close(torch_module(model, whole)(x), hooked)
