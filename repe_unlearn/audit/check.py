"""Check: one measured number with its bound, verdict and negative control."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, SupportsFloat

from repe_unlearn.errors import InputError


def real(value: Any, what: str) -> float:
    """A Python float from a number, NumPy scalar or one-element tensor; InputError for anything else."""
    if isinstance(value, SupportsFloat) and not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{what} is {value!r}, which is not one number. Pass a single number."
            ) from error
    raise InputError(f"{what} is {value!r}; it must be a number (NaN where nothing could be measured).")


@dataclass(frozen=True, slots=True)
class Check:
    """One measured number with bound, verdict and negative control; what is not finite never passes.

    Args:
        name: dotted name such as ``"probe.refit.linear"``; checks of one name form one summary row.
        value: what was measured. NaN says that the measurement failed.
        bound: the bound in words, for example ``"<= 0.6"``; ``""`` for information only.
        passed: True or False, or None for information without a verdict.
        control: the same measure where the outcome is known: untouched model, random eraser, shuffled labels.
        low: lower end of the 95 % interval of ``value``.
        high: upper end of the 95 % interval of ``value``.
        site: ``str(Site)``, or ``""`` for a check of the whole model.
        note: one sentence for the reader.

    Raises:
        InputError: an empty name, something that is not a number, an interval with its ends swapped, or a
            verdict of True on a value that is not finite.

    Example:
        >>> Check.at_most("probe.refit.linear", 0.52, 0.60, control=0.98).passed
        True
    """

    name: str
    value: float
    bound: str
    passed: bool | None
    control: float | None = None
    low: float | None = None
    high: float | None = None
    site: str = ""
    note: str = ""

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(
                f"a check is named {self.name!r}; it needs a dotted name such as 'probe.linear'."
            )
        object.__setattr__(self, "value", real(self.value, f"{self.name}: value"))
        for field in ("control", "low", "high"):
            given = getattr(self, field)
            if given is not None:
                object.__setattr__(self, field, real(given, f"{self.name}: {field}"))
        for field in ("bound", "site", "note"):
            object.__setattr__(self, field, str(getattr(self, field)))
        if self.passed is not None:
            if isinstance(self.passed, str):
                raise InputError(f"{self.name}: passed is {self.passed!r}; it must be True, False or None.")
            object.__setattr__(self, "passed", bool(self.passed))
        if self.passed and not math.isfinite(self.value):
            raise InputError(f"{self.name} is {self.value} and cannot have passed; use at_most or at_least.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(
                f"{self.name}: the interval [{self.low}, {self.high}] is reversed; swap its ends."
            )

    @classmethod
    def at_most(
        cls,
        name: str,
        value: float,
        limit: float,
        *,
        control: float | None = None,
        low: float | None = None,
        high: float | None = None,
        site: str = "",
        note: str = "",
    ) -> Check:
        """A check that passes exactly when ``value`` is finite and ``<= limit``.

        Args:
            name: dotted name.
            value: what was measured; NaN or infinite fails.
            limit: finite upper bound, in the unit of ``value``.
            control: the same measure on the control.
            low: lower end of the 95 % interval.
            high: upper end of the 95 % interval.
            site: ``str(Site)`` or ``""``.
            note: one sentence.

        Returns:
            The check with ``bound`` and ``passed`` filled in.

        Raises:
            InputError: ``limit`` is not finite, or a field is unusable.

        Example:
            >>> Check.at_most("damage.kl", float("nan"), 0.05).passed
            False
        """
        value, limit = real(value, f"{name}: value"), _limit(name, limit)
        passed = math.isfinite(value) and value <= limit
        return cls(name, value, f"<= {limit:g}", passed, control, low, high, site, note)

    @classmethod
    def at_least(
        cls,
        name: str,
        value: float,
        limit: float,
        *,
        control: float | None = None,
        low: float | None = None,
        high: float | None = None,
        site: str = "",
        note: str = "",
    ) -> Check:
        """A check that passes exactly when ``value`` is finite and ``>= limit``.

        Args:
            name: dotted name.
            value: what was measured; NaN or infinite fails.
            limit: finite lower bound, in the unit of ``value``.
            control: the same measure on the control.
            low: lower end of the 95 % interval.
            high: upper end of the 95 % interval.
            site: ``str(Site)`` or ``""``.
            note: one sentence.

        Returns:
            The check with ``bound`` and ``passed`` filled in.

        Raises:
            InputError: ``limit`` is not finite, or a field is unusable.

        Example:
            >>> Check.at_least("refusal.harmful", 0.71, 0.90, control=0.94).passed
            False
        """
        value, limit = real(value, f"{name}: value"), _limit(name, limit)
        passed = math.isfinite(value) and value >= limit
        return cls(name, value, f">= {limit:g}", passed, control, low, high, site, note)

    @classmethod
    def within(
        cls,
        name: str,
        value: float,
        center: float,
        width: float,
        *,
        control: float | None = None,
        low: float | None = None,
        high: float | None = None,
        site: str = "",
        note: str = "",
    ) -> Check:
        """A check that passes exactly when ``value`` is finite and ``|value - center| <= width``.

        Args:
            name: dotted name.
            value: what was measured; NaN or infinite fails.
            center: finite middle of the range, e.g. chance.
            width: finite half-width of the range, >= 0.
            control: the same measure on the control.
            low: lower end of the 95 % interval.
            high: upper end of the 95 % interval.
            site: ``str(Site)`` or ``""``.
            note: one sentence.

        Returns:
            The check with ``bound`` and ``passed`` filled in.

        Raises:
            InputError: ``center`` or ``width`` is not finite, or a field is unusable.

        Example:
            >>> Check.within("probe.transferred.linear", 0.52, 0.5, 0.037).passed
            True
        """
        value, center, width = real(value, f"{name}: value"), _limit(name, center), _limit(name, width)
        passed = math.isfinite(value) and abs(value - center) <= width
        return cls(name, value, f"within {center:g} ± {width:.3g}", passed, control, low, high, site, note)

    @classmethod
    def information(
        cls,
        name: str,
        value: float,
        *,
        control: float | None = None,
        low: float | None = None,
        high: float | None = None,
        site: str = "",
        note: str = "",
    ) -> Check:
        """A number that is reported without a verdict; it can neither pass nor fail a report.

        Args:
            name: dotted name.
            value: what was measured.
            control: the same measure on the control.
            low: lower end of the 95 % interval.
            high: upper end of the 95 % interval.
            site: ``str(Site)`` or ``""``.
            note: one sentence.

        Returns:
            The check with an empty bound and ``passed=None``.

        Raises:
            InputError: a field is unusable.

        Example:
            >>> Check.information("probe.mlp", 0.83, control=0.99).passed is None
            True
        """
        return cls(name, value, "", None, control, low, high, site, note)


def _limit(name: str, limit: float) -> float:
    limit = real(limit, f"{name}: limit")
    if not math.isfinite(limit):
        raise InputError(
            f"{name}: the limit is {limit}, which nothing or everything meets; pass a finite limit."
        )
    return limit
