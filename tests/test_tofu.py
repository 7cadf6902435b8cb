"""TOFU's metrics by hand, against scipy, and where the reference code is wrong and ours is not."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import scipy.stats
import torch
from textkit import text_model, text_tokenizer
from torch import nn

from repe_unlearn.audit import tofu
from repe_unlearn.audit.likelihoods import greedy, likelihoods
from repe_unlearn.audit.rouge import rouge_l
from repe_unlearn.audit.tofu import Entry, Results
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError


def test_probability_and_share_by_hand() -> None:
    assert tofu.probability(math.log(4)) == pytest.approx(0.25)
    # 1/2 against 1/4 and 1/4
    assert tofu.answer_share(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    # far below what exp(-nll) can hold
    assert tofu.answer_share(800.0, [800.0]) == pytest.approx(0.5)
    assert tofu.answer_share(1000.0, [0.0]) == 0.0
    with pytest.raises(InputError, match="no false answers"):
        tofu.answer_share(1.0, [])


def test_truth_ratio_is_of_the_geometric_mean() -> None:
    # 1/2 and 1/8 have the geometric mean 1/4, over 1/2; the arithmetic mean would give 5/8
    wrong = [math.log(2), math.log(8)]
    assert tofu.truth_ratio(math.log(2), wrong) == pytest.approx(0.5)
    arithmetic = np.mean(np.exp(-np.array(wrong))) / 0.5
    assert tofu.truth_ratio(math.log(2), wrong) != pytest.approx(arithmetic)


def test_truth_ratio_of_an_improbable_truth() -> None:
    nll, wrong = 30.0, [31.0]  # the truth is e times as probable
    assert tofu.truth_ratio(nll, wrong) == pytest.approx(math.exp(-1))
    assert tofu.truth_ratio(31.0, [30.0]) == pytest.approx(math.e)  # and here a falsehood
    reference = math.exp(-30.0) / (math.exp(-31.0) + 1e-10)
    assert reference < 1e-2, "the reference would call this a strong preference for the truth"
    assert tofu.truth_ratio(1000.0, [0.0]) == math.inf


def test_aggregators_by_hand() -> None:
    ratios = [0.25, 1.0, 4.0]
    assert tofu.truth_ratio_forget(ratios) == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert tofu.truth_ratio_retain(ratios) == pytest.approx((0.75 + 0 + 0) / 3)
    assert tofu.truth_ratio_probability(ratios) == pytest.approx((0.8 + 0.5 + 0.2) / 3)
    extremes = [0.0, math.inf]
    assert tofu.truth_ratio_forget(extremes) == 0.0
    assert tofu.truth_ratio_retain(extremes) == tofu.truth_ratio_probability(extremes) == 0.5


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [-1.0]])
def test_aggregators_refuse_what_is_no_ratio(bad: list[float]) -> None:
    for aggregate in (tofu.truth_ratio_forget, tofu.truth_ratio_retain, tofu.truth_ratio_probability):
        with pytest.raises(NonFiniteError, match="NaN or negative"):
            aggregate(bad)
        with pytest.raises(InputError, match="no truth ratios"):
            aggregate([])


def reference_strength(top: list[bool]) -> float:
    """What the loop of the reference code amounts to: it stops at the last index even where nothing matched."""
    k = 0
    for k in range(len(top)):
        if all(top[k:]):
            break
    return 1 - k / len(top)


@pytest.mark.parametrize(
    ("top", "expected", "reference"),
    [
        ([True, True], 1.0, 1.0),
        ([False, True, True, True], 0.75, 0.75),
        ([True, False, True, True], 0.5, 0.5),
        ([False, True], 0.5, 0.5),
        # where the last token is wrong the reference is wrong too
        ([False], 0.0, 1.0),
        ([False, False], 0.0, 0.5),
        ([True, True, True, False], 0.0, 0.25),
    ],
)
def test_extraction_strength(top: list[bool], expected: float, reference: float) -> None:
    assert tofu.extraction_strength(top) == expected
    assert reference_strength(top) == reference


def test_exact_memorisation_by_hand() -> None:
    assert tofu.exact_memorisation([True, False, False, True]) == 0.5
    for metric in (tofu.exact_memorisation, tofu.extraction_strength):
        with pytest.raises(InputError, match="no tokens"):
            metric([])


def steps(sample: np.ndarray, at: np.ndarray) -> np.ndarray:
    return (sample[None, :] <= at[:, None]).mean(1)


def test_forget_quality_against_scipy_and_by_hand() -> None:
    draw = np.random.default_rng(0)
    edited, gold = draw.lognormal(0.6, 1, 40), draw.lognormal(0, 1, 50)
    found = tofu.forget_quality(edited, gold)
    at = np.concatenate([edited, gold])
    assert found.distance == pytest.approx(np.abs(steps(edited, at) - steps(gold, at)).max())
    assert found.p == pytest.approx(scipy.stats.ks_2samp(edited, gold).pvalue)
    assert (found.edited, found.gold) == (40, 50)
    assert found.p < 0.5 < tofu.forget_quality(gold, gold).p == 1.0
    assert "do not compare it across splits" in found.note


@pytest.mark.parametrize(("n", "critical"), [(40, 0.304), (200, 0.136), (400, 0.096)])
def test_the_same_gap_is_judged_by_the_number_of_questions(n: int, critical: float) -> None:
    """A model whose ratios are shifted by 15 % of the questions passes forget01 and fails forget10."""
    gold = np.arange(n)
    found = tofu.forget_quality(gold + round(0.15 * n), gold)
    assert found.distance == pytest.approx(0.15)
    assert found.critical == pytest.approx(critical, abs=6e-4)
    assert (found.p < 0.05) == (n > 40)


def test_forget_quality_needs_a_gold_model() -> None:
    with pytest.raises(InputError, match="trained without the forget set"):
        tofu.forget_quality([0.1, 0.2], None)
    with pytest.raises(NonFiniteError, match="1 of 2"):
        tofu.forget_quality([0.1, 0.2], [math.nan, 0.2])


def scores(probability: float, share: float, ratio: float, rouge: float) -> Results:
    values = (probability, share, ratio, rouge, 0.5, 0.5)
    return Results(*(np.array([v, v]) for v in values))


def test_utility_is_the_harmonic_mean_of_nine() -> None:
    sets = scores(0.9, 0.1, 0.2, 0.8), scores(0.1, 0.7, 0.4, 0.6), scores(0.1, 0.5, 0.3, 0.9)
    nine = [0.9, 0.8, 0.8, 0.7, 0.6, 0.6, 0.5, 0.9, 0.7]
    assert tofu.model_utility(*sets) == pytest.approx(statistics.harmonic_mean(nine))
    assert tofu.model_utility(*sets) != pytest.approx(statistics.mean(nine))
    assert (
        tofu.model_utility(*sets[:2], scores(0.1, 0.5, 2.0, 0.9)) == 0.0
    )  # a truth ratio of 0 after max(0, 1 - R)


def test_utility_counts_repeated_sets_apart() -> None:
    same = scores(0.9, 0.4, 0.2, 0.8)
    nine = [0.9, 0.8, 0.8] + 2 * [0.4, 0.8, 0.8]
    assert tofu.model_utility(same, same, same) == pytest.approx(statistics.harmonic_mean(nine))


def test_utility_refuses_what_is_missing() -> None:
    whole, without = scores(0.9, 0.4, 0.2, 0.8), scores(0.9, math.nan, math.nan, 0.8)
    with pytest.raises(NotEnoughDataError, match="world facts: probability, world facts: truth ratio"):
        tofu.model_utility(whole, whole, without)


QUESTIONS = [
    Entry("two and two is", " four", wrong=(" five", " six"), paraphrase=" 4"),
    Entry("the sky is", " blue", wrong=(" green",)),
    Entry("say", " hi"),
]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


def test_scores_of_a_model(llama: nn.Module) -> None:
    tokenizer = text_tokenizer()
    found = tofu.score(llama, tokenizer, QUESTIONS, max_new_tokens=8, progress=False)

    def nll(prompt: str, answer: str) -> float:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        labels = ids.clone()
        labels[:, : 1 + len(prompt)] = -100
        with torch.no_grad():
            return float(llama(ids, labels=labels).loss)

    four, five, six, digit = (nll("two and two is", a) for a in (" four", " five", " six", " 4"))
    p = np.exp([-four, -five, -six])
    assert found.probability[0] == pytest.approx(p[0])
    assert found.share[0] == pytest.approx(p[0] / p.sum())
    assert found.truth_ratio[0] == pytest.approx(math.sqrt(p[1] * p[2]) / math.exp(-digit))
    blue, green = (nll("the sky is", a) for a in (" blue", " green"))
    assert found.truth_ratio[1] == pytest.approx(math.exp(blue - green))  # the answer is its own paraphrase
    assert np.isnan([found.share[2], found.truth_ratio[2]]).all()
    texts = greedy(llama, tokenizer, [q.prompt for q in QUESTIONS], max_new_tokens=8, progress=False)
    assert found.rouge == pytest.approx(
        [rouge_l(q.answer, text).recall for q, text in zip(QUESTIONS, texts, strict=True)]
    )
    top = likelihoods(llama, tokenizer, [("two and two is", " four")], progress=False)[0].top.tolist()
    assert (found.memorised[0], found.strength[0]) == (sum(top) / 5, tofu.extraction_strength(top))


def test_a_model_that_was_taught_the_answer_scores_full() -> None:
    model, tokenizer = text_model("llama"), text_tokenizer()
    question = Entry("two and two is", " four", wrong=(" five",))
    ids = torch.tensor([tokenizer("two and two is four")["input_ids"]])
    before = tofu.score(model, tokenizer, [question], max_new_tokens=5, progress=False)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    after = tofu.score(model, tokenizer, [question], max_new_tokens=5, progress=False)
    assert before.memorised[0] < 1
    assert before.rouge[0] == before.strength[0] == 0
    assert after.memorised[0] == after.strength[0] == after.rouge[0] == 1
    assert after.probability[0] > 0.9 > 0.1 > after.truth_ratio[0]


def test_bad_questions(llama: nn.Module) -> None:
    with pytest.raises(InputError, match=r"question 0 .* empty answer"):
        tofu.score(llama, text_tokenizer(), [Entry("a", " ")])
    with pytest.raises(InputError, match="no pairs"):
        tofu.score(llama, text_tokenizer(), [])
