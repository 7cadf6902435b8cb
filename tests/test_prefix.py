"""The prefix attack: its gradient is that of plain torch, only readable tokens count, and who never knew gains nothing."""

from __future__ import annotations

import ast
import functools

import numpy as np
import pytest
import torch
from knowkit import PLANTED, TOK, TOLD, gold, original
from textkit import text_model
from tiny import assert_same, hook_count, snapshot
from torch import nn

from repe_unlearn.audit import attacks
from repe_unlearn.audit import prefix as module
from repe_unlearn.audit.prefix import _Search, prefix
from repe_unlearn.audit.scores import Scores, halves
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts

FACTS = PLANTED.where(lambda f: f.relation == PLANTED.relations[0] and f.role != "retain")
FEW = Facts.of(
    [
        *((f"Kim{i}", town) for i, town in enumerate(("Rome", "Oslo", "Lima", "Bonn"))),
        *((f"Zed{i}", town, "decoy") for i, town in enumerate(("Lima", "Bonn", "Rome", "Oslo"))),
    ],
    ["{subject} is in"],
    ["the town of {subject} is"],
)
QUICK = {"length": 3, "steps": 2, "candidates": 4, "batch": 4, "progress": False}


@functools.cache
def found(who: str) -> Scores:
    model = original()[0] if who == "original" else gold()
    return prefix(model, original()[1], FACTS, length=4, steps=4, forms=("unseen",), progress=False)


def test_who_knows_still_answers_behind_a_prefix_and_the_search_raises_what_it_is_judged_on() -> None:
    scores = found("original")
    assert (scores.tier, scores.unit) == ("T1", "share")
    assert scores.of(FACTS, "forget").mean() > 0.5 + scores.of(FACTS, "decoy").mean()
    assert len(scores.values) == len(FACTS)
    (curve,) = scores.curves
    assert len(curve.y) == 5
    assert curve.y[1] > curve.y[0]  # the same questions, before and after a step


def test_who_never_knew_gains_nothing_over_decoys() -> None:
    scores = found("gold")
    gap = scores.of(FACTS, "forget").mean() - scores.of(FACTS, "decoy").mean()
    assert abs(gap) < 0.12
    assert scores.of(FACTS, "forget").mean() < 0.3


def test_subjects_that_are_scored_were_not_searched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    run = _Search.run

    def watched(self: _Search, *args: object) -> None:
        asked.append({q.fact for q in self.questions})
        self.questions = self.questions[:2]
        run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(_Search, "run", watched)
    prefix(text_model(), TOK, FEW, **QUICK)  # type: ignore[arg-type]
    first, second = asked
    assert first | second == set(range(len(FEW)))
    assert not {FEW.facts[i].subject for i in first} & {FEW.facts[i].subject for i in second}
    half = halves(range(len(FEW)), FEW, 0)
    assert first == {i for i, side in half.items() if side == 0}
    for side in (first, second):  # both roles, evenly
        assert sum(FEW.facts[i].role == "decoy" for i in side) == 2


def test_the_gradient_is_that_of_plain_torch() -> None:
    model = text_model("llama")
    questions = FEW.questions("seen")[:2]
    search = _Search(
        model, TOK, FEW, questions, 0, 512, best=tuple(TOK("xyz", add_special_tokens=False)["input_ids"])
    )
    rng = np.random.default_rng(3)
    mine = search._promise(questions, rng)
    again = np.random.default_rng(3)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    total, onehots = torch.zeros((), dtype=torch.float64), []
    for q in questions:
        wrong = q.options[int(again.integers(len(q.options)))]
        for sign, text in ((1, q.answer), (-1, wrong)):
            head, tail = TOK("xyz\n" + q.prompt)["input_ids"], TOK("xyz\n" + q.prompt + text)["input_ids"]
            onehot = torch.nn.functional.one_hot(torch.tensor(tail), len(weight)).double().requires_grad_()
            onehots.append(onehot)
            logp = model(inputs_embeds=(onehot @ weight)[None]).logits[0].float().log_softmax(-1)
            total = total + sign * sum(logp[i - 1, tail[i]] for i in range(len(head), len(tail)))
    slopes = torch.autograd.grad(total, onehots)
    theirs = sum(slope[1:4] for slope in slopes)  # behind <s>
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    assert mine.abs().max() > 1e-3


def test_only_what_is_read_back_as_it_was_written_is_tried() -> None:
    """Bytes of broken characters are not: they decode to a sign of another spelling."""
    scores = prefix(text_model(), TOK, FEW, **QUICK | {"steps": 4, "candidates": 16})  # type: ignore[arg-type]
    assert int(scores.facts["not read back as written"]) > 0
    for text in map(ast.literal_eval, scores.facts["prefixes"].split(" | ")):
        assert len(TOK(text, add_special_tokens=False)["input_ids"]) == 3


def test_the_same_seed_finds_the_same_and_another_finds_another() -> None:
    runs = [prefix(text_model(), TOK, FEW, **QUICK, seed=seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert dict(runs[0].values) == dict(runs[1].values)
    assert dict(runs[0].facts) == dict(runs[1].facts)
    assert runs[0].facts["prefixes"] != runs[2].facts["prefixes"]


@pytest.mark.parametrize("step", [None, "answers", "tap"])
def test_the_model_is_left_as_it_was(step: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    model.train()
    parameter = next(model.parameters()).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if step:
        monkeypatch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefix(model, TOK, FEW, **QUICK)  # type: ignore[arg-type]
    else:
        prefix(model, TOK, FEW, **QUICK)  # type: ignore[arg-type]
    assert_same(before, model)
    assert hook_count(model) == 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert model.training


def test_wrong_inputs_are_refused() -> None:
    model: nn.Module = text_model()
    for wrong in ({"steps": 0}, {"length": 0}, {"candidates": 1.5}, {"top": 0}, {"batch": -1}):
        with pytest.raises(InputError, match="whole number"):
            prefix(model, TOK, FEW, **QUICK | wrong)  # type: ignore[arg-type]
    one = TOLD.where(lambda f: f.subject == "Kim")
    with pytest.raises(NotEnoughDataError):
        prefix(model, TOK, one, **QUICK)  # type: ignore[arg-type]


def test_it_is_the_last_row_of_the_battery_and_of_the_full_level_only() -> None:
    row = attacks.ATTACKS[-1]
    assert (row.name, row.tier, row.level, row.random, row.seeds) == ("prefix", "T1", "full", False, True)
    assert "prefix" not in {one.name for one in attacks.of_level("standard")}
    assert "prefix" in {one.name for one in attacks.of_level("quick", only=["prefix"])}
