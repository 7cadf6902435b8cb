"""What the page of an audit shows is in its JSON: numbers of its tables, series of its figures; and what was not counted."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from test_audit_rules import FACTS, PLAIN, scores

from repe_unlearn.audit import Report, compare, verdict_report
from repe_unlearn.audit.controls import compared
from repe_unlearn.audit.leak import leaks
from repe_unlearn.audit.scores import curves
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.verdict import Measure, Thresholds, verdict

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")
LINES = Thresholds(margin=0.25)


@functools.cache
def report() -> Report:
    """An audit with one attack that works, one that finds nothing and one that is too weak on the original."""
    found = {
        "behaviour.unseen": {"edited": scores(-2, -2), "original": scores(8, -2)},
        "lens": {"edited": scores(3.123, -2.4), "original": scores(8, -2)},
        "probe.linear": {"edited": scores(-1.98, -2), "original": scores(8, -2)},
        "perturb.int4": {"edited": scores(1, -2), "original": scores(1.5, -2)},
    }
    for name, models in found.items():
        for model, one in models.items():
            table = {0: dict(one.values), 1: {i: v / 3 for i, v in one.values.items()}}
            drawn = curves(table, FACTS, f"Curve of {name}", y_label="nats")
            models[model] = type(one)(name, "T0" if "behaviour" in name else "T1", one.values, "nats", drawn)
    battery = {name: compared(models, FACTS, PLAIN) for name, models in found.items()}
    asked = leaks([battery.pop("behaviour.unseen")])
    tried = leaks(list(battery.values()))
    harms = (Measure("kl.neutral", 0.01234, 0.0101, 0.0199, 0.05), Measure("neighbours", 0.111, 0.08, 0.2))
    return verdict_report.report(
        verdict(asked, tried, harms, LINES, budget="quick level, 12 s"),
        asked,
        tried,
        harms,
        controls={"random edit": tried},
        found=found,
        facts=FACTS,
        lines=LINES,
        details={"seed": "0", "not attacked": "everything else"},
    )


class _Tables(HTMLParser):
    """Collects the text of table cells, tiles and alternative texts, and the titles of figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.alts: list[str] = []
        self.titles: list[str] = []
        self._into: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append(dict(attrs)["alt"] or "")
        if tag in ("td", "th", "h3"):
            into = self.titles if tag == "h3" else self.cells
            into.append("")
            self._into.append(into)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h3"):
            self._into.pop()

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into[-1][-1] += data


def leaves(content: Any) -> Iterator[float]:
    """Every number of a JSON value, those inside of texts too."""
    if isinstance(content, bool) or content is None:
        return
    if isinstance(content, int | float):
        yield float(content)
    elif isinstance(content, str):
        yield from (float(found) for found in NUMBER.findall(content))
    else:
        for one in content.values() if isinstance(content, dict) else content:
            yield from leaves(one)


def untraced(shown: str, content: Any) -> list[str]:
    """Return the numbers of a text that no number of a JSON value rounds to."""
    known = list(leaves(content))

    def traced(word: str) -> bool:
        mantissa, _, exponent = word.partition("e")
        step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        return any(abs(float(word) - one) <= 0.5000001 * step for one in known)

    return [word for word in NUMBER.findall(shown.replace("−", "-")) if not traced(word)]


def test_every_number_of_the_tables_and_every_series_of_the_figures_is_in_the_json() -> None:
    pytest.importorskip("matplotlib")
    page, content = _Tables(report().to_html()), json.loads(report().to_json())
    numbers = NUMBER.findall(" ".join(page.cells))
    assert len(numbers) > 40
    assert untraced(" ".join(page.cells), content) == []
    assert untraced(" ".join(page.alts), content["series"]) == []
    drawn = dict.fromkeys(one["figure"] for one in content["series"])
    assert page.titles == list(drawn)
    assert len(page.alts) == len(drawn)
    assert [
        Series(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})
        for one in content["series"]
    ] == [*report().series]
    labels = {(one["figure"], one["label"]) for one in content["series"]}
    for alt in page.alts:
        assert any(alt.startswith(f"{figure}. ") and f"{label}: " in alt for figure, label in labels)


def test_a_number_from_elsewhere_is_noticed() -> None:
    content = json.loads(report().to_json())
    value = next(one["value"] for one in content["checks"] if one["name"] == "leak.lens")
    assert untraced(f"{value:.3f}", content) == []
    assert untraced(f"{value + 0.0137:.3f} and 77.7", content) == [f"{value + 0.0137:.3f}", "77.7"]


def test_what_was_not_counted_says_so_and_why() -> None:
    (check,) = (one for one in report().checks if one.name == "leak.perturb.int4")
    assert math.isnan(check.value)
    why = "too weak on the original"
    assert why in check.note
    record = next(one for one in json.loads(report().to_json())["checks"] if one["name"] == check.name)
    assert record["value"] is None
    assert why in record["note"]
    row = next(line for line in report().to_markdown().splitlines() if "leak.perturb.int4 |" in line)
    assert "| not counted |" in row
    assert why in row
    cells = _Tables(report().to_html()).cells
    at = cells.index("not counted")
    assert "int4" in " ".join(cells[at - 2 : at])
    assert any(why in cell for cell in cells[at : at + 4])
    console = Console(file=StringIO(), width=220)
    console.print(report().table())
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "not counted" in said
    assert why in said
    for shown in (report().to_markdown(), " ".join(cells), said, str(report())):
        assert "NaN" not in shown


def test_two_audits_side_by_side_say_why_too() -> None:
    both = compare(report(), report(), names=("A", "B"))
    assert "| leak.perturb.int4 | not counted | not counted |" in both.to_markdown()
    assert both.to_markdown().count("too weak on the original") == 2
    cells = _Tables(both.to_html()).cells
    assert cells.count("not counted") == 2
    assert "NaN" not in " ".join(cells)
