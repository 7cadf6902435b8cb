"""Map: how much of a behaviour each place of a model carries, layer by layer."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repe_unlearn.errors import InputError, ShapeError
from repe_unlearn.localize.figures import bars, colour, heat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE = 40  # columns; a wider map is shown by its strongest places


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """The effect of every place (layer × position, or layer × unit) on a metric, pair by pair.

    Attributes:
        what: kind of site, ``heads`` or ``neurons``.
        method: how it was measured.
        metric: what was measured.
        layers: numbers of the blocks, one per row.
        columns: positions, heads or neurons.
        effects: ``[pairs, rows, columns]`` change of the metric, in its own unit (logits or nats); NaN where a prompt
            has no such position.
        gaps: ``[pairs]`` metric of the clean run minus that of the corrupt run.
    """

    what: str
    method: str
    metric: str
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    effects: Tensor
    gaps: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.gaps), len(self.layers), len(self.columns))
        if tuple(self.effects.shape) != shape:
            raise ShapeError(f"got effects {tuple(self.effects.shape)}; needed {shape}.")

    @property
    def recovery(self) -> Tensor:
        """Share of the gap that each place brings back, ``[rows, columns]``: 0 as corrupt, 1 as clean.

        The mean effect over the mean gap of the pairs that have the place: a pair with a gap near 0 cannot blow it up.
        """
        there = ~self.effects.isnan()
        gaps = (there * self.gaps[:, None, None]).sum(0)
        return self.effects.nansum(0) / torch.where(there.any(0), gaps, torch.nan)

    @property
    def per_pair(self) -> Tensor:
        """The same for every pair by itself, ``[pairs, rows, columns]``."""
        return self.effects / self.gaps[:, None, None]

    def rows(self) -> list[dict[str, object]]:
        """Return one JSON-able row per place; ``recovery`` is None where no prompt has the place."""
        return [
            {
                "what": self.what,
                "layer": layer,
                "column": column,
                "recovery": None if value != value else value,
            }
            for layer, values in zip(self.layers, self.recovery.tolist(), strict=True)
            for column, value in zip(self.columns, values, strict=True)
        ]

    def top(self, n: int = 10) -> list[tuple[int, str, float]]:
        """Return the n places with the largest recovery in size: (layer, column, recovery)."""
        flat = self.recovery.flatten()
        order = flat.nan_to_num(0.0).abs().argsort(descending=True, stable=True)[:n].tolist()
        wide = len(self.columns)
        return [(self.layers[i // wide], self.columns[i % wide], float(flat[i])) for i in order]

    def correlation(self, other: Map) -> float:
        """Return the Pearson correlation of two maps over their places.

        Raises:
            InputError: other places, or a map that is constant.
        """
        if (self.what, self.layers, self.columns) != (other.what, other.layers, other.columns):
            raise InputError(f"got maps of other places: {self!r} and {other!r}.")
        x, y = self.recovery.flatten(), other.recovery.flatten()
        both = ~(x.isnan() | y.isnan())
        if both.sum() < 2 or x[both].std() == 0 or y[both].std() == 0:
            raise InputError("a map with one value only correlates with nothing; needed two that vary.")
        return float(torch.corrcoef(torch.stack([x[both], y[both]]))[0, 1])

    def plot(self, ax: Axes | None = None, *, n: int | None = None) -> Axes:
        """Draw a heat map, blue for places that bring the clean answer back and red for those that work against it.

        Args:
            ax: where to draw; None makes a figure of its own (``.figure`` of what is returned).
            n: draw bars of the n strongest places instead; the default for maps of more than 40 columns is 20.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        title = f"{self.what}: {self.method}"
        if n is not None or len(self.columns) > _WIDE:
            places = self.top(20 if n is None else n)
            return bars(
                [f"{layer}.{column}" for layer, column, _ in places], [v for *_, v in places], title, ax
            )
        unit = {"heads": "head", "neurons": "neuron"}.get(self.what, "position")
        return heat(self.recovery.tolist(), list(map(str, self.layers)), list(self.columns), unit, title, ax)

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers x {len(self.columns)} columns, {len(self.gaps)} pairs"
        return f"Map({self.what}, {self.method}, {self.metric}, {size})"

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(repr(self))}: share recovered</caption>"
        if len(self.columns) > _WIDE:
            head: Iterable[str] = ("layer", "place", "recovery")
            lines = [
                f"<tr><th>{layer}</th><th>{html.escape(column)}</th>{_cell(value)}</tr>"
                for layer, column, value in self.top(20)
            ]
        else:
            head = ("layer", *self.columns)
            lines = [
                f"<tr><th>{layer}</th>{''.join(map(_cell, values))}</tr>"
                for layer, values in zip(self.layers, self.recovery.tolist(), strict=True)
            ]
        top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        return f"<table>{caption}<tr>{top}</tr>{''.join(lines)}</table>"


def _cell(value: float) -> str:
    if value != value:
        return "<td>–</td>"
    return f'<td style="background:{colour(value)};color:#1f2328">{value:.2f}</td>'
