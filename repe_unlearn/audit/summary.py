"""Many checks in few rows: one row per check name, so that 60 sites do not hide the one that failed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repe_unlearn.audit.check import Check

_NUMBER = r"([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)"
_BOUND = re.compile(rf"\s*(<=|>=)\s*{_NUMBER}\s*")
_RANGE = re.compile(rf"\s*within {_NUMBER} ± {_NUMBER}\s*")


@dataclass(frozen=True, slots=True)
class Row:
    """All checks of one name: how many passed, the worst, the median, and the control beside them.

    Args:
        name: the name that they share.
        checks: the checks, worst first.
        judged: how many have a verdict.
        passed: how many of those passed.
        median: median of the finite values, NaN if there is none.
        lowest: smallest finite value, NaN if there is none.
        highest: largest finite value, NaN if there is none.
        control: median of the finite controls, None if there is none.
        control_within: how many controls meet the bound of the value; None where it cannot be told.
    """

    name: str
    checks: tuple[Check, ...]
    judged: int
    passed: int
    median: float
    lowest: float
    highest: float
    control: float | None
    control_within: int | None

    @property
    def worst(self) -> Check:
        """The check that fails most, or is closest to failing (the first one where nothing is judged)."""
        return self.checks[0]

    @property
    def verdict(self) -> bool | None:
        """False if any check failed, True if all that have a verdict passed, None if none has one."""
        return self.passed == self.judged if self.judged else None


def beyond(bound: str, value: float) -> float | None:
    """How far a value is beyond a bound: negative inside, infinite for NaN, None for a bound in other words.

    Bounds are read as ``Check.at_most``, ``at_least`` and ``within`` write them.
    """
    if _RANGE.fullmatch(bound):
        center, width = (float(x) for x in _RANGE.fullmatch(bound).groups())  # type: ignore[union-attr]
        distance = abs(value - center) - width
    elif _BOUND.fullmatch(bound):
        sign, limit = _BOUND.fullmatch(bound).groups()  # type: ignore[union-attr]
        distance = value - float(limit) if sign == "<=" else float(limit) - value
    else:
        return None
    return math.inf if math.isnan(value) else distance


def excess(check: Check) -> float:
    """How far a check's value is beyond its bound, for sorting; 0 where the bound is in other words."""
    if math.isnan(check.value):
        return math.inf
    return beyond(check.bound, check.value) or 0.0


def summarise(checks: Sequence[Check]) -> tuple[Row, ...]:
    """One row per name, in order of first appearance; the checks inside a row are sorted worst first.

    Args:
        checks: any checks.

    Returns:
        The rows; together they hold every check exactly once.

    Example:
        >>> from repe_unlearn.audit.check import Check
        >>> rows = summarise([Check.at_most("p", v, 0.6, site=str(i)) for i, v in enumerate((0.5, 0.7))])
        >>> rows[0].passed, rows[0].judged, rows[0].worst.site
        (1, 2, '1')
    """
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name, []).append(check)
    return tuple(_row(name, group) for name, group in groups.items())


def whole_model(checks: Sequence[Check]) -> tuple[Check, ...]:
    """The checks that belong to no site, in order."""
    return tuple(check for check in checks if not check.site)


def per_site(checks: Sequence[Check]) -> tuple[Row, ...]:
    """Summary rows of the checks that belong to a site."""
    return summarise([check for check in checks if check.site])


def _row(name: str, group: list[Check]) -> Row:
    judged = [check for check in group if check.passed is not None]
    finite = [check.value for check in group if math.isfinite(check.value)]
    controls = [
        check.control for check in group if check.control is not None and math.isfinite(check.control)
    ]
    return Row(
        name=name,
        checks=tuple(sorted(group, key=lambda check: (check.passed is not False, -excess(check)))),
        judged=len(judged),
        passed=sum(check.passed is True for check in judged),
        median=statistics.median(finite) if finite else math.nan,
        lowest=min(finite, default=math.nan),
        highest=max(finite, default=math.nan),
        control=statistics.median(controls) if controls else None,
        control_within=_controls_within(group),
    )


def _controls_within(group: list[Check]) -> int | None:
    distances = [beyond(check.bound, check.control) for check in group if check.control is not None]
    readable = [distance for distance in distances if distance is not None]
    return sum(distance <= 0 for distance in readable) if readable else None
