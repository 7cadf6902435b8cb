"""Divide examples into two sides that share neither content nor wording."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from repe_unlearn.errors import InputError, NotEnoughDataError

__all__ = ["Row", "partition"]

_K = TypeVar("_K", bound=Hashable)

# A shuffle can leave a side without a class by bad luck; this many are tried before the data is blamed.
_ATTEMPTS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What the division of one example depends on; "" means that the example has no such key."""

    content: tuple[str, str, str]  # group, pair, text: equal in one of them -> same side
    template: str
    labels: frozenset[float]  # ids of the classes (or the real value) that the example shows


def partition(
    rows: Sequence[Row], *, test: float, seed: int, wanted: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the row numbers of two sides that have no group, pair, text or template in common.

    Rows whose content falls on one side and whose template falls on the other belong to neither; so do rows
    whose
    pair cannot stay whole. Templates are left out of account when there are fewer than two of them.

    Args:
        rows: what to divide.
        test: share of the second side among the rows kept, in (0, 1); whole groups decide how close.
        seed: equal seeds give equal divisions.
        wanted: number of different labels that each side should show; a division with fewer is taken only
            if no better one turns up, and one with a single label never.

    Returns:
        Row numbers of the first and of the second side, ascending.

    Raises:
        InputError: `test` is outside (0, 1).
        NotEnoughDataError: no division leaves two labels on both sides.

    Example:
        >>> rows = [Row((g, "", g + y), "", frozenset({float(y)})) for g in "abcd" for y in "01"]
        >>> fit, heldout = partition(rows, test=0.25, seed=0, wanted=2)
        >>> len(fit), len(heldout)
        (6, 2)
    """
    if not (isinstance(test, int | float) and 0.0 < test < 1.0):
        raise InputError(
            f"test={test!r}: the held-out share must lie strictly between 0 and 1, for example 0.25"
        )
    components = _components([row.content for row in rows])
    if len(set(components)) < 2:
        raise NotEnoughDataError(
            f"all {len(rows)} examples share one group (or are tied by pairs or equal texts), so nothing "
            "can be held out; give examples of different content different groups"
        )
    templates = [row.template for row in rows]
    if len(set(templates) - {""}) < 2:
        templates = [""] * len(rows)

    best: tuple[int, list[int], list[int]] = (0, [], [])
    for attempt in range(_ATTEMPTS):
        # Where that share is out of reach (few templates, pairs across them), even halves are feasible.
        share = test + (0.5 - test) * attempt / _ATTEMPTS
        sides = _sides(rows, components, templates, share, random.Random(f"{seed}:{attempt}"))
        fit = [i for i, side in enumerate(sides) if side is False]
        heldout = [i for i, side in enumerate(sides) if side is True]
        shown = min(len({y for i in part for y in rows[i].labels}) for part in (fit, heldout))
        if shown > best[0]:
            best = (shown, fit, heldout)
        if shown >= wanted:
            break
    if best[0] < 2:
        raise NotEnoughDataError(
            f"no split of {len(set(components))} groups and {len(set(templates) - {''})} templates with "
            f"test={test} leaves two classes on both sides; add groups with every class, or change test"
        )
    return tuple(best[1]), tuple(best[2])


def _sides(
    rows: Sequence[Row],
    components: Sequence[int],
    templates: Sequence[str],
    test: float,
    rng: random.Random,
) -> list[bool | None]:
    """Held out (True), to fit on (False) or in neither side (None), for every row."""
    where: dict[str, set[int]] = defaultdict(set)
    for component, template in zip(components, templates, strict=True):
        if template:
            where[template].add(component)
    crossed = any(len(found) > 1 for found in where.values())
    # With crossed content and wording a share p of each leaves p^2 : (1-p)^2, which is to be test : (1-test).
    share = math.sqrt(test) / (math.sqrt(test) + math.sqrt(1 - test)) if crossed else test

    heldout = _draw(Counter(components), share, rng, least=1, spare=1)
    fixed = {t: next(iter(found)) in heldout for t, found in where.items() if _on_one_side(found, heldout)}
    contested = Counter(t for t in templates if t and t not in fixed)
    drawn = _draw(
        contested,
        share,
        rng,
        least=0 if any(fixed.values()) else 1,
        spare=0 if not all(fixed.values()) else 1,
    )

    sides: list[bool | None] = []
    for component, template in zip(components, templates, strict=True):
        held = component in heldout
        wording = held if not template else fixed.get(template, template in drawn)
        sides.append(held if wording == held else None)
    return _whole_pairs(rows, sides)


def _whole_pairs(rows: Sequence[Row], sides: list[bool | None]) -> list[bool | None]:
    # Half a pair would unbalance the classes and has no partner to be compared with.
    found: dict[str, set[bool | None]] = defaultdict(set)
    for row, side in zip(rows, sides, strict=True):
        found[row.content[1]].add(side)
    return [
        side if not row.content[1] or len(found[row.content[1]]) == 1 else None
        for row, side in zip(rows, sides, strict=True)
    ]


def _on_one_side(found: set[int], heldout: set[int]) -> bool:
    return found <= heldout or not found & heldout


def _draw(sizes: Mapping[_K, int], share: float, rng: random.Random, *, least: int, spare: int) -> set[_K]:
    """Random keys with about `share` of the total size: `least` at least, all but `spare` at most."""
    keys = list(sizes)
    rng.shuffle(keys)
    target, total = share * sum(sizes.values()), 0
    drawn: list[_K] = []
    for key in keys:
        if len(drawn) < len(keys) - spare and abs(total + sizes[key] - target) < abs(total - target):
            drawn.append(key)
            total += sizes[key]
    if len(drawn) < least and len(keys) > spare:
        drawn = [min(keys, key=lambda key: sizes[key])]
    return set(drawn)


def _components(content: Sequence[tuple[str, ...]]) -> list[int]:
    """Number the sets of rows that are tied together, directly or through others, by an equal key."""
    parent = list(range(len(content)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[int, str], int] = {}
    for i, keys in enumerate(content):
        for key in enumerate(keys):
            if key[1]:
                a, b = root(first.setdefault(key, i)), root(i)
                parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(content))]
