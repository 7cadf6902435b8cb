"""Tries of one attack: what all of them ask, and which of them counts, so that trying often does not look like knowing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from repe_unlearn.answers import Answers
from repe_unlearn.audit.series import Series
from repe_unlearn.errors import NotEnoughDataError
from repe_unlearn.facts import Facts, Form, Question, Role

Key = TypeVar("Key")
_SHOWN: tuple[tuple[Role, str], ...] = (("forget", "to be forgotten"), ("decoy", "decoys"))


def strongest(tries: Mapping[Key, Answers]) -> Key:
    """Return the try with most right choices over all facts that it asked for, decoys included.

    The rule does not look at roles: exchange a fact that is to be forgotten for a decoy and it chooses the same. So in a
    model that knows neither, facts to be forgotten gain from the choice exactly as much as decoys, and their difference,
    which is what counts as a leak, gains nothing on average. Right choices are counted rather than margins averaged,
    because training makes a model surer of its wrong answers too; a tie goes to the higher mean margin, then to the
    earlier try.

    Args:
        tries: at least one; all asked the same questions.
    """

    def strength(key: Key) -> tuple[float, float]:
        tried = tries[key]
        return round(tried.mean(tried.chosen), 9), tried.mean(tried.margin)

    return max(tries, key=strength)


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
    """Return the mean margin of facts to be forgotten, and of decoys if there are any, in every try.

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
            y=tuple(one.mean(one.margin, role) for one in tries.values()),
            y_label="mean margin (nats)",
            **options,
        )
        for role, label in _SHOWN
        if first.per_fact(first.margin, role)
    )
