"""Budget: which attacks fit into some minutes, and what was left out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from repe_unlearn.errors import InputError


@dataclass(slots=True)
class Budget:
    """A clock that says what still fits; a job that was estimated wrong corrects the estimates of its kind.

    Args:
        minutes: wall time in all; None for no limit.
        seconds_per_pass: measured time of one pass of the questions through one model; set when it is known.

    Raises:
        InputError: minutes that are not positive.
    """

    minutes: float | None = None
    seconds_per_pass: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)
    _factors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise InputError(f"got minutes={self.minutes}; needed a positive number, or None for no limit.")

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def seconds(self, kind: str, passes: float) -> float:
        """Return the estimated time of a job.

        Args:
            kind: the part of its name before the dot; jobs of one kind are estimated alike.
            passes: its cost in passes.
        """
        return passes * self.seconds_per_pass * self._factors.get(kind, 1.0)

    def fits(self, name: str, passes: float) -> bool:
        """Return whether a job may start; one that may not is noted in ``left_out`` with what it would have taken."""
        if self.minutes is None:
            return True
        needed = self.seconds(kind_of(name), passes)
        if self.spent + needed <= 60 * self.minutes:
            return True
        self.left_out.append(f"{name} (about {max(needed, 1):.0f} s)")
        return False

    def done(self, name: str, passes: float, seconds: float) -> None:
        """Note what a job took in fact."""
        if passes and self.seconds_per_pass:
            self._factors[kind_of(name)] = max(0.1, seconds / (passes * self.seconds_per_pass))

    def words(self) -> str:
        """What was granted and spent, in words."""
        limit = "no limit" if self.minutes is None else f"limit {self.minutes:g} min"
        return f"{self.spent / 60:.1f} min ({limit})"


def kind_of(name: str) -> str:
    """Return the part of a name before the dot."""
    return name.partition(".")[0]
