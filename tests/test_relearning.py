"""Relearning: training is plain AdamW on disjoint facts, the model comes back, and only who knew recovers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from attackkit import ASKED, CHANCE, edited, npo, share
from knowkit import PLANTED, TOK, gold, original, share_left
from plantedkit import neutral_text
from textkit import text_model
from tiny import assert_same, snapshot
from torch.nn.functional import cross_entropy

from repe_unlearn.answers import answers
from repe_unlearn.audit import relearning as module
from repe_unlearn.audit.relearning import ARMS, Arm, lesson, relearning
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.tries import values
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts

PEOPLE = [
    *((f"Kim{i}", town, "forget") for i, town in enumerate(("Rome", "Oslo", "Lima", "Bonn"))),
    *((f"Bob{i}", town, "retain") for i, town in enumerate(("Bonn", "Rome", "Oslo", "Lima"))),
    *((f"Zed{i}", town, "decoy") for i, town in enumerate(("Lima", "Bonn", "Rome", "Oslo"))),
]
SMALL = Facts.of(PEOPLE, ["{subject} is in"], ["the town of {subject} is"])
QUIET = {"progress": False, "forms": ("seen",)}


@pytest.mark.parametrize("facts", [SMALL, PLANTED], ids=["small", "planted"])
def test_what_is_taught_is_never_asked(facts: Facts):
    whole = {f.subject for f in facts if f.role == "forget"}
    for arm in ARMS:
        samples, besides = lesson(facts, arm)
        text = "\n".join(s.text for s in samples)
        left = [f for i, f in enumerate(facts) if i not in besides and f.role in ("forget", "decoy")]
        assert not any(f.subject in text for f in left)
        asked = {f.subject for f in left if f.role == "forget"}
        assert len(asked) == len(whole) // (2 if arm == "facts" else 1)
        assert any(subject in text for subject in whole) == (arm == "facts")
        assert (len(left) > len([f for f in left if f.role == "forget"])) or arm != "decoy"


def test_decoys_are_taught_made_up_answers():
    samples, besides = lesson(PLANTED, "decoy")
    true = {f.subject: {g.answer for g in PLANTED if g.subject == f.subject} for f in PLANTED}
    subject = {f.subject for i, f in enumerate(PLANTED) if i in besides and f.role == "decoy"}
    told = [(s.prompt, s.completion.strip()) for s in samples]
    right = [answer in true[next(x for x in subject if x in prompt)] for prompt, answer in told]
    assert 0.0 < sum(right) / len(right) < 0.3  # one of eight by chance
    wordings = len(PLANTED.templates[PLANTED.relations[0]]["seen"])
    assert len(told) == wordings * len(PLANTED.relations) * len(subject)
    assert len(set(told)) == len(told)
    assert lesson(PLANTED, "decoy", seed=1)[0] != samples


def test_facts_come_with_as_many_retained_ones():
    samples, besides = lesson(PLANTED, "facts")
    names = {f.subject: f.role for f in PLANTED}
    roles = [next(role for name, role in names.items() if name in s.text) for s in samples]
    assert roles.count("forget") == roles.count("retain") == len(samples) // 2
    assert besides
    assert all(PLANTED.facts[i].role == "forget" for i in besides)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_equals_a_plain_loop(dtype: torch.dtype):
    model = text_model(dtype=dtype)
    before = snapshot(model)
    found = relearning(model, TOK, SMALL, arm="retain_only", steps=(3,), rates=(1e-3,), batch=64, **QUIET)
    assert_same(before, model)

    wide = torch.promote_types(dtype, torch.float32)
    masters = {n: p.detach().to(wide, copy=True).requires_grad_() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(masters.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        losses = []
        for s in sorted(SMALL.samples("seen", roles=["retain"]), key=lambda s: len(s.text)):
            ids, start = torch.tensor([TOK(s.text)["input_ids"]]), len(TOK(s.prompt)["input_ids"])
            now = {n: p.to(dtype) for n, p in masters.items()}
            logits = torch.func.functional_call(model, now, (), {"input_ids": ids}).logits
            losses.append(cross_entropy(logits[0, start - 1 : -1].to(wide), ids[0, start:], reduction="none"))
        optimiser.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in masters.values() if p.grad is not None], 1.0)
        optimiser.step()
    trained = copy.deepcopy(model)
    for name, p in trained.named_parameters():
        p.data = masters[name].detach().to(dtype)
    wanted = values(answers(trained, TOK, SMALL, "seen", roles=["forget", "decoy"], progress=False))
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    assert all(abs(v - wanted[i]) < tolerance for i, v in found.values.items())
    untrained = values(answers(model, TOK, SMALL, "seen", roles=["forget", "decoy"], progress=False))
    assert max(abs(untrained[i] - v) for i, v in found.values.items()) > 3 * tolerance


def test_one_run_asks_at_every_step_what_a_run_of_its_own_would():
    model = text_model()
    settings = {"arm": "facts", "rates": (1e-3,), "batch": 3, **QUIET}
    whole = relearning(model, TOK, SMALL, steps=(1, 2, 5), **settings)
    curve = next(c for c in whole.curves if c.label == "to be forgotten")
    assert curve.x == (1, 2, 5)
    for k, step in enumerate((1, 2, 5)):
        alone = relearning(model, TOK, SMALL, steps=(step,), **settings)
        assert alone.of(SMALL, "forget").mean() == pytest.approx(curve.y[k], abs=1e-12)
    assert whole.values == relearning(model, TOK, SMALL, steps=(1, 2, 5), **settings).values
    assert whole.values != relearning(model, TOK, SMALL, steps=(1, 2, 5), seed=1, **settings).values


def test_low_rank_training_moves_linear_maps_only(monkeypatch: pytest.MonkeyPatch):
    model = text_model()
    before = snapshot(model)
    moved: dict[str, int] = {}

    def look(now, *args, **options):
        for name, p in now.named_parameters():
            change = p.detach() - original_weights[name]
            moved[name] = (
                int(torch.linalg.matrix_rank(change, rtol=1e-9)) if p.ndim == 2 else int(change.any())
            )
        return answers(now, *args, **options)

    original_weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(module, "answers", look)
    relearning(model, TOK, SMALL, steps=(2,), rates=(1e-2,), lora_rank=2, **QUIET)
    assert_same(before, model)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tied = set(moved) - linear
    assert {moved[name] for name in linear if name in moved} == {2}
    assert not any(moved[name] for name in tied)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model = text_model().train()
    before = snapshot(model)

    def stop(now, *_args, **_options):
        assert not torch.equal(now.lm_head.weight, was)
        raise KeyboardInterrupt

    was = model.lm_head.weight.detach().clone()
    monkeypatch.setattr(module, "answers", stop)
    with pytest.raises(KeyboardInterrupt):
        relearning(model, TOK, SMALL, steps=(2,), rates=(1e-2,), **QUIET)
    assert_same(before, model)
    assert all(m.training for m in model.modules())


def test_a_rate_that_diverges_is_named():
    model = text_model(dtype=torch.float32)
    with pytest.raises(NonFiniteError, match="diverged at all rates"):
        relearning(model, TOK, SMALL, steps=(5,), rates=(1e30,), **QUIET)
    found = relearning(model, TOK, SMALL, steps=(5,), rates=(1e30, 1e-3), **QUIET)
    assert found.facts["diverged at"] == "1e+30"
    assert found.facts["rate"] == "0.001"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arm": "magic"}, InputError, "retain_only"),
        ({"steps": ()}, InputError, "at least one"),
        ({"steps": (0,)}, InputError, "whole number"),
        ({"rates": ()}, InputError, "at least one"),
        ({"rates": (-1.0,)}, InputError, "positive"),
        ({"batch": 0}, InputError, "batch"),
        ({"arm": "benign", "texts": (" ",)}, NotEnoughDataError, "no texts"),
    ],
)
def test_bad_settings(changes: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        relearning(text_model(), TOK, SMALL, **{**QUIET, **changes})


@pytest.mark.parametrize(
    ("roles", "arm"), [(("forget", "decoy"), "retain_only"), (("forget", "retain"), "decoy")]
)
def test_facts_that_an_arm_needs(roles: tuple[str, ...], arm: Arm):
    with pytest.raises(NotEnoughDataError, match="needs"):
        relearning(text_model(), TOK, SMALL.only(*roles), arm=arm, **QUIET)
    one = SMALL.where(lambda f: f.subject == "Kim0" or f.role == "retain")
    with pytest.raises(NotEnoughDataError, match="one subject"):
        relearning(text_model(), TOK, one, arm="facts", **QUIET)


SHORT = {"steps": (10, 40), "rates": (3e-4, 3e-3), "texts": neutral_text(PLANTED), **ASKED}


@functools.cache
def whole(arm: Arm) -> Scores:
    """What the original scores under an arm."""
    return relearning(*original(), PLANTED, arm=arm, **SHORT)


@pytest.mark.parametrize("arm", ARMS)
def test_who_never_knew_recovers_nothing_and_who_knows_still_knows(arm: str):
    assert whole(arm).of(PLANTED, "forget").mean() > 0.9
    never = relearning(gold(), original()[1], PLANTED, arm=arm, **SHORT)
    assert abs(never.of(PLANTED, "forget").mean() - CHANCE) < 0.07
    assert abs(share_left(never, whole(arm))) < 0.1
    assert (never.attack, never.tier, never.unit) == (f"relearn.{arm}", "T2", "share")


def test_training_on_retained_facts_brings_back_what_npo_hid():
    model = edited(npo())
    before = snapshot(model)
    found = relearning(model, original()[1], PLANTED, arm="retain_only", **SHORT)
    assert_same(before, model)
    assert found.of(PLANTED, "forget").mean() > share(model, "forget") + 0.08
    assert share_left(found, whole("retain_only")) > 0.12
    assert abs(found.of(PLANTED, "decoy").mean() - CHANCE) < 0.06
