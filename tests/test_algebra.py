"""Arithmetic of patches, and the report on what a cast leaves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import assert_same, random_plan, snapshot, tiny
from torch import Tensor, nn

from repe_unlearn.algebra import compose, report, scale
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, ModelMismatchError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan


def plan_at(model: nn.Module, *kinds: str, affine: bool = True, rank: int = 2) -> ErasurePlan:
    return random_plan(model, Architecture.of(model).sites(*kinds), affine=affine, rank=rank)  # type: ignore[arg-type]


def bits(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
    patch.apply_(model)
    found = {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    patch.revert_(model)
    return found


@pytest.fixture
def llama() -> nn.Module:
    return tiny("llama", num_hidden_layers=2)


# compose


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_composed_equals_one_after_the_other(model_type: str) -> None:
    model = tiny(model_type)
    before = snapshot(model)
    linear = plan_at(model, "final", affine=False)  # the head has no bias
    first = bake(
        model, ErasurePlan({**plan_at(model, "attn_in").erasers, **linear.erasers}, linear.fingerprint)
    )
    first.apply_(model)
    second = bake(model, plan_at(model, "attn_in", "attn_out"))
    second_bits = {name: e.apply(model.get_parameter(name).data) for name, e in second.edits.items()}
    first.revert_(model)

    both = compose(first, second, model=model)
    assert both.fingerprint == first.fingerprint
    assert both.tied == first.tied
    assert_same(before, model)
    after = bits(model, both)
    for name, expected in second_bits.items():
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-13)
    assert_same(before, model)


def test_ranks_add_and_stay_low(llama: nn.Module) -> None:
    first = bake(llama, plan_at(llama, "attn_in"))
    first.apply_(llama)
    second = bake(llama, plan_at(llama, "attn_in", rank=3))
    first.revert_(llama)
    both = compose(first, second)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert both.edits[name].rank == 5
    assert both.edits[name].rule.count("; then ") == 1
    assert both.new_biases == first.new_biases
    assert len(both.new_biases) == len([n for n in both.edits if n.endswith("bias")])
    assert len(both) == len(first)


def test_a_sum_of_full_rank_is_dense() -> None:
    a = Patch({"w": Edit(torch.ones(4, 2), torch.ones(2, 4), "a")}, "0" * 16)
    both = compose(a, replace(a, fingerprint="1" * 16))
    assert both.edits["w"].rank is None
    assert torch.equal(both.edits["w"].delta(), 2 * a.edits["w"].delta())


def test_the_second_patch_must_fit_behind_the_first(llama: nn.Module) -> None:
    first = bake(llama, plan_at(llama, "attn_in"))
    with pytest.raises(ModelMismatchError, match="both patches were made for the model"):
        compose(first, first)
    stray = replace(bake(llama, plan_at(llama, "mlp_in", affine=False)), fingerprint="f" * 16)
    with pytest.raises(ModelMismatchError, match="the second was made for ffff"):
        compose(first, stray, model=llama)
    compose(first, stray)  # nothing to check it against
    assert fingerprint(llama) == first.fingerprint


def test_two_patches_of_one_model_that_share_nothing(llama: nn.Module) -> None:
    reads = bake(llama, plan_at(llama, "attn_in"))
    writes = bake(llama, plan_at(llama, "mlp_out"))
    both = compose(reads, writes, model=llama)
    assert set(both.edits) == {*reads.edits, *writes.edits}
    assert both.config_updates == {**reads.config_updates, **writes.config_updates}
    # o_proj gets its bias with q, k, v; it stays zero unless it is edited.
    assert not set(both.zero_biases) & set(both.edits)
    assert set(both.zero_biases) | set(both.new_biases) == {
        *reads.zero_biases,
        *reads.new_biases,
        *writes.zero_biases,
        *writes.new_biases,
    }
    swapped = compose(writes, reads)
    a, b = bits(llama, both), bits(llama, swapped)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_untying_after_an_edit_of_the_one_tensor() -> None:
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    first = Patch({embed: Edit(torch.ones(5, 1), torch.ones(1, 3), "both")}, "0" * 16)
    second = Patch({head: Edit(torch.ones(5, 1), torch.ones(1, 3), "head")}, "1" * 16, tied=(embed, head))
    both = compose(first, second)
    assert both.tied == (embed, head)
    assert torch.equal(both.edits[embed].delta(), torch.ones(5, 3).double())
    assert torch.equal(both.edits[head].delta(), 2 * torch.ones(5, 3).double())


def test_the_weaker_class_wins() -> None:
    edit = Edit(torch.ones(2), None, "x")
    a = Patch(
        {"a": edit}, "0" * 16, exactness={"s": "exact", "t": "erasure-exact"}, provenance={"solver": "leace"}
    )
    b = Patch(
        {"b": edit}, "0" * 16, exactness={"s": "erasure-exact", "t": "exact"}, provenance={"solver": "sal"}
    )
    assert dict(compose(a, b).exactness) == {"s": "erasure-exact", "t": "erasure-exact"}
    assert compose(a, b).provenance["solver"] == "leace; then sal"
    assert compose(a, replace(b, provenance={"solver": "leace"})).provenance["solver"] == "leace"


# scale


def test_scaled_equals_the_bake_of_partial_erasers(llama: nn.Module) -> None:
    plan = plan_at(llama, "attn_in", "attn_out", "mlp_out")
    half = ErasurePlan({site: e.partial(0.3) for site, e in plan.erasers.items()}, plan.fingerprint)
    expected, found = bits(llama, bake(llama, half)), bits(llama, scale(bake(llama, plan), 0.3))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14)
    other = bits(llama, scale(bake(llama, plan), 0.4))
    assert any(not torch.allclose(other[name], expected[name], atol=1e-3) for name in expected)


def test_scale_keeps_the_books(llama: nn.Module) -> None:
    patch = bake(llama, plan_at(llama, "attn_in"))
    assert scale(patch, 1) is patch
    nothing = bits(llama, scale(patch, 0.0))
    for name, value in llama.named_parameters():
        assert torch.equal(nothing[name], value), name
    half = scale(patch, 0.5)
    assert half.exactness == patch.exactness
    assert half.provenance["scaled"] == "0.5"
    assert half.edits["model.layers.0.self_attn.q_proj.weight"].rule.startswith("0.5 x (reader")
    weak = replace(patch, exactness={"a": "exact", "b": "erasure-exact"})
    assert dict(scale(weak, 0.5).exactness) == {"a": "exact", "b": "approximate"}
    composed = compose(weak, Patch({"x": Edit(torch.ones(1), None, "x")}, weak.fingerprint))
    assert set(scale(composed, 0.5).exactness.values()) == {"approximate"}
    with pytest.raises(InputError, match="got alpha=nan"):
        scale(patch, math.nan)


# report


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("llama", ("attn_in", "attn_out")),
        ("gpt2", ("attn_in", "mlp_out", "final")),
        ("gemma2", ("attn_out", "mlp_out")),
        ("mixtral", ("mlp_in", "mlp_out")),
        ("gpt_oss", ("mlp_in", "mlp_out")),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_leftover_after_the_cast(
    model_type: str, kinds: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    model = tiny(model_type, dtype=dtype)
    plan = plan_at(model, *kinds, affine="final" not in kinds and model_type not in ("mixtral", "gpt_oss"))
    patch = bake(model, plan, allow="erasure-exact")
    rows = {row.name: row for row in report(patch, model, plan)}
    weights = [name for name, edit in patch.edits.items() if edit.rank is not None]
    assert set(rows) == set(patch.edits)
    for name in weights:
        assert 0 < rows[name].leftover <= bound, (name, rows[name].leftover)
        assert rows[name].rank == 2
        assert 0 < rows[name].relative < 2
        assert rows[name].dtype == str(dtype).removeprefix("torch.")
        assert 0 < rows[name].rounding < 2 * torch.finfo(dtype).eps * 30
    assert all(math.isnan(row.leftover) for row in rows.values() if row.name not in weights)
    # Controls: half of the edit leaves half; another plan's erasers find their part untouched.
    half = {row.name: row for row in report(scale(patch, 0.5), model, plan)}
    assert all(abs(half[name].leftover - 0.5) < 0.02 for name in weights)
    other = ErasurePlan(
        dict(zip(plan.sites, reversed(list(plan.erasers.values())), strict=True)), plan.fingerprint
    )
    wrong = {row.name: row for row in report(patch, model, other)}
    assert max(wrong[name].leftover for name in weights) > 0.1


def test_report_in_another_dtype_and_without_a_plan(llama: nn.Module) -> None:
    plan = plan_at(llama, "attn_in")
    patch = bake(llama, plan)
    fine = report(patch, llama, plan)
    coarse = report(patch, llama, plan, dtype=torch.bfloat16)
    assert {row.dtype for row in fine} == {"float64"}
    assert {row.dtype for row in coarse} == {"bfloat16"}
    assert max(row.leftover for row in fine if row.leftover == row.leftover) < 1e-13
    assert all(math.isnan(row.leftover) for row in report(patch, llama))
    new = next(row for row in fine if row.name in patch.new_biases)
    assert math.isnan(new.relative)
    patch.apply_(llama)
    with pytest.raises(ModelMismatchError, match="revert_ the patch"):
        report(patch, llama)
    patch.revert_(llama)
