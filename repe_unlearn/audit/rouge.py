"""ROUGE-L: how much of a reference text another text repeats, in order; words as in the rouge-score package."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STEMMED_FROM = 4


@dataclass(frozen=True, slots=True)
class Rouge:
    """ROUGE-L of one text, each 0 to 1: shares of the longest common subsequence of words.

    Attributes:
        recall: share of the reference.
        precision: share of the candidate.
        f1: harmonic mean of the two.
    """

    recall: float
    precision: float
    f1: float


def rouge_l(reference: str, candidate: str, *, stem: Callable[[str], str] | None = None) -> Rouge:
    """Return ROUGE-L with the words of the rouge-score package: lower case, runs of a-z and 0-9.

    That rule is for English: it cuts words at letters such as é, and finds no word at all in other scripts.

    Args:
        reference: what should have been said.
        candidate: what was said.
        stem: makes words longer than three letters comparable. The reference code of TOFU passes a Porter stemmer
            (``nltk.stem.porter.PorterStemmer().stem``), that of MUSE none.

    Returns:
        Recall, precision and F1; all 0 where either text has no word.

    Example:
        >>> rouge_l("testing one two", "testing two").recall
        0.6666666666666666
    """
    a, b = _words(reference, stem), _words(candidate, stem)
    common = _longest_common(a, b)
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    return Rouge(common / len(a), common / len(b), 2 * common / (len(a) + len(b)))


def _words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return words if stem is None else [stem(w) if len(w) >= _STEMMED_FROM else w for w in words]


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
