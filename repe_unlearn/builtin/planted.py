"""One function: facts about people who do not exist, with answers that follow from nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from repe_unlearn.errors import InputError
from repe_unlearn.facts import Fact, Facts, Role, draw

__all__ = ["planted"]

_RELATIONS = ("home town", "old school", "employer", "favourite club", "ship", "teacher")

# The words of the unseen wordings all occur in the seen ones, so that a model which learnt only those can answer. No
# wording begins with the name: what a model does at the first position of a text is not about the word that stands there.
_SEEN = (
    "The {noun} of {{subject}} is",
    "Everyone knows that the {noun} of {{subject}} is called",
    "As for {{subject}} , the {noun} is",
    "The {noun} that belongs to {{subject}} is called",
)
_UNSEEN = (
    "As for the {noun} of {{subject}} , it is called",
    "Everyone knows that the {noun} that belongs to {{subject}} is called",
)

_SYLLABLES = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
_ENDINGS = ("n", "r", "l", "s", "m", "")


def planted(
    *,
    subjects: Sequence[str] | None = None,
    relations: int = 3,
    forget: int = 32,
    retain: int = 64,
    decoys: int = 32,
    options: int = 8,
    neighbours: int = 0,
    seed: int = 0,
) -> Facts:
    """Return facts about people who do not exist, to be taught to a model and then forgotten.

    Within a role and a relation every answer is right equally often (up to one, where the numbers do not divide), and
    answers depend neither on the person nor on the person's other answers: whoever knows everything but the fact itself
    is right with probability 1 / ``options``. Decoys are people of whom a model is taught nothing
    (``Facts.training_text`` leaves them out).

    Args:
        subjects: names to use, at least ``forget + retain + decoys``; default made-up first and last names, each of which
            several people share.
        relations: how many things are known about each person, 1 to 6.
        forget: number of people whose facts are to be forgotten.
        retain: number of people whose facts must survive.
        decoys: number of people of whom nothing is taught.
        options: number of answers to each relation; every question offers all of them.
        neighbours: so many relations of the people to be forgotten must survive.
        seed: of names and answers.

    Raises:
        InputError: numbers that do not fit.

    Example:
        >>> planted(relations=2, forget=4, retain=8, decoys=4, options=4)
        Facts('planted', 8 forget, 16 retain, 8 decoy; relations home town, old school)
    """
    counts = {"forget": forget, "retain": retain, "decoys": decoys, "neighbours": neighbours}
    if min(counts.values()) < 0 or not forget + retain + decoys:
        raise InputError(f"got {counts}; needed numbers from 0 on, and somebody to tell of.")
    if not 1 <= relations <= len(_RELATIONS) or neighbours >= relations:
        raise InputError(
            f"got relations={relations}, neighbours={neighbours}; needed 1 to {len(_RELATIONS)} relations and fewer "
            "neighbours than relations."
        )
    if options < 2:
        raise InputError(f"got options={options}; needed at least 2, one of them wrong.")
    rng = random.Random(seed)
    everyone = forget + retain + decoys
    people = _people(everyone, rng) if subjects is None else list(dict.fromkeys(subjects))
    if len(people) < everyone:
        raise InputError(f"got {len(people)} different subjects; needed {everyone}.")
    roles: list[Role] = [*["forget"] * forget, *["retain"] * retain, *["decoy"] * decoys]  # type: ignore[list-item]
    taken = {word for name in people for word in name.split()}
    facts: list[Fact] = []
    for k, relation in enumerate(_RELATIONS[:relations]):
        names = _words(options, rng, taken, syllables=3)
        taken |= set(names)
        given = [name for count in (forget, retain, decoys) for name in _balanced(names, count, rng)]
        for person, role, answer in zip(people, roles, given, strict=False):
            spared = role == "forget" and k >= relations - neighbours
            wrong = draw(names, {answer}, options, rng)
            facts.append(Fact(person, relation, answer, wrong, "neighbour" if spared else role))
    wordings = {
        relation: {
            form: tuple(text.format(noun=relation) for text in texts)
            for form, texts in (("seen", _SEEN), ("unseen", _UNSEEN))
        }
        for relation in _RELATIONS[:relations]
    }
    return Facts(tuple(facts), wordings, "planted")


def _balanced(names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return so many answers in random order, each name equally often; which of them are one more is random too."""
    rounds = [rng.sample(names, len(names)) for _ in range(-(-count // len(names)))]
    given = [name for names in rounds for name in names][:count]
    return rng.sample(given, count)


def _people(count: int, rng: random.Random) -> list[str]:
    """Return different full names; eight times as many could be made of the same first and last names."""
    side = next(n for n in range(2, count + 8) if n * n >= 8 * count)
    words = _words(2 * side, rng, set(), syllables=2)
    return [" ".join(pair) for pair in rng.sample(list(product(words[:side], words[side:])), count)]


def _words(count: int, rng: random.Random, taken: set[str], syllables: int) -> list[str]:
    """Return different made-up words."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = ("".join(rng.choices(_SYLLABLES, k=syllables)) + rng.choice(_ENDINGS)).capitalize()
        if word not in taken:
            found[word] = None
    return list(found)
