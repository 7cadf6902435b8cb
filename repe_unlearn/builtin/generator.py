"""Fill sentence frames with content words, two texts at a time that differ in the concept only."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import Formatter

from repe_unlearn.builtin.blocks import BLOCKS, Block
from repe_unlearn.contrast import Contrast, Example
from repe_unlearn.errors import InputError, NotEnoughDataError

__all__ = ["MOST_PAIRS", "Filling", "Forms", "article", "generate", "render"]

Forms = tuple[str, str]
"""What a slot that carries the concept says in class 0 and in class 1; equally many words."""

Filling = Mapping[str, str | Forms]
"""Slot name -> words; a pair where the slot carries the concept."""

MOST_PAIRS = 40_000
"""Largest number of pairs: all frames still take part, and one that cannot be met is refused at once."""

# A frame and a block that give nothing new this many times in a row are taken to be used up.
_PATIENCE = 200


def article(noun: str) -> str:
    """Put "a" or "an" before a noun of the word tables.

    Args:
        noun: a singular noun or noun phrase.

    Returns:
        The noun with its article. Words that are spelled with a vowel but spoken without ("unicorn") are not
        in the tables, so the spelling decides.

    Example:
        >>> article("engineer"), article("baker")
        ('an engineer', 'a baker')
    """
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def render(frame: str, filling: Filling) -> tuple[tuple[str, tuple[int, int]], tuple[str, tuple[int, int]]]:
    """Write a frame out for both classes.

    Args:
        frame: a sentence with slots, such as "The {occupation} said that {he} would {do} {time}."
        filling: words for at least the slots of the frame.

    Returns:
        (text, span of the first word that carries the concept) of class 0 and of class 1. The first letter is
        a capital.

    Raises:
        InputError: no slot of the frame carries the concept.

    Example:
        >>> render("The cook said {he} was late.", {"he": ("she", "he")})[1]
        ('The cook said he was late.', (14, 16))
    """
    texts, focus = ["", ""], [(0, 0), (0, 0)]
    for literal, slot, _, _ in Formatter().parse(frame):
        said = filling[slot] if slot is not None else ""
        for side in (0, 1):
            texts[side] += literal
            words = said if isinstance(said, str) else said[side]
            if not isinstance(said, str) and focus[side] == (0, 0):
                start, end = _carrier(said, side)
                focus[side] = (len(texts[side]) + start, len(texts[side]) + end)
            texts[side] += words
    if (0, 0) in focus:
        raise InputError(f"no slot of the frame {frame!r} carries the concept")
    first, second = ((text[0].upper() + text[1:], span) for text, span in zip(texts, focus, strict=True))
    return first, second


def _carrier(said: Forms, side: int) -> tuple[int, int]:
    """Span of the first word that differs between the two forms: of "by herself", "by himself" the second."""
    start = 0
    for word, other in zip(said[side].split(), said[1 - side].split(), strict=True):
        if word != other:
            return start, start + len(word)
        start += len(word) + 1
    raise InputError(f"both classes say {said[side]!r}; a slot that carries the concept needs two forms")


def generate(
    name: str,
    classes: tuple[str, str],
    frames: Sequence[str],
    factors: Mapping[str, Sequence[str]],
    fill: Callable[[Block, Mapping[str, str], random.Random], Filling],
    *,
    pairs: int,
    seed: int,
) -> Contrast:
    """Draw distinct pairs, equally many from every block and frame, with equal mixtures of levels in all frames.

    Args:
        name: name of the contrast.
        classes: names of class 0 and class 1.
        frames: sentences with slots.
        factors: name -> levels of what varies within every frame; a level listed twice counts double. Any
            run of a frame's pairs holds all levels in proportion, as closely as its length allows.
        fill: draws words for all slots, given the block and the level of every factor.
        pairs: number of pairs. A larger number begins with the same pairs as a smaller one.
        seed: equal seeds give equal pairs.

    Returns:
        Two examples per pair; the group is the block, the template the frame.

    Raises:
        NotEnoughDataError: more than `MOST_PAIRS`, or the frames and blocks give fewer distinct pairs.
    """
    if pairs > MOST_PAIRS:
        raise NotEnoughDataError(
            f"asked for {pairs} pairs, but {name!r} makes {MOST_PAIRS} at most; ask for fewer"
        )
    rng = random.Random(f"{name}:{seed}")
    seen: set[str] = set()
    used_up: set[tuple[int, str]] = set()
    turns = {frame: _turns(factors, rng) for frame in frames}
    examples: list[Example] = []
    while len(seen) < pairs and len(used_up) < len(BLOCKS) * len(frames):
        for number, frame in _round(len(BLOCKS), frames, rng):
            if len(seen) == pairs:
                break
            if (number, frame) in used_up:
                continue
            levels = next(turns[frame])
            for _ in range(_PATIENCE):
                rendered = render(frame, fill(BLOCKS[number], levels, rng))
                if rendered[0][0] not in seen:
                    break
            else:
                used_up.add((number, frame))
                continue
            group, pair = f"block-{number + 1:02d}", f"{name}-{len(seen)}"
            seen.add(rendered[0][0])
            for label, (text, focus) in enumerate(rendered):
                examples.append(Example(text, label, group=group, template=frame, pair=pair, focus=focus))
    if len(seen) < pairs:
        raise NotEnoughDataError(
            f"asked for {pairs} pairs, but {name!r} can make only {len(seen)} distinct ones"
        )
    return Contrast(name, "classes", classes, tuple(examples))


def _round(blocks: int, frames: Sequence[str], rng: random.Random) -> Iterator[tuple[int, str]]:
    """Every block with every frame once; any stretch of the order holds all about equally often."""
    numbers, sentences = list(range(blocks)), list(frames)
    rng.shuffle(numbers)
    rng.shuffle(sentences)
    period = math.lcm(blocks, len(frames))
    for k in range(blocks * len(frames)):
        # Both turn at once; after a full turn of both they are moved against each other to meet in new pairs.
        yield numbers[k % blocks], sentences[(k + k // period) % len(frames)]


def _turns(factors: Mapping[str, Sequence[str]], rng: random.Random) -> Iterator[dict[str, str]]:
    """Levels for the first, second, ... pair of one frame, without end; any stretch is balanced in each factor."""
    wheels = {name: rng.sample(list(levels), len(levels)) for name, levels in factors.items()}
    for k in itertools.count():
        # As in `_round`: after a full turn of all, each wheel moves one on against the one before.
        turn = k // math.lcm(*map(len, wheels.values()))
        yield {name: wheel[(k + i * turn) % len(wheel)] for i, (name, wheel) in enumerate(wheels.items())}
