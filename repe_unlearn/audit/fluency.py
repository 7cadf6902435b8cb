"""Fluency: whether generated text still varies, or has fallen into repeating itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from repe_unlearn.errors import InputError


def ngram_entropy(text: str) -> float:
    """Return the weighted entropy of the 2- and 3-grams of words, in bits: ``(2/3·H2 + 4/3·H3) / 2``.

    The formula of RWKU (there taken from ROME); published values differ slightly because they split words with NLTK,
    here a word is a run of letters and digits, and every other visible character stands for itself. The value grows with
    the length of the text: compare texts of the same number of tokens.

    Args:
        text: generated text.

    Returns:
        Bits, >= 0; 0 where the text has fewer than three words, or only repeats one.

    Example:
        >>> ngram_entropy("la la la la")
        0.0
    """
    words = _words(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def repetition(text: str, n: int = 4) -> float:
    """Return the share of n-grams of words that were there before, 0 to 1.

    Args:
        text: generated text.
        n: words per n-gram, >= 1.

    Returns:
        0 where no n-gram repeats, or where the text has fewer than n words.

    Raises:
        InputError: n < 1.

    Example:
        >>> repetition("a b a b a b", n=2)
        0.6
    """
    if n < 1:
        raise InputError(f"got n={n}; an n-gram has at least one word.")
    grams = _grams(_words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _entropy(words: Sequence[str], n: int) -> float:
    counts = np.array(list(Counter(_grams(words, n)).values()), dtype=float)
    shares = counts / counts.sum()
    return float((shares * -np.log2(shares)).sum())  # an empty sum is 0
