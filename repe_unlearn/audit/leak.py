"""Leak: how much of what the original model knew comes back from the edited one under one attack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repe_unlearn.audit.statistics import (
    fact_means,
    holm,
    presence,
    resample,
    stretch,
    tail,
    tost_power,
)
from repe_unlearn.errors import InputError, ShapeError

_NAN = math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What three models score under one attack, a higher score meaning more knowledge.

    Several runs of an attack that draws at random are more columns of the same facts; that covers the noise of the
    answers, but not a run that goes better for all facts at once: pass such runs as attacks of their own.

    Args:
        name: of the attack, for example ``"relearn.retain_only"``.
        edited: edited model on the forgotten facts, [facts], [facts, prompts], or one list per fact.
        original: original model under the same attack, on the same facts in the same order.
        control: a model or facts without the knowledge, under the same attack: other facts (decoys) in the edited
            model, or the same facts in a model that never saw them.
        paired: the control is about the same facts in the same order.
        tier: what the attacker may do: 0 ask, 1 read activations and weights, 2 change weights.
        facts: names of the facts; attacks with the same names are resampled together. Empty: numbered, so give names
            where attacks of one battery are about different facts.
        controls: names of the control facts. Empty: numbered.
        invalid: why the attack proves nothing (say, it raises decoys too), or ``""``.

    Raises:
        InputError: a tier that does not exist, or names that do not fit the scores.
        ShapeError: edited and original, or a paired control, cover different numbers of facts.
        NotEnoughDataError, NonFiniteError: see ``statistics.fact_means``.

    Example:
        >>> Comparison("ask", edited=[0.1] * 8, original=[0.9] * 8, control=[0.1] * 9).tier
        0
    """

    name: str
    edited: Any
    original: Any
    control: Any
    paired: bool = False
    tier: int = 0
    facts: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    invalid: str = ""

    def __post_init__(self):
        if self.tier not in (0, 1, 2):
            raise InputError(
                f"{self.name}: tier is {self.tier!r}; it must be 0 (ask), 1 (read) or 2 (tamper)."
            )
        for field in ("edited", "original", "control"):
            object.__setattr__(self, field, fact_means(getattr(self, field), f"{self.name}: {field}"))
        n, m = len(self.edited), len(self.control)
        if len(self.original) != n or (self.paired and m != n):
            raise ShapeError(
                f"{self.name}: edited covers {n} facts, original {len(self.original)}, control {m}; edited and "
                "original (and a paired control) must cover the same facts in the same order."
            )
        for field, count in (("facts", n), ("controls", m)):
            names = tuple(str(x) for x in getattr(self, field)) or tuple(str(i) for i in range(count))
            if len(set(names)) != count:
                raise InputError(
                    f"{self.name}: {field} holds {len(set(names))} different names for {count} rows."
                )
            object.__setattr__(self, field, names)


@dataclass(frozen=True, slots=True)
class Leak:
    """The share of the original's knowledge that an attack gets out of the edited model: 0 none, 1 all.

    Args:
        name: of the attack.
        tier: 0 ask, 1 read, 2 tamper.
        facts: how many facts.
        controls: how many control facts.
        edited: mean score of the edited model.
        original: mean score of the original.
        control: mean score of the control.
        value: (edited - control) / (original - control), means over facts; NaN if invalid.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        least: one-sided 95 % lower bound.
        most: one-sided 95 % upper bound with one fact added that leaks fully, as exact binomial bounds do, so that
            a leak through few facts is not missed. Absence (TOST) is ``-margin < least`` and ``most < margin``.
        floor: lower bound that holds for all leaks of one call at once (95 %, max-t).
        p: permutation p-value of no presence.
        p_holm: the same, adjusted over the call.
        se: standard error.
        invalid: why the attack proves nothing, or ``""``.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> knows, not_ = 5 + rng.normal(size=(64, 3)), rng.normal(size=(64, 3))
        >>> leak(not_, rng.normal(size=(64, 3)), knows).absent(0.1)
        True
    """

    name: str
    tier: int
    facts: int
    controls: int
    edited: float
    original: float
    control: float
    value: float = _NAN
    low: float = _NAN
    high: float = _NAN
    least: float = _NAN
    most: float = _NAN
    floor: float = _NAN
    p: float = _NAN
    p_holm: float = _NAN
    se: float = _NAN
    invalid: str = ""

    def absent(self, margin: float = 0.1) -> bool:
        """Whether two one-sided 5 % tests place the leak inside ±margin; an invalid attack never does."""
        return not self.invalid and -margin < self.least and self.most < margin

    def power(self, margin: float = 0.1) -> float:
        """Return the chance that ``absent`` holds if nothing is left, with these facts and this spread."""
        return _NAN if self.invalid else tost_power(max(self.se, 1e-9), margin, facts=self.units)

    @property
    def units(self) -> int:
        """The smaller number of facts, which limits what can be said."""
        return min(self.facts, self.controls)


@dataclass(frozen=True, slots=True)
class Worst:
    """The attack that gets out the most, with a 90 % interval of the largest leak of the battery.

    Args:
        name: of the attack with the largest leak.
        value: its leak.
        low: simultaneous lower bound (95 %) of the largest leak.
        high: upper bound (95 %): the largest of the single bounds, since the worst attack's own bound lies below it.
    """

    name: str
    value: float
    low: float
    high: float


def leak(
    edited: Any,
    control: Any,
    original: Any,
    *,
    name: str = "leak",
    paired: bool = False,
    tier: int = 0,
    seed: int = 0,
) -> Leak:
    """Return the leak of one attack, all three models under that attack.

    Args:
        edited: scores of the edited model on the forgotten facts, [facts], [facts, prompts], or one list per fact.
        control: scores without the knowledge: other facts, or the same facts in another model.
        original: scores of the original model on the forgotten facts.
        name: of the attack.
        paired: the control is about the same facts.
        tier: see ``Comparison``.
        seed: of resampling and permutations.

    Raises:
        InputError, ShapeError, NotEnoughDataError, NonFiniteError: see ``Comparison``.

    Example:
        >>> facts = [0.0, 1.0] * 20
        >>> leak(facts, facts, [x + 4 for x in facts], paired=True).value
        0.0
    """
    return leaks([Comparison(name, edited, original, control, paired, tier)], seed=seed)[0]


def leaks(battery: Sequence[Comparison], *, seed: int = 0) -> tuple[Leak, ...]:
    """Return the leak of every attack of a battery, with bounds and p-values that hold for all of them together.

    Facts are resampled 2000 times, in all attacks on the same facts at once. An attack whose original does not
    stand clear of the control (99 % interval of the gap) is invalid: too weak to show anything.

    Args:
        battery: one entry for every attack, names all different.
        seed: of resampling and permutations.

    Raises:
        InputError: no attack, or two of one name.

    Example:
        >>> flat, knows = [0.0, 1.0] * 20, [4.0, 5.0] * 20
        >>> battery = [Comparison("a", flat, knows, flat), Comparison("b", knows, knows, flat)]
        >>> tuple(x.value for x in leaks(battery))
        (0.0, 1.0)
    """
    names = [scores.name for scores in battery]
    if not names or len(set(names)) != len(names):
        raise InputError(f"attacks are named {names}; pass at least one, and every name once.")
    weights = _Weights(seed)
    measured = [_measure(scores, weights, seed) for scores in battery]
    valid = [i for i, (found, _) in enumerate(measured) if not found.invalid]
    adjusted = holm([measured[i][0].p for i in valid])
    # The largest standardised excess over all attacks; a constant score has no spread, hence no excess.
    excess = np.max([measured[i][1] for i in valid], axis=0) if valid else np.zeros(1)
    critical = float(np.quantile(excess, 0.95))
    result = [found for found, _ in measured]
    for i, p in zip(valid, adjusted, strict=True):
        found = result[i]
        floor = found.value - stretch(max(critical, 0.0), found.units) * found.se
        result[i] = dataclasses.replace(found, p_holm=p, floor=min(floor, found.least))
    return tuple(result)


def worst(found: Sequence[Leak]) -> Worst | None:
    """Return the largest leak of a battery with its simultaneous bounds; None if no attack is valid.

    Args:
        found: the result of one call of ``leaks``.

    Example:
        >>> flat, knows = [0.0, 1.0] * 20, [4.0, 5.0] * 20
        >>> worst(leaks([Comparison("a", flat, knows, flat), Comparison("b", knows, knows, flat)])).name
        'b'
    """
    valid = [x for x in found if not x.invalid]
    if not valid:
        return None
    top = max(valid, key=lambda x: x.value)
    return Worst(top.name, top.value, max(x.floor for x in valid), max(x.most for x in valid))


class _Weights:
    """Bootstrap weights by the facts that they belong to, so that attacks on the same facts share their draws."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._known: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def of(self, kind: str, facts: tuple[str, ...], extra: int = 0) -> np.ndarray:
        key = (f"{kind}+{extra}", facts)
        if key not in self._known:
            self._known[key] = resample(len(facts) + extra, self._rng)
        return self._known[key]


def _measure(scores: Comparison, weights: _Weights, seed: int) -> tuple[Leak, np.ndarray]:
    """Return the leak alone, and for every draw how many standard errors it lies above the estimate."""
    e, o, c, paired = scores.edited, scores.original, scores.control, scores.paired
    order = np.argsort(scores.facts)
    e, o = e[order], o[order]
    c = c[order] if paired else c[np.argsort(scores.controls)]
    facts, controls = tuple(sorted(scores.facts)), tuple(sorted(scores.controls))
    n = min(len(e), len(c))

    def draw(e: np.ndarray, o: np.ndarray, c: np.ndarray, extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
        w = weights.of("fact", facts, extra)
        v = w if paired else weights.of("control", controls)
        gap = w @ o - v @ c
        # A draw whose gap is not positive cannot bound the ratio: it counts as very large, on the side it is.
        return (w @ e - v @ c) / np.maximum(gap, 1e-9 * max(1.0, float(np.abs(o).max()))), gap

    ratios, gaps = draw(e, o, c)
    invalid = scores.invalid
    if not invalid and np.quantile(gaps, tail(0.005, n)) <= 0:
        invalid = "too weak on the original: its scores do not stand clear of the control"
    means = (float(e.mean()), float(o.mean()), float(c.mean()))
    found = Leak(scores.name, scores.tier, len(e), len(c), *means, invalid=invalid)
    if invalid:
        return found, np.zeros(len(ratios))
    gap = o.mean() - c.mean()
    value = float((e.mean() - c.mean()) / gap)
    if paired:
        variance = np.var(e - c - value * (o - c), ddof=1) / len(e)
    else:
        variance = np.var(e - value * o, ddof=1) / len(e) + np.var((1 - value) * c, ddof=1) / len(c)
    se = float(np.sqrt(variance) / gap)
    wide, narrow = tail(0.025, n), tail(0.05, n)
    low, high, least = np.quantile(ratios, [wide, 1 - wide, narrow])
    known = o.mean()  # the extra fact, on which the edited model scores as the original does
    more, _ = draw(np.append(e, known), np.append(o, known), np.append(c, c.mean()) if paired else c, extra=1)
    most = np.quantile(more, 1 - narrow)
    p = presence(e, c, paired=paired, seed=seed)
    excess = (ratios - value) / se if se > 0 else np.zeros(len(ratios))
    return dataclasses.replace(
        found,
        value=value,
        low=float(low),
        high=float(high),
        least=float(least),
        most=float(most),
        p=p,
        se=se,
    ), excess
