"""How much of an edit survives 8- and 4-bit rounding."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import oblique, tiny
from torch import nn

from repe_unlearn.algebra import scale
from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, ModelMismatchError, ShapeError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.quantisation import margin, quantisation_safe

WIDTH = 128


def model_of(model_type: str = "llama") -> nn.Module:
    if model_type == "gpt2":
        return tiny(model_type, dtype=torch.float32, n_embd=WIDTH)
    return tiny(model_type, dtype=torch.float32, hidden_size=WIDTH)


def plan_at(model: nn.Module, *kinds: str) -> ErasurePlan:
    sites = Architecture.of(model).sites(*kinds)  # type: ignore[arg-type]
    direction = oblique(1, d=WIDTH).left
    direction /= direction.norm()
    return ErasurePlan(
        {site: Eraser(direction, direction.T, torch.zeros(WIDTH).double()) for site in sites},
        fingerprint(model),
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_requantising_undoes_what_fresh_quantising_keeps(model_type: str) -> None:
    model = model_of(model_type)
    plan = plan_at(model, "attn_out", "mlp_in")
    patch = bake(model, plan)
    coarse = margin(patch, model, plan, bits=4)
    fine = margin(patch, model, plan, bits=8)
    assert [row.name for row in coarse] == [name for name in patch.edits if name.endswith("weight")]
    for four, eight in zip(coarse, fine, strict=True):
        assert four.requantised > 0.35
        assert four.undone > 0.2
        assert four.fresh < 0.35
        assert four.fresh < 0.5 * four.requantised
        assert eight.fresh < 0.1 * four.fresh + 0.05
        assert eight.requantised < four.requantised
        assert eight.undone < 0.2
        assert eight.below <= four.below
        assert 0 < four.rows <= max(model.get_parameter(four.name).shape)
    without = margin(patch, model, bits=4)
    assert all(math.isnan(row.fresh) and math.isnan(row.requantised) for row in without)
    assert [row.below for row in without] == [row.below for row in coarse]


def test_half_a_step_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():  # steps of 1, 1 and (the third row) 2 with four bits
        model.get_parameter("0.weight").copy_(torch.tensor([[7.0, 1, 2, 3], [7, 0, 0, 0], [14, 1, 1, 1]]))
    delta = torch.zeros(3, 4)
    delta[0, 1], delta[2, 1] = 0.6, 0.6
    rows = margin(Patch({"0.weight": Edit(delta, None, "by hand")}, fingerprint(model)), model, bits=4)
    assert rows[0].rows == 2
    assert rows[0].below == 0.5  # 0.6 of a step in the first row, 0.3 in the third
    # Groups of one: every element is its own step, so nothing moves by half of one but what was zero.
    alone = margin(
        Patch({"0.weight": Edit(delta, None, "by hand")}, fingerprint(model)), model, bits=4, group=1
    )
    assert alone[0].below == 0.0


def test_a_smaller_edit_survives_less() -> None:
    model = model_of()
    plan = plan_at(model, "attn_out")
    patch = bake(model, plan)
    whole, tenth = (margin(p, model, bits=8) for p in (patch, scale(patch, 0.05)))
    for full, small in zip(whole, tenth, strict=True):
        assert small.below > full.below
        assert small.undone > full.undone


def test_refusals() -> None:
    model = model_of()
    patch = bake(model, plan_at(model, "attn_out"))
    with pytest.raises(InputError, match="got bits=3"):
        margin(patch, model, bits=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="group=0"):
        margin(patch, model, group=0)
    patch.apply_(model)
    with pytest.raises(ModelMismatchError, match="revert_ the patch"):
        margin(patch, model)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 7), (8, 128)])
@pytest.mark.parametrize("low_rank", [True, False])
def test_a_safe_edit_moves_half_of_its_elements_by_half_a_step(bits: int, group: int, low_rank: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 40, generator=g)
    left, right = torch.randn(12, 1, generator=g) * 1e-3, torch.randn(1, 40, generator=g)
    left[3:5] = 0
    edit = Edit(left, right, "x") if low_rank else Edit(left @ right, None, "x")
    safe, factor = quantisation_safe(edit, weight, bits=bits, group=group)  # type: ignore[arg-type]
    assert factor > 1
    assert safe.rank == edit.rank
    torch.testing.assert_close(safe.delta(), edit.delta() * factor)
    # By hand, group by group.
    moved = []
    for row in (*range(3), *range(5, 12)):
        for start in range(0, 40, group):
            part = slice(start, start + group)
            step = weight[row, part].double().abs().max() / (2 ** (bits - 1) - 1)
            moved += (safe.delta()[row, part].abs() / step).tolist()
    moved.sort()
    assert moved[(len(moved) - 1) // 2] == pytest.approx(0.5)
    assert f"x{factor:.3g} for {bits} bits" in safe.rule
    # It is the least factor, and a second pass has nothing to do.
    assert quantisation_safe(safe, weight, bits=bits, group=group)[1] == pytest.approx(1.0)  # type: ignore[arg-type]
    large = Edit(1e4 * edit.left, edit.right, "x")
    assert quantisation_safe(large, weight, bits=bits, group=group) == (large, 1.0)  # type: ignore[arg-type]


def test_a_safe_edit_survives_where_the_plain_one_does_not() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    weight = model.get_parameter("0.weight").detach()
    plain = Edit(1e-3 * torch.randn(32, 1), torch.randn(1, 64), "x")
    safe, _ = quantisation_safe(plain, weight)
    survives = [
        margin(Patch({"0.weight": edit}, fingerprint(model)), model, bits=4, group=32)[0]
        for edit in (plain, safe)
    ]
    assert survives[0].below > 0.9
    assert survives[1].below < 0.2
    assert survives[0].undone > 2 * survives[1].undone


def test_edits_that_cannot_be_made_safe_are_refused() -> None:
    weight = torch.ones(4, 8)
    one = torch.zeros(4, 8)
    one[0, 0] = 1e-4
    for edit, settings, error, message in (
        (Edit(0 * weight, None, "x"), {}, InputError, "edit of zeros"),
        (Edit(one, None, "x"), {}, InputError, "more than half of the elements"),
        (Edit(weight[:2], None, "x"), {}, ShapeError, r"shape \(2, 8\) and a weight \(4, 8\)"),
        (Edit(weight, None, "x"), {"bits": 3}, InputError, "needed 4 or 8 bits"),
        (Edit(weight, None, "x"), {"group": 0}, InputError, "a group of at least 1"),
    ):
        with pytest.raises(error, match=message):
            quantisation_safe(edit, weight, **settings)
