"""Perturbation: the changes are what they say, the model comes back, and nothing appears that was not there."""

from __future__ import annotations

import pytest
import torch
from attackkit import ASKED, CHANCE
from knowkit import PLANTED, TOK, TOLD, gold, original, share_left
from textkit import text_model
from tiny import assert_same, snapshot
from torch import Tensor

from repe_unlearn.audit import perturbation as module
from repe_unlearn.audit.perturbation import CHANGES, integers, noisy, perturbation, pruned
from repe_unlearn.errors import InputError, NonFiniteError, UnsupportedModelError
from repe_unlearn.facts import Facts


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_integers_by_hand(bits: int, axis: int):
    w = rand(5, 7) if axis == -1 else rand(7, 5)
    rows = w if axis == -1 else w.T
    wanted = torch.empty_like(rows)
    for i, row in enumerate(rows):
        for start in (0, 3, 6):  # groups of 3, 3 and 1
            group = row[start : start + 3]
            step = max(abs(float(x)) for x in group) / (7 if bits == 4 else 127)
            wanted[i, start : start + 3] = torch.tensor([step * round(float(x) / step) for x in group])
    found = integers(bits, 3)(w, axis, generator())
    assert torch.allclose(found, wanted if axis == -1 else wanted.T, atol=1e-12)
    assert torch.allclose(integers(bits, 3)(found, axis, generator()), found)  # once is enough
    assert not torch.allclose(found, w, atol=1e-4)


def test_a_change_below_half_a_step_is_undone():
    grid = integers(4, 8)(rand(4, 8), -1, generator())
    step = grid.abs().amax(-1, keepdim=True) / 7
    largest = grid.abs() == grid.abs().amax(-1, keepdim=True)
    small, large = (torch.where(largest, 0, share * step) for share in (0.4, 0.6))
    assert torch.allclose(integers(4, 8)(grid + small, -1, generator()), grid)
    assert not torch.allclose(integers(4, 8)(grid + large, -1, generator()), grid)


def test_pruning_takes_the_smallest():
    w = torch.tensor([[0.1, -5.0, 0.3], [2.0, -0.2, 0.0]])
    assert pruned(0.5)(w, -1, generator()).tolist() == [[0.0, -5.0, pytest.approx(0.3)], [2.0, 0.0, 0.0]]
    assert torch.equal(pruned(0.0)(w, -1, generator()), w)
    assert int((pruned(0.3)(rand(40, 50), -1, generator()) == 0).sum()) == 600
    equal = torch.ones(2, 5)
    assert int((pruned(0.5)(equal, -1, generator()) == 0).sum()) == 5  # ties are counted, not all or nothing


def test_noise_has_the_norm_asked_for():
    w = 3 * rand(200, 300)
    noise = noisy(0.1)(w, -1, generator()) - w
    assert float(noise.norm() / w.norm()) == pytest.approx(0.1, rel=0.02)
    assert abs(float((noise * w).sum() / (noise.norm() * w.norm()))) < 0.02
    assert torch.equal(noisy(0.0)(w, -1, generator()), w)


def test_every_linear_map_is_perturbed_and_comes_back(monkeypatch: pytest.MonkeyPatch):
    model = text_model(tie_word_embeddings=False)
    before = snapshot(model)
    seen: dict[str, bool] = {}

    def stop(now, *_args, **_options):
        seen.update({name: bool((p == 0).all()) for name, p in now.named_parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "answers", stop)
    with pytest.raises(KeyboardInterrupt):
        perturbation(model, TOK, TOLD, change=lambda w, _axis, _g: torch.zeros_like(w), progress=False)
    assert_same(before, model)
    zeroed = {name for name, zero in seen.items() if zero}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert zeroed == linear
    assert not zeroed & {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_transposed_weight_is_grouped_along_its_inputs():
    model = text_model("gpt2")
    axes: dict[tuple[int, ...], set[int]] = {}

    def look(weight: Tensor, axis: int, _g: torch.Generator) -> Tensor:
        axes.setdefault(tuple(weight.shape), set()).add(axis)
        return weight

    perturbation(model, TOK, TOLD, change=look, progress=False)
    assert axes[(48, 32)] == {-2}  # mlp.c_proj, stored [in, out]
    axes.clear()
    perturbation(text_model(), TOK, TOLD, change=look, progress=False)
    assert set().union(*axes.values()) == {-1}


def test_the_same_seed_gives_the_same_noise():
    model = text_model()
    one, two, other = (
        perturbation(model, TOK, TOLD, change="noise", seed=s, progress=False).values for s in (0, 0, 1)
    )
    assert one == two
    assert one != other


def test_bad_settings():
    model = text_model()
    with pytest.raises(InputError, match="int8, int4"):
        perturbation(model, TOK, TOLD, change="int2", progress=False)
    for bad in (lambda: pruned(1.0), lambda: noisy(-1.0), lambda: integers(3)(rand(2, 2), -1, generator())):
        with pytest.raises(InputError):
            bad()
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        perturbation(model, TOK, TOLD, change=lambda w, _a, _g: w / 0, progress=False)
    assert_same(before, model)
    quantised = text_model()
    layer = quantised.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError):
        perturbation(quantised, TOK, TOLD, progress=False)
    lonely = Facts.of([("Kim", "Rome"), ("Bob", "Oslo")], ["{subject} is in"], distractors=0)
    with pytest.raises(InputError, match="wrong options"):
        perturbation(model, TOK, lonely, progress=False)


@pytest.mark.parametrize("change", list(CHANGES))
def test_small_perturbations_tell_who_knows_from_who_never_knew(change: str):
    base, tokenizer = original()
    before = snapshot(base)
    whole = perturbation(base, tokenizer, PLANTED, change=change, **ASKED)
    assert_same(before, base)
    assert whole.of(PLANTED, "forget").mean() > 0.95
    never = perturbation(gold(), tokenizer, PLANTED, change=change, **ASKED)
    assert abs(never.of(PLANTED, "forget").mean() - CHANCE) < 0.05
    assert abs(share_left(never, whole)) < 0.06
    assert (whole.attack, whole.tier, whole.unit) == (f"perturb.{change}", "T2", "share")


def test_a_perturbation_that_is_too_strong_breaks_the_original():
    base, tokenizer = original()
    assert (
        perturbation(base, tokenizer, PLANTED, change=pruned(0.95), **ASKED).of(PLANTED, "forget").mean()
        < 0.5
    )
