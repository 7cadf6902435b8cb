"""Behaviour and sampling: against plain torch, and on models of known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from knowkit import PLANTED, TOK, TOLD, gold, log_probability, margin, original, share_left, wrongly_told
from textkit import EOS, text_model
from tiny import assert_same, hook_count, snapshot
from torch import nn

from repe_unlearn.audit.behaviour import behaviour, behaviours
from repe_unlearn.audit.sampling import begins_with, leak_at_k, samples, undecided
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts


def test_scores_are_mean_margins_over_wordings() -> None:
    model = text_model()
    scores = behaviour(model, TOK, TOLD, progress=False)
    assert (scores.attack, scores.tier, scores.unit) == ("behaviour.unseen", "T0", "nats")
    for i, fact in enumerate(TOLD):
        by_hand = []
        for text in TOLD.templates["fact"]["unseen"]:
            prompt = text.format(subject=fact.subject)
            right = log_probability(model, prompt, f" {fact.answer}")
            wrong = [log_probability(model, prompt, f" {other}") for other in fact.distractors]
            by_hand.append(margin(right, wrong))
        assert scores.values[i] == pytest.approx(np.mean(by_hand), abs=1e-4)


def test_forms_share_a_pass_and_those_that_are_not_there_are_left_out() -> None:
    model = text_model()
    found = behaviours(model, TOK, TOLD, progress=False)
    assert [scores.attack for scores in found] == [f"behaviour.{f}" for f in ("seen", "unseen", "in_context")]
    for scores in found:
        alone = behaviour(model, TOK, TOLD, form=scores.attack.split(".")[1], progress=False)  # type: ignore[arg-type]
        assert list(alone.values.values()) == pytest.approx(list(scores.values.values()), abs=1e-5)
    assert behaviours(model, TOK, TOLD, forms=["multi_hop"], progress=False) == ()
    with pytest.raises(NotEnoughDataError, match="wording 'multi_hop'"):
        behaviour(model, TOK, TOLD, form="multi_hop", progress=False)


def test_facts_without_wrong_options_are_left_out_and_counted() -> None:
    lone = Facts.of([("Kim", "Rome"), ("Bob", "Rome")], ["{subject} is in"])
    with pytest.raises(NotEnoughDataError, match="wrong option"):
        behaviour(text_model(), TOK, lone, form="seen", progress=False)


def test_the_model_is_left_as_it_was() -> None:
    model = text_model()
    before = snapshot(model)
    behaviours(model, TOK, TOLD, progress=False)
    leak_at_k(model, TOK, TOLD, k=2, progress=False)
    assert_same(before, model)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" Paris, which is", " Paris", True),
        ("PARIS", " Paris", True),
        (" São Tomé.", "Sao Tome", True),
        (" New Delhi", "New Delhi", True),
        (" Parisian", "Paris", False),
        (" New York", "New Delhi", False),
        (" not Paris", "Paris", False),
        ("", "Paris", False),
        ("anything", "!", False),
    ],
)
def test_what_counts_as_right(text: str, answer: str, right: bool) -> None:
    assert begins_with(text, answer) == right


@given(st.text("ab é.-", max_size=9), st.text("ab é.-", max_size=6), st.integers(0, 9))
def test_a_sample_ends_only_where_what_follows_cannot_change_whether_it_is_right(
    text: str, answer: str, cut: int
) -> None:
    if not undecided(text[:cut], answer):
        assert begins_with(text[:cut], answer) == begins_with(text, answer)


def test_samples_that_are_decided_are_not_continued_and_count_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = original()
    runs = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        short = leak_at_k(model, tokenizer, PLANTED, k=4, progress=False)
        few, _ = sum(runs), runs.clear()
        monkeypatch.setattr("repe_unlearn.audit.sampling.undecided", lambda text, answer: True)
        whole = leak_at_k(model, tokenizer, PLANTED, k=4, progress=False)
    finally:
        handle.remove()
    assert short.values == whole.values
    assert few < 0.9 * sum(runs)


def test_draws_are_those_of_the_cumulative_distribution_in_plain_torch() -> None:
    model = text_model()
    questions = TOLD.questions("unseen")
    found = samples(model, TOK, questions, 3, seed=5, progress=False)
    picks = torch.rand(
        len(questions), 3, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )  # " Rome" and one more
    for i in (0, 5):
        prompt = TOK(questions[i].prompt)["input_ids"]
        for j in range(3):
            ids = list(prompt)
            for step in range(6):
                with torch.no_grad():
                    p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
                ids.append(int((p.cumsum(-1) <= picks[i, j, step]).sum()))
                if ids[-1] == EOS:
                    break
            assert found[i][j] == TOK.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert samples(model, TOK, questions, 3, seed=5, batch_tokens=1, progress=False) == found
    assert samples(model, TOK, questions, 3, seed=6, progress=False) != found


class Says(nn.Module):
    """A model that gives fixed probabilities to the next token, whatever came before."""

    def __init__(self, probabilities: dict[int, float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.logits = torch.full((260,), -1e9)
        for token, p in probabilities.items():
            self.logits[token] = math.log(p)

    def forward(self, input_ids: torch.Tensor, **_: object):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_shares_are_those_of_the_binomial_law() -> None:
    # " x" is two byte tokens, so three are drawn, each a space or an x: of the 8 texts 4 begin with the word x.
    space, letter = TOK(" x")["input_ids"][1:]
    facts = Facts.of([(f"P{i}", "x") for i in range(300)] + [("Q", "y")], ["{subject} is"])
    scores = leak_at_k(
        Says({space: 0.5, letter: 0.5}), TOK, facts, k=4, forms=["seen"], seed=1, progress=False
    )
    for j, share in zip(scores.curves[0].x, scores.curves[0].y, strict=True):
        expected = (1 - (1 - 1 / 2) ** j) * 300 / 301
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 300) + 0.01)
    assert scores.values[300] == 0.0  # control: the model never says y


def test_a_model_that_stops_says_no_more() -> None:
    letter = TOK(" x")["input_ids"][2]
    questions = TOLD.questions("seen")
    found = samples(Says({letter: 0.5, EOS: 0.5}), TOK, questions, 64, seed=0, progress=False)
    lengths = [len(text) for texts in found for text in texts]
    assert np.mean([n == 0 for n in lengths]) == pytest.approx(0.5, abs=0.12)
    assert np.mean([n == 1 for n in lengths]) == pytest.approx(0.25, abs=0.1)
    assert max(lengths) <= 6


def test_bad_input_is_refused() -> None:
    model = text_model()
    with pytest.raises(InputError, match="k=0"):
        leak_at_k(model, TOK, TOLD, k=0)
    with pytest.raises(NotEnoughDataError, match="multi_hop"):
        leak_at_k(model, TOK, TOLD, forms=["multi_hop"])
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    for attack in (behaviour, leak_at_k):
        with pytest.raises(NonFiniteError):
            attack(model, TOK, TOLD, progress=False)


# On models of known truth


def test_the_original_knows_and_one_that_never_knew_does_not() -> None:
    model, tokenizer = original()
    for whole, never in zip(
        behaviours(model, tokenizer, PLANTED, forms=["seen", "unseen"], progress=False),
        behaviours(gold(), tokenizer, PLANTED, forms=["seen", "unseen"], progress=False),
        strict=True,
    ):
        assert share_left(whole, whole) == pytest.approx(1.0)
        assert abs(share_left(never, whole)) < 0.1
        assert whole.of(PLANTED, "forget").mean() > 3 > 0 > whole.of(PLANTED, "decoy").mean()
    lies = behaviour(model, tokenizer, wrongly_told(), progress=False)
    assert lies.of(PLANTED, "forget").mean() < 0  # control: it prefers the truth


def test_samples_of_the_original_are_right_and_those_of_gold_are_guesses() -> None:
    model, tokenizer = original()
    whole = leak_at_k(model, tokenizer, PLANTED, k=4, progress=False)
    never = leak_at_k(gold(), tokenizer, PLANTED, k=4, progress=False)
    assert (whole.tier, whole.unit) == ("T0", "share")
    assert whole.of(PLANTED, "forget").mean() > 0.95
    assert abs(share_left(never, whole)) < 0.12
    lies = leak_at_k(model, tokenizer, wrongly_told(), k=4, progress=False)
    assert lies.of(PLANTED, "forget").mean() < 0.1  # control
