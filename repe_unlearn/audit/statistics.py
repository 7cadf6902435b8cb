"""Statistics of an audit whose unit is the fact: resampling, intervals, permutation tests, Holm, power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError

RESAMPLES = 2000
PERMUTATIONS = 9999
FEWEST = 8  # facts; below, resampling says nothing

_NORMAL = NormalDist()


def fact_means(scores: Any, what: str = "scores") -> np.ndarray:
    """Return one score per fact, the mean over its prompts, so that every fact counts alike.

    Prompts of one fact are not independent: nothing after this function sees them, which makes every resampling
    here a cluster bootstrap over facts.

    Args:
        scores: array or tensor [facts] or [facts, prompts] (NaN for a prompt that a fact lacks), or one list per fact.
        what: name for errors.

    Returns:
        Float64 array [facts].

    Raises:
        ShapeError: neither of the shapes above.
        NotEnoughDataError: fewer than 8 facts, or a fact without any score.
        NonFiniteError: a score is infinite.

    Example:
        >>> tuple(fact_means([[1.0, 0.0], [1.0], [0.0, 0.0]] * 3).tolist()[:3])
        (0.5, 1.0, 0.0)
    """
    try:
        table = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        rows = [np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in scores]
        table = np.full((len(rows), max(row.size for row in rows)), np.nan)
        for row, place in zip(rows, table, strict=True):
            place[: row.size] = row
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2:
        raise ShapeError(f"{what} has shape {table.shape}; it must be [facts] or [facts, prompts].")
    if len(table) < FEWEST:
        raise NotEnoughDataError(
            f"{what} covers {len(table)} facts; at least {FEWEST} are needed. Add facts, not prompts."
        )
    if np.isinf(table).any():
        raise NonFiniteError(f"{what} holds infinite values; clip log-probabilities before the audit.")
    counts = (~np.isnan(table)).sum(1)
    if not counts.all():
        raise NotEnoughDataError(
            f"{what}: fact {int(np.argmin(counts))} has no score at all. Drop the fact from every model."
        )
    return np.nansum(table, 1) / counts


def resample(n: int, rng: np.random.Generator, draws: int = RESAMPLES) -> np.ndarray:
    """Return bootstrap weights [draws, n]: how often each fact was drawn, as shares that sum to 1."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws) / n


def tail(alpha: float, n: int) -> float:
    """Return the tail of the bootstrap distribution that stands for a true tail of ``alpha`` with n units.

    The bootstrap variance lacks the factor n / (n - 1), and its quantiles are those of a normal, not of a t
    distribution; a tail that is smaller by just that much repairs the coverage for few facts.
    """
    return _NORMAL.cdf(-stretch(_NORMAL.inv_cdf(1 - alpha), n))


def stretch(z: float, n: int) -> float:
    """Return the critical value for n units that stands for the normal critical value z."""
    from scipy.special import stdtrit

    return math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, _NORMAL.cdf(z)))


def mean_interval(values: Any, *, seed: int = 0) -> tuple[float, float, float]:
    """Return (mean, low, high): the 95 % bootstrap interval over units, with tails widened for few units.

    Args:
        values: array [units] or [units, prompts]; a unit is what is independent (a fact, a document).
        seed: of the resampling.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError: see ``fact_means``.

    Example:
        >>> value, low, high = mean_interval([0.0, 1.0] * 20)
        >>> round(value, 2), round(low, 1), round(high, 1)
        (0.5, 0.3, 0.7)
    """
    means = fact_means(values, "values")
    n = len(means)
    draws = resample(n, np.random.default_rng(seed)) @ means
    edge = tail(0.025, n)
    low, high = np.quantile(draws, [edge, 1 - edge])
    return float(means.mean()), float(low), float(high)


def presence(edited: Any, control: Any, *, paired: bool, seed: int = 0) -> float:
    """Return the one-sided p-value that the edited model scores no higher than the control.

    Paired: the sign of every fact's difference is flipped. Unpaired: the labels of facts and control facts are
    permuted, with Welch's t as the statistic, since the two sets may differ in spread. Every permutation is tried
    when there are at most 9999, otherwise 9999 are drawn; the p-value is never 0.

    Args:
        edited: scores of the edited model [facts] or [facts, prompts].
        control: scores of the control; the same facts in the same order if ``paired``.
        paired: whether the two are about the same facts.
        seed: of the drawn permutations.

    Raises:
        ShapeError: paired scores that cover different numbers of facts, or see ``fact_means``.
        NotEnoughDataError, NonFiniteError: see ``fact_means``.

    Example:
        >>> presence([1.0] * 8, [0.0] * 8, paired=True)
        0.00390625
    """
    from scipy.stats import permutation_test

    e, c = fact_means(edited, "edited"), fact_means(control, "control")
    if paired and len(e) != len(c):
        raise ShapeError(f"{len(e)} edited and {len(c)} control facts cannot be paired; pass paired=False.")
    result = permutation_test(
        (e, c),
        _difference if paired else _welch,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=1000,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(x, axis) - np.mean(y, axis)


def _welch(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    error = np.sqrt(np.var(x, axis, ddof=1) / x.shape[axis] + np.var(y, axis, ddof=1) / y.shape[axis])
    return _difference(x, y, axis) / np.maximum(error, 1e-12)


def holm(p: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted by Holm: a battery that calls those <= 0.05 errs at all in at most 5 % of audits.

    Example:
        >>> tuple(round(x, 3) for x in holm([0.01, 0.04, 0.03]))
        (0.03, 0.06, 0.06)
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return tuple(float(x) for x in adjusted)


def tost_power(se: float, margin: float = 0.1, *, facts: int | None = None, true: float = 0.0) -> float:
    """Return the chance that two one-sided 5 % tests place a leak inside ±margin.

    Args:
        se: standard error of the leak, in the same unit as ``margin``.
        margin: half-width of the range that counts as none, > 0.
        facts: how many facts; then the critical value is that of the t distribution, and the upper test carries
            the one extra fact that ``Leak.most`` does. None: the textbook formula with normal quantiles.
        true: the true leak.

    Raises:
        InputError: ``se`` or ``margin`` is not a positive finite number.

    Example:
        >>> round(tost_power(0.433 * (2 / 321) ** 0.5), 2)  # two arms of 321 answers at chance 0.25
        0.8
    """
    _positive(se=se, margin=margin)
    if facts is None:
        critical, shift, wider = _NORMAL.inv_cdf(0.95), 0.0, se
    else:
        critical, shift = stretch(_NORMAL.inv_cdf(0.95), facts), (1 - true) / (facts + 1)
        wider = math.hypot(se * facts / (facts + 1), math.sqrt(facts / (facts + 1) ** 3))
    upper = _NORMAL.cdf((margin - true - shift - critical * wider) / se)
    lower = _NORMAL.cdf((margin + true - critical * se) / se)
    return max(0.0, upper + lower - 1)


def facts_needed(sd: float, margin: float = 0.1, power: float = 0.8) -> int:
    """Return the fewest facts with which ``tost_power`` reaches ``power`` if nothing is left.

    Args:
        sd: standard deviation over facts of the leak, that is ``leak.se * sqrt(leak.facts)``, > 0.
        margin: see ``tost_power``.
        power: wanted chance, between 0 and 1.

    Raises:
        InputError: a number out of range.

    Example:
        >>> facts_needed(0.25) < facts_needed(0.5)
        True
    """
    _positive(sd=sd, margin=margin)
    if not 0 < power < 1:
        raise InputError(f"power is {power}; it must lie between 0 and 1, for example 0.8.")
    low, high = FEWEST - 1, FEWEST
    while tost_power(sd / math.sqrt(high), margin, facts=high) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = tost_power(sd / math.sqrt(middle), margin, facts=middle) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def detectable(se: float, facts: int, power: float = 0.8) -> float:
    """Return the smallest true leak that one 5 % test tells from none with the given chance.

    Args:
        se: standard error of the leak, > 0.
        facts: how many facts.
        power: wanted chance.

    Raises:
        InputError: a number out of range.

    Example:
        >>> round(detectable(0.05, 64), 2)
        0.13
    """
    _positive(se=se)
    if not 0 < power < 1:
        raise InputError(f"power is {power}; it must lie between 0 and 1, for example 0.8.")
    return se * (stretch(_NORMAL.inv_cdf(0.95), facts) + _NORMAL.inv_cdf(power))


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}; it must be a positive number.")
