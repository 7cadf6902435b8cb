"""Methods: each from the same material to a patch, with the model left alone; and the row that measures it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from unlearnkit import FACTS, NEUTRAL, original

from repe_unlearn.answers import answers
from repe_unlearn.audit.preservation import costs
from repe_unlearn.errors import FileFormatError, InputError, NotEnoughDataError
from repe_unlearn.facts import Facts
from repe_unlearn.facts_files import Corpus
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.hooks import apply
from repe_unlearn.measured import COLUMNS, GOALS, Measured, attempt, effort, measure, patched
from repe_unlearn.methods import METHODS, Request, method_named
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.steering import SteeringPlan, fact_gate, steer_to_random

# What unlearns the four-layer model of the tests; the defaults are for larger ones.
SOLVED: dict[str, Any] = {"layers": [1, 2, 3], "ridge": 0.1, "alpha": 1.0, "beta": 2.0, "texts": NEUTRAL}
WORKING: Mapping[str, dict[str, Any]] = {
    "closed_form": SOLVED,
    "closed_form_decoy": SOLVED,
    "closed_form_rmu": {**SOLVED, "layers": [2]},
    "rmu_adaptive": {"layer": 2, "steps": 60, "lr": 1e-2, "alpha": 10.0},
    "grad_diff": {"lr": 2e-3, "steps": 20},
    "npo": {"lr": 3e-3, "steps": 30},
    "simnpo": {"lr": 3e-3, "steps": 30, "gamma": 1.0},
    "influence": {"gain": 0.02},
}
# What any model goes through quickly.
QUICK: Mapping[str, dict[str, Any]] = {
    "closed_form_zero": SOLVED,
    "closed_form_redirect": SOLVED,
    "rmu": {"layer": 2, "steps": 2},
    "grad_ascent": {"steps": 2},
    "fisher_dampening": {"alpha": 1.0, "bound": 0.5},
    "selective_pruning": {"fraction": 0.05},
    "neuron_suppression": {"count": 20},
    "head_suppression": {"count": 2, "pairs": 8, "scale": 0.5},
    "random": {"relative": 0.02},
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def before() -> Measured:
    model, tokenizer = original()
    return measure(model, tokenizer, FACTS, texts=NEUTRAL, progress=False)


def test_every_method_is_tried_here() -> None:
    assert set(WORKING) | set(QUICK) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        method.settings(method.reference)  # what is documented is accepted


@pytest.mark.parametrize("name", WORKING)
def test_what_is_to_be_forgotten_is_and_more_survives(name: str, before: Measured) -> None:
    model, tokenizer = original()
    old = weights(model)
    patch, row = attempt(
        model, tokenizer, FACTS, METHODS[name], WORKING[name], texts=NEUTRAL, seed=3, progress=False
    )
    assert all(torch.equal(old[n], p) for n, p in model.named_parameters())
    assert patch.fingerprint == fingerprint(model)
    assert (patch.provenance["method"], patch.provenance["seed"]) == (name, "3")
    assert before.forget_unseen == 1.0
    assert row.forget_unseen <= 0.375  # 0.25 is chance
    assert row.margin < before.margin - 3
    assert row.kept(before) > row.forget_unseen + 0.3
    assert (row.method, row.seed) == (name, 3)
    assert row.settings == METHODS[name].settings(WORKING[name])
    assert row.seconds > 0


@pytest.mark.parametrize("name", QUICK)
def test_the_others_make_a_patch_of_this_model(name: str, before: Measured) -> None:
    model, tokenizer = original()
    old = weights(model)
    patch = METHODS[name].run(model, tokenizer, FACTS, progress=False, **QUICK[name])
    assert all(torch.equal(old[n], p) for n, p in model.named_parameters())
    assert patch.fingerprint == fingerprint(model)
    with patched(model, patch):
        assert any(not torch.equal(old[n], p) for n, p in model.named_parameters())
    row = measure(model, tokenizer, FACTS, patch, texts=NEUTRAL, progress=False)
    if name == "random":  # the control: of equal size and no aim
        assert row.forget_unseen == before.forget_unseen


def test_the_same_seed_gives_the_same_patch() -> None:
    model, tokenizer = original()
    how = {"progress": False, "steps": 2}
    a, b, c = (METHODS["npo"].run(model, tokenizer, FACTS, seed=seed, **how) for seed in (0, 0, 1))
    same = [torch.equal(a.edits[n].delta(), b.edits[n].delta()) for n in a.edits]
    other = [torch.equal(a.edits[n].delta(), c.edits[n].delta()) for n in a.edits]
    assert all(same)
    assert not any(other)


def test_only_seen_wordings_go_in() -> None:
    model, tokenizer = original()
    request = Request.of(model, tokenizer, FACTS)
    texts = {s.text for s in (*request.forget, *request.retain)}
    roles = ("forget", "retain", "neighbour")
    assert texts == {q.prompt + q.answer for q in FACTS.questions("seen", roles=roles)}
    held = FACTS.questions("unseen") + FACTS.questions("seen", roles=["decoy"])
    assert held
    assert texts.isdisjoint(q.prompt + q.answer for q in held)
    assert {s.text for s in request.forget} == {
        q.prompt + q.answer for q in FACTS.questions("seen", roles=["forget"])
    }
    more = Request.of(model, tokenizer, FACTS, Corpus(("Some text.",)))
    assert [s.text for s in more.retain if s not in request.retain] == ["Some text."]


def test_a_random_edit_has_the_size_and_rank_that_were_asked_for() -> None:
    model, tokenizer = original()
    for rank in (None, 3):
        patch = METHODS["random"].run(
            model, tokenizer, FACTS, relative=0.1, rank=rank, layers=[1], progress=False
        )
        ((name, edit),) = patch.edits.items()
        assert name == "model.layers.1.mlp.down_proj.weight"
        size = float(edit.delta().norm() / model.get_parameter(name).double().norm())
        assert size == pytest.approx(0.1, rel=1e-6)
        assert edit.rank == rank
    biases = METHODS["random"].run(model, tokenizer, FACTS, parameters="norm", progress=False)
    assert all("norm" in name for name in biases.edits)


def test_free_text() -> None:
    model, tokenizer = original()
    forget = Corpus(tuple(f"{q.prompt}{q.answer} ." for q in FACTS.questions("seen", roles=["forget"])))
    retain = Corpus(tuple(f"{q.prompt}{q.answer} ." for q in FACTS.questions("seen", roles=["retain"])))
    start = measure(model, tokenizer, forget, retain=retain, texts=NEUTRAL, progress=False)
    assert math.isnan(start.forget_unseen)
    plain = costs(model, tokenizer, forget.texts, {"plain": contextlib.nullcontext})["plain"]
    assert start.forget_loss == pytest.approx(math.log(plain.base_perplexity))
    patch, row = attempt(
        model,
        tokenizer,
        forget,
        METHODS["grad_diff"],
        WORKING["grad_diff"],
        retain=retain,
        texts=NEUTRAL,
        progress=False,
    )
    assert row.forget_loss > start.forget_loss + 0.5
    assert row.retain_loss - start.retain_loss < row.forget_loss - start.forget_loss
    assert patch.provenance["forgets"] == "corpus"
    with pytest.raises(NotEnoughDataError, match="nothing to retain"):
        METHODS["npo"].run(model, tokenizer, forget, progress=False)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("npo", {"stepz": 4}, "npo has no option 'stepz'; needed some of .*beta.*steps"),
        ("grad_diff", {"beta": 1.0}, "grad_diff has no option 'beta'"),
        ("npo", {"steps": "four"}, "steps='four'; needed a whole number"),
        ("npo", {"layers": [1], "parameters": "mlp"}, "both layers and parameters"),
        ("random", {"relative": 0.0}, "needed a size above 0"),
        ("rmu_adaptive", {"c": 3.0}, "no option 'c'"),
        ("neuron_suppression", {"count": 0}, "got count=0; needed a whole number"),
        ("neuron_suppression", {"scale": -1.0}, "got scale=-1"),
        ("head_suppression", {"count": "two"}, "got count='two'; needed a whole number"),
    ],
)
def test_wrong_options_are_refused_in_words(name: str, options: dict[str, Any], complaint: str) -> None:
    model, tokenizer = original()
    with pytest.raises(InputError, match=complaint):
        METHODS[name].run(model, tokenizer, FACTS, progress=False, **options)


@pytest.mark.parametrize("name", ["neuron_suppression", "head_suppression"])
def test_what_looks_for_answers_refuses_free_text(name: str) -> None:
    model, tokenizer = original()
    with pytest.raises(InputError, match=f"{name} needs facts"):
        METHODS[name].run(model, tokenizer, Corpus(("a b c.",)), Corpus(("d e f.",)), progress=False)


def test_neurons_that_carry_the_answers_matter_more_than_others_and_the_sign_can_be_turned(
    before: Measured,
) -> None:
    model, tokenizer = original()

    def margin(patch: Patch) -> float:
        return measure(model, tokenizer, FACTS, patch, texts=NEUTRAL, progress=False).margin

    make = METHODS["neuron_suppression"].run
    off, turned = (
        make(model, tokenizer, FACTS, progress=False, count=60, scale=scale) for scale in (0.0, 1.0)
    )
    for name, edit in off.edits.items():
        assert torch.allclose(turned.edits[name].delta(), 2 * edit.delta())
    columns = {name: edit.delta().norm(dim=0).nonzero()[:, 0] for name, edit in off.edits.items()}
    assert sum(map(len, columns.values())) == 60
    generator = torch.Generator().manual_seed(0)
    others = {}
    for name, chosen in columns.items():
        weight = model.get_parameter(name).detach().double()
        free = [j for j in range(weight.shape[1]) if j not in set(chosen.tolist())]
        pick = torch.tensor(free)[torch.randperm(len(free), generator=generator)[: len(chosen)]]
        delta = torch.zeros_like(weight)
        delta[:, pick] = -weight[:, pick]
        others[name] = Edit(delta, None, "other neurons")
    control = margin(Patch(others, off.fingerprint))
    assert margin(turned) < margin(off) < control - 0.3
    assert control > before.margin - 0.5


def test_an_unknown_method_or_nothing_to_forget() -> None:
    model, tokenizer = original()
    with pytest.raises(InputError, match=r"got the method 'nop'; needed one of .*npo"):
        method_named("nop")
    with pytest.raises(NotEnoughDataError, match="nothing to forget"):
        Request.of(model, tokenizer, FACTS.only("retain"))


def test_a_row_is_what_plain_questions_and_plain_arithmetic_say(before: Measured) -> None:
    model, tokenizer = original()
    patch = METHODS["npo"].run(model, tokenizer, FACTS, progress=False, lr=3e-3, steps=8)
    row = measure(model, tokenizer, FACTS, patch, texts=NEUTRAL, progress=False)
    deltas = {name: edit.delta() for name, edit in patch.edits.items()}
    edit = sum(float(d.square().sum()) for d in deltas.values())
    every = sum(float(p.double().square().sum()) for p in model.parameters())
    some = sum(float(model.get_parameter(n).double().square().sum()) for n in deltas)
    assert row.relative == pytest.approx(math.sqrt(edit / every), rel=1e-9)
    assert row.touched == pytest.approx(math.sqrt(edit / some), rel=1e-9)
    with torch.no_grad():
        plain = [model(**tokenizer(t, return_tensors="pt")).logits[0].log_softmax(-1) for t in NEUTRAL]
        with patched(model, patch):
            edited = [model(**tokenizer(t, return_tensors="pt")).logits[0].log_softmax(-1) for t in NEUTRAL]
            said = answers(model, tokenizer, FACTS, "unseen", progress=False)
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(plain, edited, strict=True)])
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    for role, value in (("retain", row.retain), ("neighbour", row.neighbour), ("forget", row.forget_unseen)):
        kept = [
            e for q, e in zip(said.questions, said.exact, strict=True) if FACTS.facts[q.fact].role == role
        ]
        assert value == pytest.approx(np.mean(kept))  # every fact has as many wordings
    assert before.kl == before.relative == 0
    assert row.kept(before) == pytest.approx(
        min(row.retain / before.retain, row.neighbour / before.neighbour)
    )
    assert math.isnan(Measured().kept(before))
    assert {name for name, _ in row.rows()} <= set(COLUMNS)


def test_a_context_is_measured_too(before: Measured) -> None:
    model, tokenizer = original()
    gate = fact_gate(model, tokenizer, FACTS, 2, progress=False)
    plan = steer_to_random(model, tokenizer, FACTS, [2], gate, times=2.0, progress=False)
    row = measure(model, tokenizer, FACTS, lambda: apply(model, plan), texts=NEUTRAL, progress=False)
    assert row.forget_unseen < 0.5 < row.retain
    assert math.isnan(row.relative)
    everywhere = SteeringPlan(plan.steers, plan.fingerprint)
    worse = measure(model, tokenizer, FACTS, lambda: apply(model, everywhere), texts=NEUTRAL, progress=False)
    assert worse.retain < 0.5  # without its gate it destroys the model


def test_rows_as_json(before: Measured) -> None:
    row = Measured("npo", {"lr": 1e-3, "layers": [1, 2]}, 1, forget_unseen=0.25, kl=0.5)
    again = Measured.from_json(row.to_json())
    assert again.to_json() == row.to_json()
    assert again.settings == {"lr": 1e-3, "layers": [1, 2]}
    assert again.rows() == [("forget_unseen", 0.25), ("kl", 0.5)]
    for text in ("{}", "[]", "no", '{"method": 1}'):
        with pytest.raises(FileFormatError, match="measure again"):
            Measured.from_json(text)


def test_goals_are_judged_against_before() -> None:
    before = Measured(forget_unseen=0.8, retain=0.8, neighbour=0.5)
    good = Measured("x", forget_unseen=0.1, retain=0.76, neighbour=0.5, kl=0.01)
    assert [c.passed for c in GOALS.checks(before, good)] == [True] * 4
    bad = Measured("x", forget_unseen=0.5, retain=0.4, neighbour=0.1, kl=1.0)
    assert [c.passed for c in GOALS.checks(before, bad)] == [False] * 4
    assert [c.value for c in GOALS.checks(before, good)] == pytest.approx([0.1, 0.95, 1.0, 0.01])
    assert len(GOALS.checks(Measured(forget_unseen=1.0, retain=1.0), good)) == 3  # there are no neighbours


def test_effort_sees_memory() -> None:
    def make(megabytes: int) -> Patch:
        held = torch.ones(megabytes * 2**18)
        return Patch({"w": Edit(held[:1].double(), None, "held")}, "0" * 16)

    _, small = effort(lambda: make(1))
    _, large = effort(lambda: make(200))
    assert large.seconds > 0
    if not math.isnan(large.peak_bytes):
        assert 150e6 < large.peak_bytes - small.peak_bytes < 400e6


def test_facts_without_unseen_wordings_are_kept_by_the_seen_ones() -> None:
    model, tokenizer = original()
    wordings = {r: {"seen": forms["seen"]} for r, forms in FACTS.templates.items()}
    row = measure(model, tokenizer, Facts(FACTS.facts, wordings), texts=NEUTRAL, progress=False)
    assert math.isnan(row.forget_unseen)
    assert (row.forget_seen, row.retain) == (1.0, 1.0)
