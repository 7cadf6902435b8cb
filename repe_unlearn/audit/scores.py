"""Scores: what one model scores under one attack, fact by fact."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from repe_unlearn.audit.check import real
from repe_unlearn.audit.series import Series
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts, Role

Tier = Literal["T0", "T1", "T2"]
Unit = Literal["nats", "share"]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scores under one attack; every value is finite, a higher one means more knowledge.

    The attack has restored the model bit for bit. Compare a score only with scores of the same attack with the same
    settings.

    Args:
        attack: name, for example ``"behaviour.unseen"`` or ``"relearn.retain_only"``.
        tier: what the attacker may do: T0 ask, T1 read activations and weights, T2 change weights.
        values: index of the fact -> score; facts that the attack cannot ask for are left out.
        unit: nats (a margin) or share (0 to 1).
        curves: for the report, over layers or steps.
        facts: settings in words: seeds, steps, layers.

    Raises:
        InputError: a tier or unit that does not exist.
        NotEnoughDataError: no value.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> facts = Facts.of([("France", "Paris"), ("Japan", "Tokyo", "decoy")], ["The capital of {subject} is"])
        >>> Scores("ask", "T0", {0: 2.5, 1: 0.1}, "nats").of(facts, "forget").tolist()
        [2.5]
    """

    attack: str
    tier: Tier
    values: Mapping[int, float]
    unit: Unit
    curves: tuple[Series, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tier not in get_args(Tier) or self.unit not in get_args(Unit):
            raise InputError(
                f"{self.attack}: got tier {self.tier!r} and unit {self.unit!r}; needed T0, T1 or T2, and nats or share."
            )
        if not self.values:
            raise NotEnoughDataError(f"{self.attack}: there is no fact that this attack can ask for.")
        values = {int(i): real(v, f"{self.attack}: fact {i}") for i, v in sorted(self.values.items())}
        if bad := [i for i, v in values.items() if not math.isfinite(v)]:
            raise NonFiniteError(
                f"{self.attack}: the score of fact {bad[0]} is {values[bad[0]]} ({len(bad)} such); leave facts out that "
                "have no score, and load the model in float32 if its logits overflow."
            )
        object.__setattr__(self, "values", MappingProxyType(values))
        object.__setattr__(self, "curves", tuple(self.curves))
        object.__setattr__(self, "facts", MappingProxyType({k: str(v) for k, v in self.facts.items()}))

    def __reduce__(self) -> tuple[object, ...]:
        # A read-only mapping can be neither copied nor pickled.
        return Scores, (self.attack, self.tier, dict(self.values), self.unit, self.curves, dict(self.facts))

    def indices(self, facts: Facts, *roles: Role) -> list[int]:
        """Return the indices of the facts with these roles (default all) that have a score, in order."""
        return [i for i, fact in enumerate(facts) if i in self.values and (not roles or fact.role in roles)]

    def of(self, facts: Facts, *roles: Role) -> np.ndarray:
        """Return the scores of the facts with these roles (default all) in the order of the facts, float64 [n].

        Raises:
            NotEnoughDataError: none of them has a score.
        """
        found = self.indices(facts, *roles)
        if not found:
            raise NotEnoughDataError(f"{self.attack}: no fact with the role {', '.join(roles)} has a score.")
        return np.array([self.values[i] for i in found])

    def __repr__(self) -> str:
        mean = float(np.mean(list(self.values.values())))
        return f"Scores({self.attack!r}, {self.tier}, {len(self.values)} facts, mean {mean:.3g} {self.unit})"


Table: TypeAlias = Mapping[int, Mapping[int, float]]
"""Choice (a layer, a number of steps) -> index of the fact -> score."""


def crossfit(table: Table, facts: Facts, *, seed: int = 0) -> tuple[dict[int, float], tuple[int, int]]:
    """Return scores under the strongest choice, such that choosing alone cannot make a leak.

    Subjects are dealt to two halves, role by role. Each half is scored under the choice that is strongest on the *other*
    half: where forgotten facts stand clearest of decoys (difference of means over its standard error; without decoys, of
    0). So what chance favours in one half is not what is scored, forgotten facts and decoys of a half share one choice,
    and the rule is the same for every model: where nothing is known, forgotten facts and decoys score alike on average,
    however many choices there are.

    Args:
        table: choice -> fact -> score; every choice scores the same facts.
        facts: the facts.
        seed: of the halves.

    Returns:
        Fact -> score, and the choices of the first and the second half.

    Raises:
        NotEnoughDataError: no choice.
    """
    if not table:
        raise NotEnoughDataError("there is nothing to choose from; give at least one layer.")
    scored = sorted(next(iter(table.values())))
    half = halves(scored, facts, seed)
    picked = tuple(
        max(
            table, key=lambda choice: _clearness(table[choice], facts, [i for i in scored if half[i] != side])
        )
        for side in (0, 1)
    )
    return {i: table[picked[half[i]]][i] for i in scored}, (picked[0], picked[1])


def halves(indices: Sequence[int], facts: Facts, seed: int) -> dict[int, int]:
    """Return fact -> 0 or 1; facts of one subject are in one half, and each role is dealt out evenly."""
    rng, side = random.Random(seed), dict[str, int]()
    for role in facts.roles:
        subjects = sorted(
            {facts.facts[i].subject for i in indices if facts.facts[i].role == role} - set(side)
        )
        rng.shuffle(subjects)
        side |= {subject: k % 2 for k, subject in enumerate(subjects)}
    return {i: side[facts.facts[i].subject] for i in indices}


def _clearness(scores: Mapping[int, float], facts: Facts, indices: Sequence[int]) -> float:
    forget, decoy = (
        np.array([scores[i] for i in indices if facts.facts[i].role == role]) for role in ("forget", "decoy")
    )
    if not len(forget):
        return 0.0
    gap = forget.mean() - (decoy.mean() if len(decoy) else 0.0)
    variance = forget.var() / len(forget) + (decoy.var() / len(decoy) if len(decoy) else 0.0)
    return float(gap / max(math.sqrt(variance), 1e-9))


def curves(table: Table, facts: Facts, figure: str, *, panel: str = "", **text: Any) -> tuple[Series, ...]:
    """Return one curve per role: mean over facts by choice, with 95 % intervals (normal, over facts).

    Args:
        table: choice -> fact -> score.
        facts: the facts.
        figure: title of the figure.
        panel: small multiple within it.
        text: further fields of ``Series``: labels of the axes, chance, caption.
    """
    found = []
    for role in facts.roles:
        rows = [
            np.array([v for i, v in table[choice].items() if facts.facts[i].role == role]) for choice in table
        ]
        if not all(map(len, rows)):
            continue
        mean = [float(row.mean()) for row in rows]
        half = [1.96 * float(row.std(ddof=1)) / len(row) ** 0.5 if len(row) > 1 else 0.0 for row in rows]
        low, high = (tuple(m + sign * h for m, h in zip(mean, half, strict=True)) for sign in (-1, 1))
        found.append(Series(figure, role, tuple(table), tuple(mean), low, high, panel=panel, **text))
    return tuple(found)
