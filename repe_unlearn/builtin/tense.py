"""Minimal pairs on tense, the same sentence in the past and in the present, in a balanced factorial design.

Tense shows in main verbs and in several auxiliaries, and a model represents each a little differently. So that
a split by frames compares equal mixtures, form is not confounded with frame: every frame has exactly two main
verbs and one auxiliary, and the kind of auxiliary (`STATES`) and of subject (`PERSONS`) take turns within every
frame.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from repe_unlearn.builtin.blocks import Block, Verb
from repe_unlearn.builtin.generator import Filling, Forms, generate

if TYPE_CHECKING:
    from repe_unlearn.contrast import Contrast

__all__ = ["FRAMES", "PERSONS", "STATES", "tense"]

STATES: Mapping[str, Forms] = {
    "copula": ("was busy", "is busy"),
    "progressive": ("was waiting", "is waiting"),
    "perfect": ("had worked", "has worked"),
    "possession": ("had time", "has time"),
    "negation": ("did not help", "does not help"),
}
"""Levels of {state}: an auxiliary (past, present) and what goes with it, in the order of the classes."""

PERSONS: tuple[str, ...] = (*["occupation"] * 5, *["name"] * 2, "title", "new", "neighbor")
"""Levels of {person}, by weight."""

# No word but {acts}, {also} and {state} tells the tense, and at least four neutral words follow the last verb.
FRAMES: tuple[str, ...] = (
    # the auxiliary first
    "Because {other} {state}, {person} {acts} and {also} {place}.",
    "Although {other} {state}, {person} {acts} and {also} {place} {time}.",
    "Since {other} {state}, {person} {acts} {place} and {also} without much noise.",
    "Whenever {other} {state}, {person} {acts} {time} and {also} {place}.",
    "{other} {state}, so {person} {acts} and {also} {place} for free.",
    "{other} {state}, but {person} {acts} and {also} {place} {time}.",
    "{other} {state}, and {person}, as always, {acts} and {also} {place}.",
    "{time}, {other} {state} while {person} {acts} and {also} {place}.",
    "{place}, {other} {state}, and {person} {acts} and {also} with great care.",
    "As {other} {state}, {person} first {acts} and then {also} {place}.",
    "If {other} {state}, {person} {acts} or {also} {place} {time}.",
    "Even when {other} {state}, {person} {acts} and {also} {place}.",
    "According to the letter, {other} {state}, so {person} {acts} and {also} {place}.",
    "In this story, {other} {state}, and {person} {acts} and {also} {place}.",
    "In the second chapter, {other} {state}, {person} {acts}, and somebody else {also} {place}.",
    "As long as {other} {state}, {person} {acts} and {also} {place} in peace.",
    "Wherever {other} {state}, {person} {acts} and {also} with great care.",
    "No matter whether {other} {state}, {person} {acts} and {also} {place}.",
    "Perhaps {other} {state}, but {person} still {acts} and {also} {place}.",
    "Not far from {other}, who {state}, {person} {acts} and {also} {place}.",
    "For {other}, who {state}, {person} {acts} and {also} {place} {time}.",
    "Next to {other}, who {state}, {person} {acts} and {also} without any help.",
    # the auxiliary in the middle
    "{person}, who {state}, {acts} and {also} {place} {time}.",
    "{person}, who {state} {place}, {acts} and {also} with great care.",
    "{person} {acts} and, because {other} {state}, {also} {place} as well.",
    "{person} {acts} and, although {other} {state}, {also} {place} {time}.",
    "{person} {acts} {place}, {other} {state}, and somebody else {also} in the meantime.",
    "{person} {acts}, {other} {state}, and somebody else {also} {place}.",
    "{person} {acts} more often if {other} {state}, and nobody {also} {place}.",
    "{person} {acts} {time} because {other} {state} and {also} {place}.",
    "{person} {acts} for {other}, who {state}, and {also} {place} {time}.",
    "Nobody but {person} {acts} when {other} {state}, and nobody {also} {place}.",
    "Anyone who {acts} {place} {state} when {person} {also} for the visitors.",
    # the auxiliary last
    "{person} {acts} and {also} because {other} {state} {place} {time}.",
    "{person} {acts} and {also}, although {other} {state} {place} {time}.",
    "{person} {acts} or {also} whenever {other} {state} {place} {time}.",
    "{time}, {person} {acts} and {also}, since {other} {state} {place} as well.",
    "{person} {acts} and {also}, but {other} {state} {place} without a break.",
    "{person} {acts} and {also}, and {other} {state} {place} for a while.",
    "{person} {acts} where {other} {also}, and somebody else {state} {place} {time}.",
    "Everybody who, like {person}, {acts} and {also} {state} {place} all year round.",
    "{person} often {acts} and rarely {also}, because {other} {state} {place} {time}.",
    "While {person} {acts} and {other} {also}, somebody else {state} {place} {time}.",
    "When {person} {acts}, {other} {also}, even if somebody else {state} {place} {time}.",
)
"""Sentence frames, one template each; all have the slots {acts}, {also} and {state} exactly once."""


def tense(*, pairs: int = 2048, seed: int = 0) -> Contrast:
    """Generate distinct minimal pairs of a sentence in two tenses, with the same verb forms in every frame.

    Args:
        pairs: number of pairs, 40000 at most.
        seed: equal seeds give equal pairs.

    Returns:
        A contrast with the classes ("past", "present"), two examples per pair.

    Raises:
        NotEnoughDataError: more than 40000 pairs.

    Example:
        >>> contrast = tense(pairs=3)
        >>> contrast.labels
        (0, 1, 0, 1, 0, 1)
    """
    factors = {"person": PERSONS, "state": tuple(STATES)}
    return generate("tense", ("past", "present"), FRAMES, factors, _fill, pairs=pairs, seed=seed)


def _fill(block: Block, levels: Mapping[str, str], rng: random.Random) -> Filling:
    first, second = rng.sample(block.verbs, 2)
    occupation, other = rng.sample(block.occupations, 2)
    return {
        "acts": _doing(first, rng),
        "also": _doing(second, rng),
        "state": STATES[levels["state"]],
        "person": _person(levels["person"], occupation, block, rng),
        "other": f"the {other}",
        "place": rng.choice(block.places),
        "time": rng.choice(block.times),
    }


def _doing(verb: Verb, rng: random.Random) -> Forms:
    things = rng.choice(verb.objects)
    return f"{verb.past} {things}", f"{verb.present} {things}"


def _person(level: str, occupation: str, block: Block, rng: random.Random) -> str:
    match level:
        case "occupation":
            return f"the {occupation}"
        case "name":
            return rng.choice((*block.female, *block.male))
        case "title":
            return f"{rng.choice(('Ms.', 'Mr.'))} {rng.choice(block.surnames)}"
        case "new":
            return f"the new {occupation}"
        case _:
            return "our neighbor"
