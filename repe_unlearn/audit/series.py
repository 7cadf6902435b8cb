"""Series: one curve of a report, over layers or over any other axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repe_unlearn.audit.check import real
from repe_unlearn.errors import InputError


@dataclass(frozen=True, slots=True)
class Series:
    """One curve (or cloud of points) of one figure, with an optional 95 % band; its lengths are consistent.

    Args:
        figure: title of the figure that it belongs to; series with the same title are drawn together.
        label: ``"before"``, ``"after"``, ``"random eraser"`` keep their colours everywhere; others are free.
        x: positions along the axis, finite, at least one.
        y: values, as many as ``x``; NaN leaves a gap.
        low: lower ends of the 95 % intervals, as many as ``y``, or empty.
        high: upper ends of the 95 % intervals, as many as ``y``, or empty.
        x_label: what ``x`` is.
        y_label: what ``y`` is.
        chance: where a reader without knowledge would land; drawn as a dashed line.
        log_x: logarithmic x axis; every x must be positive.
        log_y: logarithmic y axis; values at or below 0 fall below it and are counted under the panel.
        panel: small multiple within the figure, for example ``"attn_in"``.
        marker_only: points without a line, for trade-off scatters.
        point_labels: a short text for every point, or empty.
        caption: sentences for the reader, for example what a bad outcome would look like; the first non-empty
            caption of a figure is printed.
        band: what ``low`` and ``high`` are.
        rows: names of the positions; then every position is a row, from the top, and values run along the horizontal
            axis, labelled ``y_label`` (a forest plot). ``chance`` is then the line that a value should stay below.

    Raises:
        InputError: no points, lengths that differ, a position that is not finite or not positive on a
            logarithmic axis, or something that is not a number.

    Example:
        >>> Series("Linear probe", "after", x=(0, 1), y=(0.52, 0.49), chance=0.5).y
        (0.52, 0.49)
    """

    figure: str
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    x_label: str = "layer"
    y_label: str = ""
    chance: float | None = None
    log_x: bool = False
    log_y: bool = False
    panel: str = ""
    marker_only: bool = False
    point_labels: tuple[str, ...] = ()
    caption: str = ""
    band: str = "95 % intervals"
    rows: tuple[str, ...] = ()

    def __post_init__(self):
        what = f"series {self.label!r} of figure {self.figure!r}"
        for field in ("x", "y", "low", "high"):
            values = tuple(real(value, f"{what}: {field}") for value in getattr(self, field))
            object.__setattr__(self, field, values)
        for field in ("point_labels", "rows"):
            object.__setattr__(self, field, tuple(str(label) for label in getattr(self, field)))
        if self.chance is not None:
            object.__setattr__(self, "chance", real(self.chance, f"{what}: chance"))
        n = len(self.x)
        if n == 0 or len(self.y) != n:
            raise InputError(
                f"{what} has {n} x and {len(self.y)} y; it needs one y for every x, and at least one."
            )
        if not (len(self.low) == len(self.high) and len(self.low) in (0, n)):
            raise InputError(
                f"{what} has {len(self.low)} low and {len(self.high)} high for {n} points; "
                "give both ends of every interval, or neither."
            )
        for field in ("point_labels", "rows"):
            if len(getattr(self, field)) not in (0, n):
                raise InputError(
                    f"{what} has {len(getattr(self, field))} {field} for {n} points; give one each, or none."
                )
        if not all(math.isfinite(x) for x in self.x):
            raise InputError(f"{what} has an x that is not finite; leave the point out, or make its y NaN.")
        if self.log_x and min(self.x) <= 0:
            raise InputError(
                f"{what} has x = {min(self.x)} on a logarithmic axis; keep x positive, or log_x=False."
            )
