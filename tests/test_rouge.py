"""ROUGE-L and fluency against cases counted by hand, brute force, and rouge-score where it is installed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import scipy.stats

from repe_unlearn.audit.fluency import ngram_entropy, repetition
from repe_unlearn.audit.rouge import Rouge, rouge_l
from repe_unlearn.errors import InputError


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ("testing one two", "testing one", Rouge(2 / 3, 1.0, 4 / 5)),
        ("testing one two", "testing two", Rouge(2 / 3, 1.0, 4 / 5)),  # not consecutive
        ("1 2 3 4 5", "2 5 3 4", Rouge(3 / 5, 3 / 4, 2 / 3)),  # 2 3 4
        ("a b", "b a", Rouge(1 / 2, 1 / 2, 1 / 2)),  # order counts
        ("The Cat, sat!", "the cat sat", Rouge(1.0, 1.0, 1.0)),  # case and punctuation do not
        ("it's", "it s", Rouge(1.0, 1.0, 1.0)),
        ("a a a", "a", Rouge(1 / 3, 1.0, 1 / 2)),  # a word is used once
        ("one", "two", Rouge(0.0, 0.0, 0.0)),
        ("one", "", Rouge(0.0, 0.0, 0.0)),
        ("", "one", Rouge(0.0, 0.0, 0.0)),
        ("one", "/", Rouge(0.0, 0.0, 0.0)),
    ],
)
def test_by_hand(reference: str, candidate: str, expected: Rouge) -> None:
    found = rouge_l(reference, candidate)
    assert (found.recall, found.precision, found.f1) == pytest.approx(
        (expected.recall, expected.precision, expected.f1)
    )


def subsequences(words: list[str]) -> set[tuple[str, ...]]:
    return {c for n in range(len(words) + 1) for c in itertools.combinations(words, n)}


def test_against_every_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(60):
        a, b = (draw.choices("abc", k=draw.randint(1, 8)) for _ in range(2))
        longest = max(map(len, subsequences(a) & subsequences(b)))
        found = rouge_l(" ".join(a), " ".join(b))
        assert (found.recall, found.precision) == pytest.approx((longest / len(a), longest / len(b)))


def test_stemming_is_asked_for() -> None:
    def stem(word: str) -> str:
        return word.removesuffix("s")

    assert rouge_l("cats purr", "cat purr").recall == 0.5
    assert rouge_l("cats purr", "cat purr", stem=stem).recall == 1.0
    assert rouge_l("gas", "ga", stem=stem).recall == 0.0  # three letters: left alone


def test_against_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(1)
    words = ["Paris", "is", "the", "capital", "of", "France,", "it's", "1,000", "café", "don't", "—"]
    for _ in range(50):
        a, b = (" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(2))
        theirs, ours = scorer.score(a, b)["rougeL"], rouge_l(a, b)
        assert (ours.recall, ours.precision, ours.f1) == pytest.approx(
            (theirs.recall, theirs.precision, theirs.fmeasure)
        )


def test_entropy_by_hand_and_by_scipy() -> None:
    # a b c d: three bigrams and two trigrams, all different
    assert ngram_entropy("a b c d") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1) / 2)
    text = "the cat sat on the cat sat on a mat ."
    words = text.split()
    parts = [
        scipy.stats.entropy(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), base=2)
        for n in (2, 3)
    ]
    assert ngram_entropy(text) == pytest.approx((2 / 3 * parts[0] + 4 / 3 * parts[1]) / 2)
    assert ngram_entropy("") == ngram_entropy("one") == ngram_entropy("no no no no") == 0.0
    assert ngram_entropy("so it goes on") > ngram_entropy("so it so it so it")


def test_repetition_by_hand() -> None:
    assert repetition("a b c d e") == 0.0
    assert repetition("a b a b a b", n=2) == pytest.approx(1 - 2 / 5)
    assert repetition("go go go go go") == pytest.approx(1 - 1 / 2)
    assert repetition("too short") == 0.0
    with pytest.raises(InputError, match="n=0"):
        repetition("a", n=0)
