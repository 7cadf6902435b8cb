"""Draw Series with matplotlib: small multiples, interval bands, chance lines, always the same colours."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from repe_unlearn.audit.series import Series
from repe_unlearn.audit.text import number
from repe_unlearn.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2328", "#57606a", "#e6e8eb"
# Okabe-Ito colours stay apart under common colour blindness; dashes and markers keep them apart in print
_ROLES: Mapping[str, Mapping[str, Any]] = {
    "before": {
        "color": "#333333",
        "linestyle": "-",
        "marker": "o",
        "markerfacecolor": "white",
        "linewidth": 1.3,
    },
    "random": {"color": "#D55E00", "linestyle": "-.", "marker": "^", "linewidth": 1.3},
    "after": {"color": "#0072B2", "linestyle": "-", "marker": "o", "linewidth": 2.0},
}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
_OTHER_MARKERS = ("s", "D", "v", "P", "X")
_WORDS = {
    "before": ("before", "untouched", "original", "unedited"),
    "random": ("random", "shuffled", "permut", "control"),
    "after": ("after", "erased", "edited", "unlearned"),
}
_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "svg.fonttype": "none",  # real text: small, selectable, in the reader's own font
    "svg.hashsalt": "repe_unlearn",  # the same report gives the same bytes
    "text.color": INK,
    "axes.unicode_minus": True,
}
_ALL_TICKS = 8  # a logarithmic axis with at most this many positions is labelled at each of them


def role_of(label: str) -> str:
    """The role that a label names: before, after, random, or the empty string for any other."""
    words = label.lower().strip()
    if any(word in words for word in _WORDS["random"]):
        return "random"
    return next((role for role in ("before", "after") if words.startswith(_WORDS[role])), "")


def draw(series: Sequence[Series], *, titled: bool = True, narrow: bool = False) -> dict[str, Figure]:
    """One matplotlib figure per title, its panels side by side on a shared y axis; pyplot is not touched.

    Args:
        series: the curves, in any order.
        titled: write the title into the figure (off where the page around it does so).
        narrow: stack the panels instead, for a column as wide as a phone.

    Returns:
        Figure title -> figure, in order of first appearance.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> list(draw([Series("Probe", "after", (0, 1), (0.5, 0.6), chance=0.5)]))
        ['Probe']
    """
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.figure, []).append(one)
    return {title: _figure(title if titled else "", group, narrow) for title, group in groups.items()}


def plot(series: Series | Sequence[Series], ax: Axes | None = None) -> Axes:
    """Draw curves of one panel into an axes of yours, or into a new figure.

    Args:
        series: one or more curves that share a panel.
        ax: where to draw; None makes a figure of its own (``.figure`` of what is returned).

    Returns:
        The axes, with labels and legend.

    Raises:
        InputError: no series, or series of several panels.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> len(plot(Series("Probe", "after", (0, 1), (0.5, 0.6))).lines)
        1
    """
    group = [series] if isinstance(series, Series) else list(series)
    panels = {(one.figure, one.panel) for one in group}
    if len(panels) != 1:
        raise InputError(
            f"plot draws one panel and got {len(panels)}; filter the series, or use draw for all."
        )
    with _style():
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6.4, 3.8), layout="constrained").add_subplot()
        if _row_names(group):
            handles = _forest(ax, group, _styles(group))
        else:
            handles = _panel(ax, group, _styles(group))
            _show_ceiling(ax, group)
        ax.legend(handles.values(), handles.keys(), frameon=False, fontsize=9)
    return ax


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same bytes for the same figure.

    Args:
        figure: any matplotlib figure.

    Returns:
        SVG source.

    Example:
        >>> "<svg" in to_svg(draw([Series("Probe", "after", (0,), (0.5,))])["Probe"])
        True
    """
    with _style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots per inch, for clouds of so many points that an SVG would be larger.

    Args:
        figure: any matplotlib figure.

    Returns:
        PNG bytes.

    Example:
        >>> to_png(draw([Series("Probe", "after", (0,), (0.5,))])["Probe"])[1:4]
        b'PNG'
    """
    with _style():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'repe-unlearn[verify]'") from error
    with matplotlib.rc_context(dict(_STYLE)):  # pyright: ignore[reportArgumentType]
        yield


def _figure(title: str, group: Sequence[Series], narrow: bool) -> Figure:
    with _style():
        from matplotlib.figure import Figure

        panels: dict[str, list[Series]] = {}
        for one in group:
            panels.setdefault(one.panel, []).append(one)
        columns = 1 if narrow else min(len(panels), 3)
        lines = math.ceil(len(panels) / columns)
        width = 4.1 if narrow else {1: 7.0, 2: 9.6, 3: 11.0}[columns]
        rows = len(_row_names(group))
        tall = 0.75 + 0.34 * rows if rows else 2.9 if narrow else 3.2
        figure = Figure(figsize=(width, 0.55 + tall * lines), layout="constrained")
        shared = len({one.y_label for one in group}) == 1 and len({one.log_y for one in group}) == 1
        grid = figure.subplots(lines, columns, sharey=shared, squeeze=False).flatten()
        styles = _styles(group)
        handles: dict[str, Any] = {}
        for ax, (name, curves) in zip(grid, panels.items(), strict=False):
            handles.update(_forest(ax, curves, styles) if rows else _panel(ax, curves, styles))
            if not rows:
                _show_ceiling(ax, group if shared else curves)
            ax.set_title(_plain(name), loc="left", fontsize=10, fontweight="bold", color=INK)
            if shared and not ax.get_subplotspec().is_first_col():
                ax.set_ylabel("")
        for ax in grid[len(panels) :]:
            ax.remove()
        if title:
            figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12, fontweight="bold")
        per_line = 2 if narrow else 5
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower left" if title else "outside upper left",  # never on top of the title
            ncols=per_line,
            frameon=False,
            fontsize=9,
        )
    return figure


def _styles(group: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """Label -> line style: roles keep their colours everywhere, other labels take the next free one."""
    styles: dict[str, dict[str, Any]] = {}
    taken: dict[str, int] = {}
    for label in dict.fromkeys(one.label for one in group):
        role = role_of(label)
        turn = taken.get(role, 0)
        taken[role] = turn + 1
        if role:
            styles[label] = {"markersize": 3.6, **_ROLES[role]}
            if turn:  # a second "after" keeps the colour of its role and differs by its dashes
                styles[label] |= {"linestyle": (":", "--", (0, (5, 1, 1, 1)))[(turn - 1) % 3], "marker": "s"}
        else:
            styles[label] = {
                "color": _OTHERS[turn % len(_OTHERS)],
                "marker": _OTHER_MARKERS[turn % len(_OTHER_MARKERS)],
                "markersize": 3.6,
                "linestyle": "--",
                "linewidth": 1.3,
            }
    return styles


def _panel(ax: Axes, curves: Sequence[Series], styles: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw one panel and return its legend: text -> handle."""
    handles: dict[str, Any] = {}
    if any(one.log_x for one in curves):
        ax.set_xscale("log")
    if any(one.log_y for one in curves):
        ax.set_yscale("log")
    # "after" last, on top: it is what the reader came for
    for one in sorted(curves, key=lambda one: ("", "random", "before", "after").index(role_of(one.label))):
        style = dict(styles[one.label])
        line = _curve(ax, one, style)
        handles[_plain(one.label)] = line
    ordered = {_plain(one.label): handles[_plain(one.label)] for one in curves}
    for chance in sorted({one.chance for one in curves if one.chance is not None}):
        line = ax.axhline(chance, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        ordered["chance"] = line
    first = curves[0]
    ax.set_xlabel(_plain(first.x_label), fontsize=9, color=INK)
    ax.set_ylabel(_plain(first.y_label), fontsize=9, color=INK)
    _frame(ax, curves)
    return ordered


def _row_names(curves: Sequence[Series]) -> dict[float, str]:
    """Position -> name of the row, where the series are rows."""
    return {x: name for one in curves for x, name in zip(one.x, one.rows, strict=False)}


def _forest(ax: Axes, curves: Sequence[Series], styles: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw rows, values along the horizontal axis, the models of a row one above the other; return the legend."""
    names = _row_names(curves)
    labels = list(dict.fromkeys(one.label for one in curves))
    handles: dict[str, Any] = {}
    for one in curves:
        style = styles[one.label]
        shift = 0.22 * (labels.index(one.label) - (len(labels) - 1) / 2)
        y = [x + shift for x in one.x]
        if one.low:
            ax.hlines(y, one.low, one.high, color=style["color"], linewidth=1.4, alpha=0.7)
        shown = {key: style[key] for key in ("color", "marker", "markerfacecolor") if key in style}
        handles[_plain(one.label)] = ax.plot(one.y, y, linestyle="none", markersize=5.5, **shown)[0]
    limit = next((one.chance for one in curves if one.chance is not None), None)
    if limit is not None:
        handles["limit"] = ax.axvline(limit, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    ax.axvline(0, color="#b5bac0", linewidth=1, zorder=1)
    ax.set_yticks(list(names), [_plain(name) for name in names.values()])
    ax.set_ylim(max(names) + 0.6, min(names) - 0.6)
    ax.set_xlabel(_plain(curves[0].y_label), fontsize=9, color=INK)
    ax.grid(True, axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#b5bac0")
    ax.tick_params(labelsize=9, color="#b5bac0", labelcolor=INK, left=False)
    return handles


def _curve(ax: Axes, one: Series, style: dict[str, Any]) -> Any:
    color = style["color"]
    # off a logarithmic axis there is no place to draw: leave a gap, which _frame counts in words
    y = [math.nan if one.log_y and value <= 0 else value for value in one.y]
    if one.marker_only:
        style |= {"linestyle": "none", "markersize": 6}
        if one.low:
            below = [max(value - low, 0.0) for value, low in zip(one.y, one.low, strict=True)]
            above = [max(high - value, 0.0) for value, high in zip(one.y, one.high, strict=True)]
            ax.errorbar(one.x, y, (below, above), fmt="none", ecolor=color, elinewidth=1, alpha=0.6)
    elif one.low:
        ax.fill_between(one.x, one.low, one.high, color=color, alpha=0.15, linewidth=0)
    line = ax.plot(one.x, y, markevery=1 if one.marker_only else max(1, len(one.x) // 40), **style)[0]
    for x, value, label in zip(one.x, y, one.point_labels, strict=False):
        if math.isfinite(value):
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            ax.annotate(_plain(label), (x, value), fontsize=8, color=color, **place)
    return line


def _frame(ax: Axes, curves: Sequence[Series]) -> None:
    """Grid, spines and ticks of one panel."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    ax.grid(True, color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5bac0")
    ax.tick_params(which="both", labelsize=9, color="#b5bac0", labelcolor=INK)
    positions = sorted({x for one in curves for x in one.x})
    if any(one.log_x for one in curves):
        if len(positions) <= _ALL_TICKS and not any(one.marker_only for one in curves):
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(positions, [number(x) for x in positions])
        else:
            _log_ticks(ax.xaxis, ax.get_xlim())
    elif all(x == int(x) for x in positions):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if any(one.log_y for one in curves):
        _log_ticks(ax.yaxis, ax.get_ylim())
        hidden = sum(y <= 0 for one in curves for y in one.y)
        if hidden:
            count = f"{hidden} points" if hidden > 1 else "1 point"
            ax.set_xlabel(f"{ax.get_xlabel()}\n({count} at or below 0, off this axis)")


def _log_ticks(axis: Any, ends: tuple[float, float]) -> None:
    """Labels such as 0.02 instead of powers, and enough of them on a short axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    span = max(ends) / min(ends)
    if span < 5:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _show_ceiling(ax: Axes, curves: Sequence[Series]) -> None:
    """Accuracies next to a chance line keep 1.0 in sight: no zoom makes "near chance" look far."""
    drawn = [y for one in curves for y in (*one.y, *one.low, *one.high) if math.isfinite(y)]
    chances = [one.chance for one in curves if one.chance is not None]
    if chances and drawn and min(drawn) >= 0 and max(drawn) <= 1 and not any(one.log_y for one in curves):
        ax.set_ylim(max(min(*drawn, *chances) - 0.06, -0.03), 1.03)


def _plain(words: str) -> str:
    """Text that matplotlib draws as it is: no mathtext, no control characters, not hidden from the legend."""
    words = "".join(c if c.isprintable() else " " for c in words).replace("$", r"\$")
    return f"\u200a{words}" if words.startswith("_") else words
