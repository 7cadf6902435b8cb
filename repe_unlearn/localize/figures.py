"""Draw maps: heat maps and bars with one diverging scale, centred at 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repe_unlearn.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POSITIVE, _NEGATIVE = (33, 102, 172), (178, 24, 43)  # blue and red stay apart under common colour blindness
_MAP = "RdBu"


def colour(value: float) -> str:
    """Return the colour of a recovery: white at 0, blue up to 1, red down to -1; pale enough for dark text."""
    strength = 0.6 * min(1.0, abs(value))
    end = _POSITIVE if value > 0 else _NEGATIVE
    mixed = (round(255 + (channel - 255) * strength) for channel in end)
    return f"rgb({','.join(map(str, mixed))})"


def heat(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw a layer × column heat map, the first layer at the bottom.

    Args:
        values: one list per row; NaN stays grey.
        rows: names of the layers.
        columns: names of the columns.
        unit: what a column is.
        title: over the axes.
        ax: where to draw; None makes a figure of its own.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if ax is None:
        ax = _axes(2.5 + 0.4 * len(columns), 1.8 + 0.22 * len(rows))
    sizes = [abs(v) for line in values for v in line if math.isfinite(v)]
    limit = max(sizes, default=0.0) or 1.0
    ax.set_facecolor("#d0d3d7")
    image = ax.imshow(values, cmap=_MAP, vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    ax.set_xticks(
        range(len(columns)), [_plain(name) for name in columns], rotation=60, ha="right", fontsize=8
    )
    step = max(1, len(rows) // 16)
    ax.set_yticks(range(0, len(rows), step), rows[::step], fontsize=8)
    ax.set_xlabel(unit)
    ax.set_ylabel("layer")
    ax.set_title(_plain(title), loc="left", fontsize=10, fontweight="bold")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("share recovered", fontsize=9)
    return ax


def bars(
    names: Sequence[str],
    values: Sequence[float],
    title: str,
    ax: Axes | None = None,
    label: str = "share recovered",
) -> Axes:
    """Draw one horizontal bar per place, the first at the top.

    Args:
        names: of the places.
        values: as many.
        title: over the axes.
        ax: where to draw; None makes a figure of its own.
        label: what the values are.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if ax is None:
        ax = _axes(5.2, 1.2 + 0.22 * len(names))
    colours = [tuple(c / 255 for c in (_POSITIVE if value > 0 else _NEGATIVE)) for value in values]
    ax.barh(range(len(names)), values, color=colours)
    ax.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="#57606a", linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_title(_plain(title), loc="left", fontsize=10, fontweight="bold")
    return ax


def _axes(width: float, height: float) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'repe-unlearn[verify]'") from error
    return Figure(figsize=(min(width, 16), min(height, 12)), layout="constrained").add_subplot()


def _plain(words: str) -> str:
    """Text that matplotlib draws as it is: no mathtext, no control characters."""
    return "".join(c if c.isprintable() else " " for c in words).replace("$", r"\$")
