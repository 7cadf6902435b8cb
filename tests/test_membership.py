"""Membership scores by hand, AUCs against scikit-learn and pair counting, intervals by simulation."""

from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from textkit import text_model, text_tokenizer

from repe_unlearn.audit.likelihoods import Likelihood, likelihoods
from repe_unlearn.audit.membership import ATTACKS, Auc, auc, loss, membership, min_k, min_k_plus, zlib_ratio
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError


def item(
    logs: list[float], expected: float = -2.0, variance: float = 4.0, text: str = "some text"
) -> Likelihood:
    values = torch.tensor(logs, dtype=torch.float64)
    return Likelihood(
        text,
        values,
        torch.full_like(values, expected),
        torch.full_like(values, variance),
        torch.zeros(len(logs), dtype=torch.bool),
    )


def test_scores_by_hand() -> None:
    text = item([-1.0, -4.0, -3.0, -2.0, -5.0])
    assert loss(text) == -3.0
    assert zlib_ratio(text) == pytest.approx(-3.0 / len(zlib.compress(b"some text")))
    assert min_k(text, 0.2) == -5.0
    assert min_k(text, 0.4) == -4.5
    assert min_k(text, 0.59) == -4.5  # rounded down
    assert min_k(text, 0.01) == -5.0  # at least one
    assert min_k(text, 1.0) == loss(text)
    assert min_k_plus(text, 0.4) == pytest.approx((-4.5 + 2.0) / 2.0)
    assert min_k_plus(item([-1.0], expected=-1.5, variance=0.0), 1.0) == pytest.approx(0.5 / 1e-3)
    assert {name: f(text) for name, f in ATTACKS.items()} == {
        "loss": loss(text),
        "zlib": zlib_ratio(text),
        "min_k_20": min_k(text, 0.2),
        "min_k_40": min_k(text, 0.4),
        "min_k_plus_20": min_k_plus(text, 0.2),
        "min_k_plus_40": min_k_plus(text, 0.4),
    }
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match="share="):
            min_k(text, share)


def test_standardising_orders_tokens_anew() -> None:
    """Min-K++ looks at how unlikely a token is for its own distribution: the hard token here is an expected one."""
    text = Likelihood(
        "t",
        torch.tensor([-9.0, -3.0], dtype=torch.float64),
        torch.tensor([-9.0, -1.0], dtype=torch.float64),
        torch.tensor([1.0, 1.0], dtype=torch.float64),
        torch.zeros(2, dtype=torch.bool),
    )
    assert min_k(text, 0.5) == -9.0
    assert min_k_plus(text, 0.5) == -2.0


def test_auc_counts_pairs_and_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 5, 13).astype(float), draw.integers(1, 7, 9).astype(float)
    pairs = [(x > y) + (x == y) / 2 for x, y in itertools.product(a, b)]
    assert float(auc(a, b)) == pytest.approx(np.mean(pairs))
    assert float(auc(a, b)) == pytest.approx(roc_auc_score([1] * 13 + [0] * 9, [*a, *b]))
    assert float(auc(a, b)) + float(auc(b, a)) == pytest.approx(1.0)
    assert auc(np.stack([a, a + 100]), np.stack([b, b])).tolist() == [float(auc(a, b)), 1.0]


def sample(n: int, shift: float, seed: int, tokens: int = 6) -> list[Likelihood]:
    draw = np.random.default_rng(seed)
    return [
        item(
            (draw.normal(-3, 1, tokens) + shift + draw.normal(0, 1)).tolist(), text=f"text {i}" * (1 + i % 3)
        )
        for i in range(n)
    ]


def by_name(found: tuple[Auc, ...]) -> dict[str, Auc]:
    return {one.name: one for one in found}


def test_both_directions_are_seen() -> None:
    known = by_name(membership(sample(60, 2.0, 0), sample(60, 0.0, 1)))
    shunned = by_name(membership(sample(60, -2.0, 0), sample(60, 0.0, 1)))
    unseen = by_name(membership(sample(60, 0.0, 0), sample(60, 0.0, 1)))
    assert known["loss"].value > 0.85
    assert shunned["loss"].value < 0.15
    assert known["loss"].gap == pytest.approx(known["loss"].value - 0.5)
    assert shunned["loss"].gap == pytest.approx(0.5 - shunned["loss"].value)
    for name in ATTACKS:
        assert known[name].check().passed is False
        assert shunned[name].check().passed is False
        assert unseen[name].check(width=0.3).passed is True
    assert "like training data" in known["loss"].check().note
    assert "over-erased" in shunned["loss"].check().note
    check = known["loss"].check(control=0.5)
    assert (check.name, check.control, check.low) == ("membership.loss", 0.5, known["loss"].low)


def test_an_interval_across_the_bound_decides_nothing() -> None:
    few = Auc("loss", 0.5, 0.35, 0.65, 8, 8).check()
    assert few.passed is None
    assert "8 and 8 texts" in few.note
    assert Auc("loss", 0.5, 0.41, 0.59, 99, 99).check().passed is True
    assert Auc("loss", 0.8, 0.61, 0.9, 99, 99).check().passed is False
    for width in (0.0, 0.5):
        with pytest.raises(InputError, match="width"):
            Auc("loss", 0.5, 0.4, 0.6, 9, 9).check(width=width)


def test_intervals_cover_and_are_reproducible() -> None:
    """The true AUC of two unit normals one apart is Phi(1 / sqrt 2)."""
    from scipy.stats import norm

    truth, hits, runs = norm.cdf(1 / math.sqrt(2)), 0, 40
    for seed in range(runs):
        draw = np.random.default_rng(seed)
        sets = [[item([v]) for v in draw.normal(shift, 1, 40)] for shift in (1, 0)]
        found = by_name(membership(sets[0], sets[1], resamples=200))["loss"]
        assert found.low < found.value < found.high
        hits += found.low <= truth <= found.high
    assert hits / runs > 0.85  # 0.95 less three standard errors and what a bootstrap of 40 costs
    again = by_name(membership(sets[0], sets[1], resamples=200))["loss"]
    assert again == found
    assert by_name(membership(sets[0], sets[1], resamples=200, seed=1))["loss"] != found


def test_a_reference_takes_out_what_makes_texts_hard() -> None:
    """Members are 0.5 more probable than to the reference, but the texts differ far more among themselves."""
    draw = np.random.default_rng(3)
    hard_a, hard_b = draw.normal(-8, 3, 30), draw.normal(-8, 3, 30)
    noise = draw.normal(0, 0.1, 60)
    members = [
        item([h + 0.5 + e], text=f"a{i}") for i, (h, e) in enumerate(zip(hard_a, noise[:30], strict=True))
    ]
    others = [item([h + e], text=f"b{i}") for i, (h, e) in enumerate(zip(hard_b, noise[30:], strict=True))]
    reference = (
        [item([h], text=f"a{i}") for i, h in enumerate(hard_a)],
        [item([h], text=f"b{i}") for i, h in enumerate(hard_b)],
    )
    found = by_name(membership(members, others, reference=reference))
    assert found["reference"].value > 0.95
    assert found["loss"].gap < 0.2
    assert "reference" not in by_name(membership(members, others))
    with pytest.raises(InputError, match="other texts"):
        membership(members, others, reference=(reference[1], reference[0]))


def test_a_trained_model_gives_its_texts_away() -> None:
    model, tokenizer = text_model("llama"), text_tokenizer()
    texts = [
        f"{who} {does} {what}"
        for who in ("ann", "bob")
        for does in ("ate", "hid")
        for what in ("it", "all", "one", "ten")
    ]
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=draw).tolist()
    taught, unseen = [texts[i] for i in order[:8]], [texts[i] for i in order[8:]]

    def measured() -> dict[str, Auc]:
        sets = [likelihoods(model, tokenizer, [("", t) for t in s], progress=False) for s in (taught, unseen)]
        return by_name(membership(sets[0], sets[1]))

    before = measured()
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = [torch.tensor([tokenizer(t)["input_ids"]]) for t in taught]
    for _ in range(15):
        for ids in batches:
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    after = measured()
    for name in ("loss", "min_k_20", "min_k_40"):
        assert after[name].value > max(0.9, before[name].value)
    assert before["loss"].check().passed is not False


def test_bad_input() -> None:
    with pytest.raises(NotEnoughDataError, match="7 forgotten and 9 unseen"):
        membership(sample(7, 0, 0), sample(9, 0, 1))
    with pytest.raises(InputError, match="resamples=10"):
        membership(sample(9, 0, 0), sample(9, 0, 1), resamples=10)
    with pytest.raises(NonFiniteError, match="'loss' is NaN or infinite"):
        membership([item([-math.inf])] * 8, sample(9, 0, 1))
