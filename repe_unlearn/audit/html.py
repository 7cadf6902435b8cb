"""A report as one HTML page: no script, nothing loaded from elsewhere, every string escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from repe_unlearn.audit import text
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.summary import Row, per_site, whole_model
from repe_unlearn.errors import MissingDependencyError

MAX_DETAIL_ROWS = (
    2000  # all per-site tables together; beyond it a phone no longer scrolls and the file passes 1 MB
)
MAX_SVG_BYTES = 300_000  # a cloud of thousands of points is smaller as pixels
_TILES = 6
_OWN_PLACE = ("command", "not attacked", "verdict", "why")


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure ready for the page: data URIs of its wide and its stacked form, and the words around it."""

    title: str
    wide: str
    narrow: str
    width: int
    alt: str
    caption: str
    reading: str


def page(report: Report) -> str:
    """The whole page.

    Args:
        report: what to show.

    Returns:
        HTML source that starts with ``<!doctype html>``.

    Raises:
        MissingDependencyError: jinja2, or with series matplotlib, is not installed.

    Example:
        >>> "<script" in page(Report("<script>", "", (), (), {}))
        False
    """
    return _render(report, whole=True, pictures=_pictures(report.series))


def fragment(report: Report) -> str:
    """The summary without figures and page frame, for a notebook cell.

    Args:
        report: what to show.

    Returns:
        One ``<div>`` with its own style sheet, which touches nothing outside it.

    Raises:
        MissingDependencyError: jinja2 is not installed.

    Example:
        >>> "<html" in fragment(Report("Demo", "", (), (), {}))
        False
    """
    return _render(report, whole=False, pictures=())


def _render(report: Report, *, whole: bool, pictures: Sequence[Picture]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "the HTML report needs jinja2: pip install 'repe-unlearn[verify]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": text.number,
        "value": text.value,
        "interval": text.with_interval,
        "bound": _bound,
    }
    source = files("repe_unlearn.audit").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    judged = sum(check.passed is not None for check in report.checks)
    state = "pass" if report.passed else "fail" if judged else "none"
    grouped = per_site(report.checks)
    content: dict[str, Any] = {
        "report": report,
        "whole_page": whole,
        "state": state,
        "word": report.facts.get(
            "verdict", {"pass": "Passed", "fail": "Failed", "none": "No verdict"}[state]
        ).replace("_", " "),
        "why": report.facts.get("why", "").splitlines(),
        "tally": text.tally(report),
        "tiles": _tiles(report, grouped),
        "pictures": pictures,
        "whole": whole_model(report.checks),
        "grouped": grouped,
        "detail_rows": _detail_rows(grouped),
        "facts": [(key, value) for key, value in report.facts.items() if key not in _OWN_PLACE],
        "command": report.facts.get("command", ""),
        "limits": text.limits(report),
        "not_attacked": report.facts.get("not attacked", text.NOT_ATTACKED),
    }
    return environment.from_string(source).render(content)


def _bound(words: str) -> str:
    return words.replace("<=", "≤").replace(">=", "≥")


def _tiles(report: Report, grouped: Sequence[Row]) -> list[Check | Row]:
    """The numbers to read first: what failed, then what was judged against a control, then the rest."""
    entries: list[Check | Row] = [*whole_model(report.checks), *grouped]

    def rank(entry: Check | Row) -> int:
        verdict = entry.verdict if isinstance(entry, Row) else entry.passed
        if verdict is None:
            return 3
        return 0 if verdict is False else 1 if entry.control is not None else 2

    chosen = sorted(entries, key=rank)[:_TILES]
    return [entry for entry in entries if any(entry is one for one in chosen)]


def _detail_rows(grouped: Sequence[Row]) -> int:
    """How many rows every per-site table may show."""
    if sum(len(row.checks) for row in grouped) <= MAX_DETAIL_ROWS:
        return MAX_DETAIL_ROWS
    return max(10, MAX_DETAIL_ROWS // len(grouped))


def _pictures(series: Sequence[Series]) -> tuple[Picture, ...]:
    if not series:
        return ()
    from repe_unlearn.audit.figures import draw

    wide, narrow = draw(series, titled=False), draw(series, titled=False, narrow=True)
    pictures = []
    for title, figure in wide.items():
        group = [one for one in series if one.figure == title]
        pictures.append(
            Picture(
                title=title,
                wide=_data_uri(figure),
                narrow=_data_uri(narrow[title]),
                width=round(figure.get_size_inches()[0] * 96),
                alt=_alt(title, group),
                caption=next((one.caption for one in group if one.caption), ""),
                reading=_reading(group),
            )
        )
    return tuple(pictures)


def _data_uri(figure: Any) -> str:
    from repe_unlearn.audit.figures import to_png, to_svg

    # an <img> of a data URI, not inline SVG: ids cannot collide, and no string inside can act as HTML
    content, kind = to_svg(figure).encode("utf-8", "replace"), "svg+xml"
    if len(content) > MAX_SVG_BYTES:
        content, kind = to_png(figure), "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _alt(title: str, group: Sequence[Series]) -> str:
    ranges = []
    for one in group:
        finite = [y for y in one.y if y == y]
        span = f"{text.number(min(finite))} to {text.number(max(finite))}" if finite else "no values"
        panel = f" ({one.panel})" if one.panel else ""
        ranges.append(f"{one.label}{panel}: {span}")
    return f"{title}. {'; '.join(ranges)}."


def _reading(group: Sequence[Series]) -> str:
    """How to read the figure: which line is which, which is the control, what would be bad."""
    from repe_unlearn.audit.figures import role_of

    if all(one.rows for one in group):
        return f"The bars are {group[0].band}." if any(one.low for one in group) else ""

    labels = list(dict.fromkeys(one.label for one in group))
    by_role = {
        role: [label for label in labels if role_of(label) == role] for role in ("before", "after", "random")
    }
    parts = []
    banded = next((one.band for one in group if one.low), None)
    if banded:
        shape = "bars" if all(one.marker_only for one in group if one.low) else "bands"
        parts.append(f"The {shape} are {banded}.")
    controls = []
    if by_role["before"]:
        controls.append(f"“{by_role['before'][0]}” is the model without the edit")
    if by_role["random"]:
        label = by_role["random"][0]
        random = "an edit of equal size in random directions"
        control = random if label == "random edit" else "the same procedure with no knowledge of the concept"
        controls.append(f"“{label}” is {control}")
    if controls:
        parts.append(f"Controls: {'; '.join(controls)}.")
    chance = sorted({one.chance for one in group if one.chance is not None})
    if chance and by_role["after"]:
        parts.append(f"Dashed: chance ({', '.join(f'{c:g}' for c in chance)}).")
        bad = f"“{by_role['after'][0]}” clearly off the dashed line"
        if by_role["before"]:
            bad += f", or “{by_role['before'][0]}” already on it, for then there was nothing to find"
        parts.append(f"Bad: {bad}.")
    return " ".join(parts)
