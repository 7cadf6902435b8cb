"""Membership: can forgotten texts be told from unseen ones by how the model scores them, in either direction?"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from repe_unlearn.audit.check import Check
from repe_unlearn.audit.likelihoods import Likelihood
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError

Attack: TypeAlias = Callable[[Likelihood], float]

_LEAST = 8
_FLOOR = 1e-6  # of a variance, as in the reference code: a certain token has none


def loss(item: Likelihood) -> float:
    """Return the mean log-probability per token; like all scores here, higher where the text looks more familiar."""
    return -item.nll


def zlib_ratio(item: Likelihood) -> float:
    """Return the mean log-probability per token over the size of the compressed text in bytes."""
    return loss(item) / len(zlib.compress(item.text.encode()))


def min_k(item: Likelihood, share: float) -> float:
    """Return the mean log-probability of the least probable tokens.

    Args:
        item: a text.
        share: of the tokens that count, > 0 to 1; rounded down, at least one token.

    Raises:
        InputError: a share outside its range.

    Example:
        ``min_k(likelihoods(model, tokenizer, [("", text)])[0], 0.2)``
    """
    return _lowest(item.log_probs, share)


def min_k_plus(item: Likelihood, share: float) -> float:
    """Return Min-K++: as ``min_k``, of log-probabilities standardised by the next-token distribution.

    Args:
        item: a text.
        share: of the tokens that count, > 0 to 1; rounded down, at least one token.

    Raises:
        InputError: a share outside its range.

    Example:
        ``min_k_plus(likelihoods(model, tokenizer, [("", text)])[0], 0.2)``
    """
    spread = item.variance.clamp_min(_FLOOR).sqrt()
    return _lowest((item.log_probs - item.expected) / spread, share)


ATTACKS: Mapping[str, Attack] = {
    "loss": loss,
    "zlib": zlib_ratio,
    "min_k_20": lambda item: min_k(item, 0.2),
    "min_k_40": lambda item: min_k(item, 0.4),
    "min_k_plus_20": lambda item: min_k_plus(item, 0.2),
    "min_k_plus_40": lambda item: min_k_plus(item, 0.4),
}
"""Scores of one text that need no other model."""


@dataclass(frozen=True, slots=True)
class Auc:
    """How well one score tells forgotten texts from unseen ones.

    Attributes:
        name: of the score.
        value: probability that a forgotten text scores higher (more familiar) than an unseen one, ties half; 1 is a
            model that still knows the texts, 0 one that shuns them, and both give them away.
        low, high: 95 % percentile bootstrap over texts of both sets. At a value of exactly 0 or 1 it has no width.
        forgotten, unseen: numbers of texts.
    """

    name: str
    value: float
    low: float
    high: float
    forgotten: int
    unseen: int

    @property
    def gap(self) -> float:
        """Distance from 0.5, 0 to 0.5: what an attacker gains who may choose the direction."""
        return abs(self.value - 0.5)

    def check(self, *, width: float = 0.1, control: float | None = None) -> Check:
        """Return a two-sided check: passed where the whole interval lies within 0.5 ± width, failed where none does.

        In between nothing is decided, and the check is for information: more texts are needed.

        Args:
            width: half-width of the range that counts as chance, between 0 and 0.5.
            control: the AUC of the untouched model, or of a gold model, for the same texts. The sets may differ by
                themselves (topic, date, length); then the gold model is not at 0.5 either.

        Raises:
            InputError: a width outside its range.
        """
        if not 0 < width < 0.5:
            raise InputError(f"got width={width}; needed more than 0 and less than 0.5.")
        inside = self.low >= 0.5 - width and self.high <= 0.5 + width
        outside = self.high < 0.5 - width or self.low > 0.5 + width
        side = "like training data" if self.value > 0.5 else "unlike unseen text (over-erased)"
        words = {
            True: "Forgotten texts cannot be told from unseen ones.",
            False: f"Forgotten texts look {side}.",
            None: f"Undecided with {self.forgotten} and {self.unseen} texts: the interval crosses the bound.",
        }
        passed = True if inside else False if outside else None
        return Check(
            f"membership.{self.name}",
            self.value,
            f"interval within 0.5 ± {width:g}",
            passed,
            control,
            self.low,
            self.high,
            note=words[passed],
        )


def membership(
    forgotten: Sequence[Likelihood],
    unseen: Sequence[Likelihood],
    *,
    reference: tuple[Sequence[Likelihood], Sequence[Likelihood]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Auc, ...]:
    """Return how well every attack tells forgotten from unseen texts, with intervals over texts.

    Read the values in both directions: an edit that pushes the texts below anything unseen hides nothing.

    Args:
        forgotten: likelihoods of at least 8 texts of the forget set, from ``likelihoods``.
        unseen: likelihoods of at least 8 texts of the same kind that were never trained on.
        reference: likelihoods of the same texts (forgotten, unseen) under another model; adds the attack "reference",
            the difference of the mean log-probabilities.
        resamples: of the bootstrap, >= 100.
        seed: of the bootstrap.

    Returns:
        One ``Auc`` per attack: loss, zlib, Min-K and Min-K++ (20 and 40 %), then the reference.

    Raises:
        NotEnoughDataError: fewer than 8 texts in a set.
        InputError: a reference with other texts, or too few resamples.
        NonFiniteError: a score is NaN or infinite.

    Example:
        ``[auc.check() for auc in membership(likelihoods(model, tokenizer, a), likelihoods(model, tokenizer, b))]``
    """
    if min(len(forgotten), len(unseen)) < _LEAST:
        raise NotEnoughDataError(
            f"got {len(forgotten)} forgotten and {len(unseen)} unseen texts; needed at least {_LEAST} of each."
        )
    if resamples < 100:
        raise InputError(f"got resamples={resamples}; needed at least 100 for a 95 % interval.")
    scores = {name: ([f(a) for a in forgotten], [f(b) for b in unseen]) for name, f in ATTACKS.items()}
    if reference is not None:
        scores["reference"] = (_differences(forgotten, reference[0]), _differences(unseen, reference[1]))
    return tuple(_measured(name, *pair, resamples, seed) for name, pair in scores.items())


def auc(members: ArrayLike, others: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Return the probability that a member scores higher than another one, ties counted half.

    Args:
        members: ``[..., n]`` scores.
        others: ``[..., m]`` scores.
        axis: along which the items lie.

    Returns:
        ``[...]`` numbers from 0 to 1.

    Example:
        >>> float(auc([3.0, 1.0], [2.0, 0.0]))
        0.75
    """
    from scipy.stats import rankdata

    a, b = np.asarray(members, dtype=float), np.asarray(others, dtype=float)
    n, m = a.shape[axis], b.shape[axis]
    ranks = np.take(rankdata(np.concatenate([a, b], axis), axis=axis), range(n), axis)
    return (ranks.sum(axis) - n * (n + 1) / 2) / (n * m)


def _measured(name: str, a: Sequence[float], b: Sequence[float], resamples: int, seed: int) -> Auc:
    from scipy.stats import bootstrap

    if not all(map(math.isfinite, (*a, *b))):
        raise NonFiniteError(
            f"the score {name!r} is NaN or infinite for some text; look at its log-probabilities."
        )
    found = bootstrap(
        (a, b), auc, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed), batch=100
    )
    low, high = found.confidence_interval
    return Auc(name, float(auc(a, b)), float(low), float(high), len(a), len(b))


def _differences(items: Sequence[Likelihood], others: Sequence[Likelihood]) -> list[float]:
    if [item.text for item in items] != [other.text for other in others]:
        raise InputError(
            "the reference holds other texts, or another order; score the same pairs with both models."
        )
    return [loss(item) - loss(other) for item, other in zip(items, others, strict=True)]


def _lowest(values: torch.Tensor, share: float) -> float:
    if not 0 < share <= 1:
        raise InputError(f"got share={share}; needed more than 0 and at most 1.")
    return float(values.sort().values[: max(1, int(len(values) * share))].mean())
