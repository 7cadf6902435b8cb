"""Compare two audits: what each of them found, attack by attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from repe_unlearn.audit import text
from repe_unlearn.audit.card import require_audit
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.writing import write_together
from repe_unlearn.errors import InputError

FILES = ("comparison.md", "comparison.html")
_PARTS = ("leak.", "cost.", "refusal.", "membership")
_SETTINGS = ("facts", "level", "seed", "attacker", "budget")
_SHOWN_MOST = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Two audits side by side.

    Attributes:
        names: of the two.
        reports: the two.
        rows: name of a check -> the check in each, None where it was not made.
    """

    names: tuple[str, str]
    reports: tuple[Report, Report]
    rows: dict[str, tuple[Check | None, Check | None]]

    def to_markdown(self) -> str:
        """Return a table of both as Markdown, every string escaped."""
        facts = [dict(one.facts) for one in self.reports]
        body = [("verdict", *(one["verdict"] for one in facts))]
        body += [(name, *map(_cell, pair)) for name, pair in self.rows.items()]
        parts = [
            "# Two audits",
            text.markdown_table(("", *self.names), body),
            "Intervals are of each audit by itself; two that overlap do not show that the models are alike.",
            *(
                f"{text.escape(f'{name}, {model}')}: {text.escape(check.note)}"
                for name, pair in self.rows.items()
                for model, check in zip(self.names, pair, strict=True)
                if check is not None and text.not_counted(check)
            ),
            *(
                f"They differ in {key}: {text.escape(a)} | {text.escape(b)}."
                for key, a, b in self.differences()
            ),
        ]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return both as one HTML page with a figure, which loads nothing from elsewhere.

        Raises:
            MissingDependencyError: jinja2 or matplotlib is not installed.
        """
        checks = [
            Check.information(
                f"{name} · {model}",
                check.value,
                low=check.low,
                high=check.high,
                note=f"limit {check.bound}" if check.bound else check.note,
            )
            for name, pair in self.rows.items()
            for model, check in zip(self.names, pair, strict=True)
            if check is not None
        ]
        verdicts = {
            f"verdict of {n}": r.facts["verdict"] for n, r in zip(self.names, self.reports, strict=True)
        }
        unlike = {f"unlike: {key}": f"{a} | {b}" for key, a, b in self.differences()}
        return Report(
            title="Two audits",
            subtitle=" against ".join(self.names),
            checks=tuple(checks),
            series=self._figure(),
            facts={"verdict": "Side by side", **verdicts, **unlike},
            verdict="; ".join(
                f"{name}: {value}" for name, value in zip(self.names, verdicts.values(), strict=True)
            ),
        ).to_html()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write comparison.md and comparison.html; a failure leaves no new file behind.

        Raises:
            OutputExistsError: one of them is there and ``force`` is False.
        """
        folder = Path(folder)
        write_together(
            folder, dict(zip(FILES, (self.to_markdown(), self.to_html()), strict=True)), force=force
        )
        return folder / FILES[1]

    def differences(self) -> list[tuple[str, str, str]]:
        """Return the settings in which the two audits differ: name, first, second."""
        a, b = (one.facts for one in self.reports)
        return [(key, a.get(key, ""), b.get(key, "")) for key in _SETTINGS if a.get(key) != b.get(key)]

    def _figure(self) -> tuple[Series, ...]:
        leaks = [
            name
            for name, pair in self.rows.items()
            if name.startswith("leak.") and any(one and math.isfinite(one.value) for one in pair)
        ]
        result = []
        for side, model in enumerate(self.names):
            found = [(i, self.rows[name][side], name) for i, name in enumerate(leaks)]
            drawn = [(i, one, name) for i, one, name in found if one is not None and math.isfinite(one.value)]
            if drawn:
                y, low, high = (
                    tuple(max(-_SHOWN_MOST, min(_SHOWN_MOST, at)) for at in values)
                    for values in zip(*(_interval(one) for _, one, _ in drawn), strict=True)
                )
                result.append(
                    Series(
                        "What comes back",
                        model,
                        tuple(float(i) for i, _, _ in drawn),
                        y,
                        low,
                        high,
                        y_label="leak (share of the original's knowledge)",
                        rows=tuple(name.removeprefix("leak.") for _, _, name in drawn),
                    )
                )
        return tuple(result)


def _interval(check: Check) -> tuple[float, float, float]:
    """Return value, low and high; a check without an interval is its own."""
    low, high = (check.value if end is None else end for end in (check.low, check.high))
    return check.value, low, high


def compare(a: Report, b: Report, *, names: tuple[str, str] = ("first", "second")) -> SideBySide:
    """Return two audits side by side, on all attacks and measures that at least one of them has.

    Args:
        a: the first report of ``audit``.
        b: the second.
        names: what to call them, two different ones.

    Raises:
        InputError: a report of something else, or one name for both.

    Example:
        ``compare(report_rmu, report_npo, names=("RMU", "NPO")).save("comparison")``
    """
    require_audit(a)
    require_audit(b)
    if len(set(names)) != 2:
        raise InputError(f"got the names {names}; needed two different ones.")
    made = [{one.name: one for one in report.checks if one.name.startswith(_PARTS)} for report in (a, b)]
    rows = {name: (made[0].get(name), made[1].get(name)) for name in (made[0] | made[1])}
    return SideBySide(names, (a, b), rows)


def _cell(check: Check | None) -> str:
    if check is None:
        return "not run"
    word = "" if check.passed is None else f", {text.WORDS[check.passed]}"
    return f"{text.with_interval(check)}{word}"
