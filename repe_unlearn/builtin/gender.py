"""Minimal pairs on the gender of the person that a sentence is about, in a balanced factorial design.

Gender shows in many forms (pronouns, first names, titles, kinship, reflexives), and a model represents each a
little differently. If every frame brought its own form, a split by frames would fit an eraser on one mixture of
forms and test it on another. So form is not confounded with frame: every frame says he and his exactly once,
names one person and tells once in whose company, and the *levels* of these two factors (`PERSONS`, `COMPANY`)
take turns within every frame. Whatever frames are held out, both sides hold the same mixture.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from repe_unlearn.builtin.blocks import Block
from repe_unlearn.builtin.generator import Filling, Forms, generate

if TYPE_CHECKING:
    from repe_unlearn.contrast import Contrast

__all__ = ["COMPANY", "FRAMES", "KIN", "PERSONS", "PRONOUNS", "gender"]

PRONOUNS: Mapping[str, Forms] = {"he": ("she", "he"), "his": ("her", "his")}
"""Slot -> (female, male) word, in the order of the classes; every frame has each exactly once."""

KIN: tuple[Forms, ...] = (
    ("sister", "brother"),
    ("mother", "father"),
    ("daughter", "son"),
    ("aunt", "uncle"),
    ("niece", "nephew"),
)
"""Kinship words."""

PERSONS: tuple[str, ...] = (*["occupation"] * 5, *["name"] * 2, "title", "young", "kin")
"""Levels of {person}, by weight: half the sentences show gender by pronouns only."""

COMPANY: Mapping[str, str | Forms] = {
    "alone": "alone",
    "friend": "with a friend",
    "himself": ("by herself", "by himself"),
    "him": ("with people around her", "with people around him"),
}
"""Levels of {company}: two that show gender, two as frequent that do not."""

# At least four neutral words follow the last slot that can show gender, so that the end of the prompt, where
# both texts of a pair are equal, shows gender only if the model carries it forward.
FRAMES: tuple[str, ...] = (
    # the person, then the pronouns
    "{person} said {he} would take {his} time and {do} {company} {place} {time}.",
    "{person} explained that {he} had lost {his} keys and {did} {company} {place} instead.",
    "{person} admitted that {he} missed {his} bus and {did} {company} {place} for hours.",
    "{person} wondered where {he} had put {his} bag while {doing} {company} {place} {time}.",
    "{person} closed {his} notebook, and then {he} {did} {company} {place} {time}.",
    "{person} forgot {his} umbrella, so {he} {did} {company} {place} until the rain stopped.",
    "{person} told {his} neighbors that {he} would {do} {company} {place} {time}.",
    "{person} asked {his} boss whether {he} could {do} {company} {place} {time}.",
    "{person} took off {his} jacket before {he} {did} {company} {place} as usual.",
    "{person} enjoys {his} weekends, when {he} likes to {do} {company} {place} for fun.",
    "{person} wrote in {his} diary that {he} {did} {company} {place} {time}.",
    "{person} called {his} parents and said {he} would {do} {company} {place} {time}.",
    "{person} cleared {his} schedule so that {he} could {do} {company} {place} {time}.",
    "{person} had lost {his} map, but {he} still {did} {company} {place} {time}.",
    "{person} rubbed {his} eyes, and a moment later {he} {did} {company} {place} again.",
    "{person} promised {his} cousin that {he} would {do} {company} {place} {time}.",
    "{person} locked {his} office first, and later {he} {did} {company} {place} {time}.",
    "{person} thought about {his} plans while {he} was {doing} {company} {place} {time}.",
    "{person} stopped {his} car because {he} wanted to {do} {company} {place} {time}.",
    "{person} set {his} alarm because {he} hoped to {do} {company} {place} once more.",
    "{person} turned off {his} computer before {he} {did} {company} {place} for a while.",
    "{time}, {person} put on {his} hat, and {he} {did} {company} {place} without hurry.",
    "Everyone says that {person} loves {his} garden and that {he} likes to {do} {company} {place} {time}.",
    "Nobody saw {person} leave {his} room, but {he} {did} {company} {place} {time}.",
    "The neighbors say {person} misses {his} old town, where {he} {did} {company} {place} for years.",
    # a pronoun, then the person
    "Although {he} had left {his} coat at home, {person} {did} {company} {place} {time}.",
    "When {he} had finished {his} meal, {person} {did} {company} {place} for a while.",
    "Before {he} went to {his} room, {person} {did} {company} {place} once again.",
    "As soon as {he} finished {his} coffee, {person} started {doing} {company} {place} again.",
    "If {he} finds {his} ticket, {person} will {do} {company} {place} {time}.",
    "While {he} waited for {his} bus, {person} planned to {do} {company} {place} {time}.",
    "Once {he} had found {his} gloves, {person} {did} {company} {place} {time}.",
    "Unless {he} breaks {his} promise, {person} will {do} {company} {place} {time}.",
    "Whenever {he} visits {his} hometown, {person} will {do} {company} {place} {time}.",
    "Now that {he} has {his} Fridays free, {person} can {do} {company} {place} all day.",
    "When {his} phone rang, {person} said that {he} was {doing} {company} {place} again.",
    "After {his} vacation, {person} felt rested, so {he} {did} {company} {place} once again.",
    "Although {his} back was sore, {person} said {he} would {do} {company} {place} {time}.",
    "In {his} letter, {person} wrote that {he} would rather {do} {company} {place} {time}.",
    "Since {his} house is nearby, {person} says {he} may {do} {company} {place} {time}.",
    # the company before a pronoun
    "{person} {did} {company} {time}, and then {he} showed {his} pictures to the visitors.",
    "{person} {did} {company} {place} until {he} heard {his} name over the loudspeaker.",
    "{person} knew {he} would {do} {company} {place} before {his} train left the small town.",
    "{person} could {do} {company} {place} because {he} had {his} own room and enough time.",
    "{person} learned to {do} {company} when {he} lived with {his} grandparents near the coast.",
    "{person} {did} {company} {place}, as {he} later told {his} friends over the phone.",
)
"""Sentence frames, one template each; all have the slots {person}, {he}, {his} and {company} exactly once."""


def gender(*, pairs: int = 2048, seed: int = 0) -> Contrast:
    """Generate distinct minimal pairs on the gender of a person, with the same mixture of forms in every frame.

    Args:
        pairs: number of pairs, 40000 at most.
        seed: equal seeds give equal pairs.

    Returns:
        A contrast with the classes ("female", "male"), two examples per pair.

    Raises:
        NotEnoughDataError: more than 40000 pairs.

    Example:
        >>> contrast = gender(pairs=3)
        >>> contrast.labels
        (0, 1, 0, 1, 0, 1)
    """
    factors = {"person": PERSONS, "company": tuple(COMPANY)}
    return generate("gender", ("female", "male"), FRAMES, factors, _fill, pairs=pairs, seed=seed)


def _fill(block: Block, levels: Mapping[str, str], rng: random.Random) -> Filling:
    verb = rng.choice(block.verbs)
    things = rng.choice(verb.objects)
    return {
        **PRONOUNS,
        "person": _person(levels["person"], block, rng),
        "company": COMPANY[levels["company"]],
        "do": f"{verb.base} {things}",
        "did": f"{verb.past} {things}",
        "doing": f"{verb.gerund} {things}",
        "place": rng.choice(block.places),
        "time": rng.choice(block.times),
    }


def _person(level: str, block: Block, rng: random.Random) -> str | Forms:
    match level:
        case "occupation":
            return f"the {rng.choice(block.occupations)}"
        case "name":
            return rng.choice(list(zip(block.female, block.male, strict=True)))
        case "title":
            surname = rng.choice(block.surnames)
            return f"Ms. {surname}", f"Mr. {surname}"
        case "young":
            return "the young woman", "the young man"
        case _:
            female, male = rng.choice(KIN)
            return f"our {female}", f"our {male}"
