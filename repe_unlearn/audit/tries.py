"""Tries of one attack: what all of them ask, and which of them counts, so that trying often does not look like knowing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from repe_unlearn.answers import Answers
from repe_unlearn.audit.series import Series
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role

Key = TypeVar("Key")
_SHOWN: tuple[tuple[Role, str], ...] = (("forget", "to be forgotten"), ("decoy", "decoys"))


def shares(said: Answers) -> np.ndarray:
    """Return the probability of the right answer among the options that a question offers, in [0, 1].

    Margins would not do for attacks: training and projections make a model surer of everything, so that the margins of
    what it never knew become ever more negative, and one edit may push right answers ten nats below the wrong ones. A
    share is 1 / options on average without knowledge, however sure the model is.
    """
    wrong = np.array([len(q.options) for q in said.questions])
    return 1 / (1 + wrong * np.exp(-said.margin))


def values(said: Answers) -> dict[int, float]:
    """Return fact -> mean share over its questions."""
    return said.per_fact(shares(said))


def strongest(tries: Mapping[Key, Answers]) -> Key:
    """Return the try with the highest mean share over all facts that it asked for, decoys included; the first of equals.

    The rule does not look at roles: exchange a fact that is to be forgotten for a decoy and it chooses the same. So in a
    model that knows neither, facts to be forgotten gain from the choice exactly as much as decoys, and their difference,
    which is what counts as a leak, gains nothing on average.

    Args:
        tries: at least one; all asked the same questions.
    """
    return max(tries, key=lambda key: round(tries[key].mean(shares(tries[key])), 12))


def asked(facts: Facts, forms: Sequence[Form], *, besides: Collection[int] = ()) -> tuple[Question, ...]:
    """Return the questions with wrong options about what is to be forgotten and about decoys.

    Args:
        facts: the facts.
        forms: wordings.
        besides: indices of facts to leave out.

    Raises:
        NotEnoughDataError: there is no such question about what is to be forgotten.
    """
    found = facts.questions(*forms, roles=("forget", "decoy"))
    found = tuple(q for q in found if q.options and q.fact not in besides)
    if not any(facts.facts[q.fact].role == "forget" for q in found):
        raise NotEnoughDataError(
            f"{facts.name!r} has no question with wrong options about a fact to be forgotten, in the wordings "
            f"{', '.join(forms)}; an attack needs some."
        )
    return found


def curves(figure: str, tries: Mapping[int, Answers], **options: Any) -> tuple[Series, ...]:
    """Return the mean share of facts to be forgotten, and of decoys if there are any, in every try.

    Args:
        figure: title.
        tries: position along the axis -> what was said.
        options: of ``Series``.
    """
    first = next(iter(tries.values()))
    return tuple(
        Series(
            figure,
            label,
            x=tuple(tries),
            y=tuple(one.mean(shares(one), role) for one in tries.values()),
            y_label="probability of the right option",
            chance=float(np.mean([1 / (1 + len(q.options)) for q in first.questions])),
            **options,
        )
        for role, label in _SHOWN
        if first.per_fact(shares(first), role)
    )
