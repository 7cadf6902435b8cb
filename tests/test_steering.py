"""Steering: additive and replacing moves as gated hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from textkit import pairs, text_model, text_tokenizer
from tiny import D, hook_count, reading
from torch import Tensor, nn

from repe_unlearn.activations import gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NonFiniteError,
    NotEnoughDataError,
    ShapeError,
)
from repe_unlearn.facts import Facts
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.gate import Gate
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site
from repe_unlearn.steering import Steer, SteeringPlan, fact_gate, steer_by_means, steer_to_random
from repe_unlearn.tensorfile import kind_of

TOKENIZER = text_tokenizer()
IDS = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FACTS = Facts.of(
    [("the cat", "sat"), ("a dog", "ran"), ("my hat", "fits", "retain"), ("four", "five", "retain")],
    ["We saw {subject}", "It was {subject}", "Then came {subject}"],
    ["Look at {subject}"],
)


def at(model: nn.Module, layer: int, kind: str = "resid_post") -> Site:
    return Architecture.of(model).sites(kind, layers=[layer])[0]  # type: ignore[arg-type]


def stream(model: nn.Module, site: Site) -> Tensor:
    """What comes out of a site, by a plain hook put on after those of a plan."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: object, out: object) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)  # type: ignore[arg-type]

    handle = model.get_submodule(site.path).register_forward_hook(see)
    model(IDS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("keep", [1.0, 0.0, 0.3])
def test_a_move_is_what_its_formula_says(keep: float) -> None:
    x = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steer = Steer(VECTOR, keep)
    assert torch.allclose(steer(x), keep * x + VECTOR, atol=1e-14)
    assert torch.allclose(steer.partial(0.4)(x), 0.6 * x + 0.4 * (keep * x + VECTOR), atol=1e-14)
    weight = torch.tensor([0.0, 1.0, 0.5] * 4)[:, None].double()
    expected = x.reshape(-1, D) + weight * ((keep - 1) * x.reshape(-1, D) + VECTOR)
    assert torch.allclose(steer(x, weight).reshape(-1, D), expected, atol=1e-14)
    half = x.half()
    assert steer(half).dtype == torch.float16


def test_hooks_move_the_stream_and_leave_nothing_behind() -> None:
    model = text_model()
    site = at(model, 1)
    plain, before = stream(model, site), model(IDS).logits
    plan = SteeringPlan({site: Steer(VECTOR)}, fingerprint(model))
    with apply(model, plan):
        assert torch.allclose(stream(model, site), plain + VECTOR, atol=1e-12)
        assert not torch.allclose(model(IDS).logits, before)
    with apply(model, plan, strength=0.25):
        assert torch.allclose(stream(model, site), plain + VECTOR / 4, atol=1e-12)
    with apply(model, replace(plan, steers={site: Steer(VECTOR, 0.0)})):
        assert torch.allclose(stream(model, site), VECTOR.expand_as(plain), atol=1e-12)
    assert torch.equal(model(IDS).logits, before)
    assert hook_count(model) == 0


def test_only_where_the_gate_fires() -> None:
    model = text_model()
    gate_site, site = at(model, 1, "resid_pre"), at(model, 1)
    plain, before = stream(model, site), model(IDS).logits
    with reading(model, [gate_site]) as seen:
        model(IDS)
    scores = seen[gate_site] @ VECTOR
    threshold = float(scores.flatten().sort().values[6:8].mean())  # between two of the 14
    fires = scores > threshold
    assert 0 < int(fires.sum()) < fires.numel()
    plan = SteeringPlan({site: Steer(VECTOR, 0.0)}, fingerprint(model), Gate(gate_site, VECTOR, threshold))
    with apply(model, plan):
        after = stream(model, site)
    assert torch.equal(after[~fires], plain[~fires])
    assert torch.allclose(after[fires], VECTOR.expand_as(after)[fires], atol=1e-12)
    shut = Gate(gate_site, VECTOR, float(scores.max()) + 1)
    with apply(model, replace(plan, gate=shut)):
        assert torch.equal(model(IDS).logits, before)  # bit for bit
    with apply(model, plan, gate=shut):  # the argument takes the place of the plan's own
        assert torch.equal(model(IDS).logits, before)
    with apply(model, replace(plan, gate=None)):
        assert torch.allclose(stream(model, site), VECTOR.expand_as(plain), atol=1e-12)


def test_erasure_plans_still_have_no_gate_of_their_own() -> None:
    model = text_model()
    site = at(model, 1)
    eye = torch.eye(D, dtype=torch.float64)
    plan = ErasurePlan({site: Eraser(eye[:, :1], eye[:1], torch.zeros(D).double())}, fingerprint(model))
    with apply(model, plan):
        assert float(stream(model, site)[..., 0].abs().max()) < 1e-12


def test_caa_is_the_difference_of_class_means() -> None:
    model, contrast = text_model(), pairs(24)
    site = at(model, 1)
    plan = steer_by_means(model, TOKENIZER, contrast, [1, 2], coefficient=2.0, progress=False)
    rows = gather(model, TOKENIZER, contrast, [site], progress=False)[site]
    labels = torch.tensor(contrast.labels)
    expected = rows.x[labels == 1].double().mean(0) - rows.x[labels == 0].double().mean(0)
    assert torch.allclose(plan.steers[site].vector, 2 * expected, rtol=1e-8, atol=1e-10)
    assert len(plan) == 2
    assert plan.steers[site].keep == 1
    back = steer_by_means(model, TOKENIZER, contrast, [1], coefficient=-2.0, progress=False)
    assert torch.allclose(back.steers[site].vector, -plan.steers[site].vector)
    assert list(plan.directions(model)) == [1, 2]
    assert torch.equal(plan.directions(model)[1], plan.steers[site].vector)
    with pytest.raises(InputError, match="needed two"):
        steer_by_means(model, TOKENIZER, three_classes(), [1], progress=False)


def three_classes():
    from repe_unlearn.contrast import Contrast

    return Contrast.from_classes({"a": ["one"], "b": ["two"], "c": ["three"]})


def test_rmu_steering_behind_a_gate_fitted_to_the_facts() -> None:
    model = text_model()
    gate = fact_gate(model, TOKENIZER, FACTS, 1, progress=False)
    plan = steer_to_random(model, TOKENIZER, FACTS, [1], gate, times=3.0, seed=4, progress=False)
    site = at(model, 1)
    asked = [q.prompt for q in FACTS.questions("seen")]
    from repe_unlearn.contrast import Contrast

    contrast = Contrast.from_classes({"k": asked[6:], "f": asked[:6]})
    rows = gather(model, TOKENIZER, contrast, [site], progress=False)[site]
    length = rows.x.double().square().sum(-1).mean().sqrt()
    assert torch.allclose(plan.steers[site].vector.norm(), 3 * length, rtol=1e-8)
    assert plan.steers[site].keep == 0
    other = steer_to_random(model, TOKENIZER, FACTS, [1], gate, times=3.0, seed=5, progress=False)
    cosine = torch.cosine_similarity(plan.steers[site].vector, other.steers[site].vector, dim=0)
    assert abs(float(cosine)) < 0.7
    decided = {}
    for role in ("forget", "retain"):
        prompts = [q.prompt for q in FACTS.questions("seen", roles=[role])]  # type: ignore[list-item]
        decided[role] = []
        for prompt in prompts:
            ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
            with reading(model, [gate.site]) as seen:
                model(ids)
            decided[role].append(bool(gate.fires(seen[gate.site][0, -1])))
    assert sum(decided["forget"]) / 6 - sum(decided["retain"]) / 6 > 0.5
    with pytest.raises(InputError, match="needed a number above 0"):
        steer_to_random(model, TOKENIZER, FACTS, [1], gate, times=0.0)
    with pytest.raises(NotEnoughDataError, match="0 to keep"):
        fact_gate(model, TOKENIZER, FACTS.only("forget"), 1)


def test_save_and_load(tmp_path: Path) -> None:
    model = text_model()
    gate = Gate(at(model, 0), VECTOR, 0.25, "sequence")
    steers = {at(model, 1): Steer(VECTOR, 0.0), at(model, 2): Steer(-VECTOR)}
    plan = SteeringPlan(steers, fingerprint(model), gate, {"why": "test"})
    file = plan.save(tmp_path / "plan.safetensors")
    again = SteeringPlan.load(file)
    assert list(again.steers) == list(plan.steers)
    for site, steer in plan.steers.items():
        assert torch.equal(again.steers[site].vector, steer.vector)
        assert again.steers[site].keep == steer.keep
    assert again.gate is not None
    assert (again.gate.site, again.gate.threshold, again.gate.per) == (gate.site, 0.25, "sequence")
    assert torch.equal(again.gate.weight, gate.weight)
    assert again.provenance == {"why": "test"}
    with apply(model, plan):
        expected = model(IDS).logits
    with apply(model, again):
        assert torch.equal(model(IDS).logits, expected)
    open_ = replace(plan, gate=None).save(tmp_path / "open.safetensors")
    assert SteeringPlan.load(open_).gate is None
    assert kind_of(file, among=("steering plan", "erasure plan")) == "steering plan"
    with pytest.raises(FileFormatError):
        ErasurePlan.load(file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FileFormatError):
        SteeringPlan.load(cut)


def test_what_is_refused() -> None:
    model = text_model()
    site, gate = at(model, 1), Gate(at(model, 0), VECTOR, 0.0)
    plan = SteeringPlan({site: Steer(VECTOR)}, fingerprint(model))
    with pytest.raises(ShapeError, match=r"needed a floating-point vector \[d\]"):
        Steer(torch.ones(2, 2))
    with pytest.raises(NonFiniteError):
        Steer(torch.tensor([float("nan")]))
    with pytest.raises(InputError, match="at least one"):
        SteeringPlan({}, "0" * 16)
    with pytest.raises(InputError, match="holds no erasers"):
        bake(model, plan)  # type: ignore[arg-type]
    for other in (replace(plan, gate=gate), replace(plan, steers={site: Steer(VECTOR, 0.5)})):
        with pytest.raises(InputError, match="can only add"):
            other.directions(model)
    with pytest.raises(InputError, match="not the output of a block"):
        SteeringPlan({at(model, 1, "mlp_out"): Steer(VECTOR)}, fingerprint(model)).directions(model)
    with pytest.raises(ModelMismatchError), apply(model, replace(plan, fingerprint="0" * 16)):
        pass
    narrow = SteeringPlan({site: Steer(torch.ones(3))}, fingerprint(model))
    with apply(model, narrow), pytest.raises(ShapeError, match="has 3"):
        model(IDS)
    assert hook_count(model) == 0
