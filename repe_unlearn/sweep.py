"""Sweep: one method with many settings, what each does, and which of them no other setting beats."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from .audit.neutral import NEUTRAL
from .errors import FileFormatError, InputError, RepeUnlearnError
from .facts import Facts
from .fingerprints import fingerprint
from .measured import GOALS, Measured, attempt, measure
from .methods import Method, method_named
from .tables import html_table
from .tensorfile import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "Sweep", "front", "sweep"]

_SHOWN = ("forget_seen", "forget_unseen", "margin", "retain", "neighbour", "kl", "relative", "seconds")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One setting of a method.

    Attributes:
        options: what was varied.
        measured: what came out; None where the method failed with this setting.
        error: why it failed, or "".
    """

    options: Mapping[str, Any]
    measured: Measured | None
    error: str = ""

    @property
    def label(self) -> str:
        """The options in a few words."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """What a method does over a grid of settings.

    Attributes:
        method: its name.
        before: the model without an edit.
        points: one per setting, in the order of the grid.
    """

    method: str
    before: Measured
    points: tuple[Point, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per point: options, what was measured, ``kept``, ``front``, ``error``."""
        best = {id(point) for point in self.front()}
        return [
            {
                **point.options,
                **(dict(point.measured.rows()) if point.measured else {}),
                "kept": self.kept(point),
                "front": id(point) in best,
                "error": point.error,
            }
            for point in self.points
        ]

    def kept(self, point: Point) -> float:
        """Return the share that a point leaves of what is to be kept; NaN where it failed."""
        return math.nan if point.measured is None else point.measured.kept(self.before)

    def front(self) -> tuple[Point, ...]:
        """Return the points that no other beats: less forget accuracy, more kept, less KL."""
        done = [(p, p.measured) for p in self.points if p.measured is not None]
        return tuple(front(done, lambda pair: _scores(pair[1], self.before), lambda pair: pair[0]))

    def best(self, kept: float = GOALS.kept, kl: float = GOALS.kl) -> Point:
        """Return the point with the least forget accuracy among those that keep enough and cost little.

        Among equals the one with the smaller KL.

        Args:
            kept: least share to be left of retain and of neighbours.
            kl: most KL on neutral text, nats per token.

        Raises:
            InputError: no point does; the message names the one that misses by least.
        """
        done = [(p, p.measured) for p in self.points if p.measured is not None]
        if not done:
            raise InputError(f"none of {len(self.points)} settings of {self.method} ran; see Sweep.rows().")

        def missing(m: Measured) -> float:
            share = m.kept(self.before)
            return max(0.0, kept - (0.0 if math.isnan(share) else share)) + max(0.0, m.kl - kl)

        within = [(p, m) for p, m in done if missing(m) == 0]
        if not within:
            point, m = min(done, key=lambda pair: missing(pair[1]))
            raise InputError(
                f"no setting of {self.method} keeps {kept:g} at a KL of at most {kl:g}; nearest is {point.label}, which "
                f"keeps {m.kept(self.before):.2f} at {m.kl:.3f}. Ask for less, or widen the grid."
            )
        return min(within, key=lambda pair: (pair[1].forget_unseen, pair[1].kl))[0]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw forget accuracy against what is kept; the points that none beats are joined and named.

        Raises:
            InputError: no point ran.
            MissingDependencyError: matplotlib is not installed.
        """
        from .audit.figures import plot
        from .audit.series import Series

        figure = f"{self.method}: forgotten and kept"
        drawn = []
        for label, points in (("all settings", self.points), ("none is better", self.front())):
            found = [(p, m) for p in points if (m := p.measured) is not None]
            found.sort(key=lambda pair: pair[1].forget_unseen)
            if found:
                drawn.append(
                    Series(
                        figure,
                        label,
                        x=tuple(m.forget_unseen for _, m in found),
                        y=tuple(m.kept(self.before) for _, m in found),
                        x_label="forget accuracy, unseen wordings",
                        y_label="kept, share of before",
                        marker_only=label == "all settings",
                        point_labels=() if label == "all settings" else tuple(p.label for p, _ in found),
                        caption="Up and to the left is better.",
                    )
                )
        if not drawn:
            raise InputError(f"no setting of {self.method} ran; there is nothing to draw.")
        return plot(drawn, ax)

    def __repr__(self) -> str:
        failed = sum(p.measured is None for p in self.points)
        return f"Sweep({self.method!r}, {len(self.points)} points, {failed} failed, {len(self.front())} on the front)"

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for p in self.points for name in p.options))
        table = [
            [row.get(name, "") for name in names]
            + [_short(row.get(name)) for name in (*_SHOWN, "kept")]
            + ["yes" if row["front"] else row["error"]]
            for row in self.rows()
        ]
        return html_table(repr(self), [*names, *_SHOWN, "kept", "on the front"], table)


def sweep(
    model: nn.Module,
    tokenizer: Any,
    facts: Facts,
    method: str | Method,
    grid: Mapping[str, Sequence[Any]],
    *,
    fixed: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    texts: Sequence[str] = NEUTRAL,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Return what a method does at every point of a grid; the model is left as it was.

    A setting that fails (a loss that becomes NaN, no weight to dampen) is a point with an error, not the end of the sweep.

    Args:
        model: in memory and not quantised.
        tokenizer: its fast tokenizer.
        facts: what to forget and to keep; only ``seen`` wordings go into the method.
        method: one of ``METHODS``.
        grid: option -> values; every combination is a point.
        fixed: options that all points share.
        folder: one JSON file per point is kept there, and points that are there are not run again.
        texts: neutral text for the KL.
        seed: of every point.
        progress: show progress bars.

    Raises:
        InputError: an empty grid, or an option that the method does not have.
        FileFormatError: a file in the folder is damaged.

    Example:
        ``sweep(model, tok, facts, "npo", {"steps": [20, 40], "lr": [1e-5, 1e-4]}, folder="npo").best()``
    """
    method = method_named(method) if isinstance(method, str) else method
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*map(list, grid.values()))]
    if not grid or not points:
        raise InputError("got an empty grid; needed option -> values, at least one of each.")
    for options in points:
        method.settings({**(fixed or {}), **options})
    inputs = {"model": fingerprint(model), "facts": _digest(facts), "texts": list(texts), "seed": seed}

    def kept_at(name: str, options: Mapping[str, Any]) -> Path | None:
        key = json.dumps({**inputs, "name": name, "options": options}, sort_keys=True, default=str)
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        return None if folder is None else Path(folder) / f"{name}-{digest}.json"

    before = _kept(
        kept_at("before", {}),
        lambda: Point({}, measure(model, tokenizer, facts, texts=texts, progress=progress)),
    ).measured
    assert before is not None  # only a method can fail
    done = []
    for options in tqdm(points, desc=method.name, unit="setting", disable=not progress, leave=False):
        settings = method.settings({**(fixed or {}), **options})

        def run(options: dict[str, Any] = options, settings: dict[str, Any] = settings) -> Point:
            try:
                found = attempt(
                    model, tokenizer, facts, method, settings, texts=texts, seed=seed, progress=progress
                )
            except RepeUnlearnError as error:
                return Point(options, None, str(error))
            return Point(options, found[1])

        done.append(_kept(kept_at(method.name, settings), run, options))
    return Sweep(method.name, before, tuple(done))


def front(
    items: Iterable[Any], scores: Callable[[Any], Sequence[float]], give: Callable[[Any], Any] = lambda x: x
) -> list[Any]:
    """Return the items that no other beats, the smallest first score first; smaller scores are better.

    One item beats another if none of its scores is worse and one is better. A score of NaN never beats.

    Example:
        >>> front([(0, 1), (1, 0), (1, 1)], lambda item: item)
        [(0, 1), (1, 0)]
    """
    scored = [
        (tuple(math.inf if math.isnan(s) else s for s in scores(item)), i, give(item))
        for i, item in enumerate(items)
    ]
    left = [
        entry
        for entry in scored
        if not any(
            other[0] != entry[0] and all(a <= b for a, b in zip(other[0], entry[0], strict=True))
            for other in scored
        )
    ]
    return [item for _, _, item in sorted(left, key=lambda entry: entry[:2])]


def _scores(m: Measured, before: Measured) -> tuple[float, float, float]:
    return m.forget_unseen, -m.kept(before), m.kl


def _kept(path: Path | None, run: Callable[[], Point], options: Mapping[str, Any] | None = None) -> Point:
    """Return a point from its file, or run it and write that."""
    if path is not None and path.exists():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = record["measured"]
            measured = None if found is None else Measured.from_json(json.dumps(found))
            return Point(dict(options or {}), measured, record["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is no point of a sweep ({error}); delete it.") from error
    point = run()
    if path is not None:
        measured = None if point.measured is None else json.loads(point.measured.to_json())
        write_text(path, json.dumps({"measured": measured, "error": point.error}, indent=1))
    return point


def _digest(facts: Facts) -> str:
    asked = [
        (q.prompt, q.answer, q.options, facts.facts[q.fact].role) for q in facts.questions("seen", "unseen")
    ]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and not math.isnan(value) else ""
