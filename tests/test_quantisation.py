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
from repe_unlearn.errors import InputError, ModelMismatchError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.quantisation import margin

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
