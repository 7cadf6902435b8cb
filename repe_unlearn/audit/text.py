"""A report as plain text, as a rich table and as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repe_unlearn.audit.summary import Row, per_site, whole_model
from repe_unlearn.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from rich.table import Table

    from repe_unlearn.audit.check import Check
    from repe_unlearn.audit.report import Report

COLUMNS = ("", "check", "value [95 %]", "bound", "control", "where / note")
WORDS = {True: "pass", False: "FAIL", None: "info"}
LIMITS = (
    "Linear guardedness is not removal. A linear probe at chance says that no linear reader of these "
    "activations finds the concept; a non-linear reader, or another layer, may still find it.",
    "Probes and prompts see what they were made to see. A passed check speaks for this model, these prompts "
    "and this budget, not for every way of asking.",
    "An edit that is only hooked in can be taken out by whoever holds the weights.",
    "A check that something is gone says nothing where its control meets the same bound.",
)
AUDIT_LIMITS = (
    "The verdict speaks for these attacks at this budget. “Not recovered” is not “proved erased”: a stronger attacker, or "
    "another question, may still find the knowledge.",
    "A leak is a share of what the original shows under the same attack, measured from facts that the model never knew. It "
    "is as good as these: they must be of the same kind and be asked in the same words.",
    "Facts that were planted for a test are easier to remove than knowledge from pretraining.",
)
NOT_ATTACKED = (
    "Not recorded. Treat every attack without a row in this report (relearning, rounding to few bits, "
    "undoing the edit, paraphrase, sampling, other languages) as not run."
)


def number(value: float | None) -> str:
    """A number for people: three or four significant digits, integers whole, ``NaN`` and ``—`` in words."""
    if value is None:
        return "—"
    if math.isnan(value):
        return "NaN"
    whole = math.isfinite(value) and value == int(value)
    if whole and abs(value) < 1e6:
        return f"{value:.0f}"
    if not whole and 0.01 <= abs(value) < 10:
        return f"{value:.3f}"
    digits = 3 if abs(value) < 0.01 else 4
    return re.sub(r"e([-+])0*(\d)", r"e\1\2", f"{value:.{digits}g}").replace("e+", "e")


def not_counted(check: Check) -> bool:
    """Whether nothing was measured and nothing is judged; the note says why."""
    return check.passed is None and math.isnan(check.value)


def value(check: Check) -> str:
    """The value alone, ``not counted`` where there is none."""
    return "not counted" if not_counted(check) else number(check.value)


def with_interval(check: Check) -> str:
    """``value [low, high]``, or the value alone."""
    if check.low is None and check.high is None:
        return value(check)
    return f"{number(check.value)} [{number(check.low)}, {number(check.high)}]"


def tally(report: Report) -> str:
    """How many checks passed, in words."""
    judged = sum(check.passed is not None for check in report.checks)
    silent = len(report.checks) - judged
    if not judged:
        return f"no verdict ({silent} information only)"
    count = f"{judged - len(report.failed)} of {judged} checks passed"
    return f"{count}, {silent} information only" if silent else count


def limits(report: Report) -> tuple[str, ...]:
    """What a report of this kind does not say."""
    return AUDIT_LIMITS if "verdict" in report.facts else LIMITS


def headline(report: Report) -> str:
    """The verdict of an audit, else PASSED, FAILED or NO VERDICT, with the count."""
    judged = any(check.passed is not None for check in report.checks)
    word = "PASSED" if report.passed else "FAILED" if judged else "NO VERDICT"
    return f"{report.facts.get('verdict', word)}: {tally(report)}"


def one_line(check: Check) -> str:
    """Name, site, value, bound and control of one check in a line."""
    where = f" at {check.site}" if check.site else ""
    bound = f", needed {check.bound}" if check.bound else ""
    control = f" (control {number(check.control)})" if check.control is not None else ""
    return f"{check.name}{where}: {with_interval(check)}{bound}{control}"


def cells(entry: Check | Row) -> tuple[str, ...]:
    """The texts of one table row, in the order of ``COLUMNS``."""
    if not isinstance(entry, Row):
        word = WORDS[entry.passed]
        return word, entry.name, with_interval(entry), entry.bound, number(entry.control), entry.note
    worst = entry.worst
    spread = f"median {number(entry.median)}, {number(entry.lowest)} to {number(entry.highest)}"
    if entry.verdict is None:
        return WORDS[None], entry.name, spread, "", number(entry.control), f"{len(entry.checks)} sites"
    word = f"{WORDS[entry.verdict]} {entry.passed}/{entry.judged}"
    where = f"worst {number(worst.value)} at {worst.site}"
    return word, entry.name, spread, worst.bound, number(entry.control), where


def rows(report: Report) -> tuple[Check | Row, ...]:
    """Whole-model checks, then one row per name of the per-site checks."""
    return (*whole_model(report.checks), *per_site(report.checks))


def to_text(report: Report) -> str:
    """The report for a terminal without colours."""
    lines = [report.title, report.subtitle, headline(report), report.verdict, ""]
    lines = [line for i, line in enumerate(lines) if line or i == 4]
    grid = [COLUMNS, *(cells(entry) for entry in rows(report))]
    widths = [max(len(row[i]) for row in grid) for i in range(len(COLUMNS))]
    for row in grid if len(grid) > 1 else []:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines).rstrip()


def to_table(report: Report, max_rows: int) -> Table:
    """See ``Report.table``."""
    if max_rows < 1:
        raise InputError(f"max_rows is {max_rows}; it must be at least 1.")
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError("Report.table needs rich: pip install 'rich>=13.7'") from error
    table = Table(title=Text(report.title), caption=Text(headline(report)), show_lines=False)
    for column in COLUMNS:
        justify = "right" if column == "control" else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in ("", "bound", "control"))
    entries = rows(report)
    shown = _kept(entries, max_rows)
    colours = {True: "green", False: "bold red", None: "dim"}
    for entry in shown:
        word, *others = cells(entry)
        if not isinstance(entry, Row) and entry.passed is not False and not not_counted(entry):
            others[-1] = ""  # a terminal is narrow: notes of what failed or was not counted only
        # Text, not str: a site or note such as "[red]" is data, never markup
        table.add_row(Text(word, style=colours[_verdict(entry)]), *(Text(other) for other in others))
    if len(shown) < len(entries):
        table.add_row("", Text(f"{len(entries) - len(shown)} more rows, none of them failed", style="dim"))
    return table


def to_markdown(report: Report) -> str:
    """See ``Report.to_markdown``."""
    parts = [f"# {escape(report.title)}"]
    parts += [escape(line) for line in (report.subtitle,) if line]
    parts.append(f"**{escape(headline(report))}**")
    parts += [escape(line) for line in (report.verdict,) if line]
    header = ("verdict", *COLUMNS[1:])
    whole, grouped = whole_model(report.checks), per_site(report.checks)
    if whole:
        parts += ["## Whole model", markdown_table(header, [cells(check) for check in whole])]
    if grouped:
        parts += ["## Per site", markdown_table(header, [cells(row) for row in grouped])]
    if "why" in report.facts:
        reasons = "\n".join(f"- {escape(line)}" for line in report.facts["why"].splitlines())
        parts += ["## Why", reasons]
    if report.failed:
        failed = [f"- {escape(one_line(check))}" for check in report.failed[:100]]
        if len(report.failed) > 100:
            failed.append(f"- and {len(report.failed) - 100} more in report.json")
        parts += ["## Failed checks", "\n".join(failed)]
    if report.facts:
        rest = [(key, value) for key, value in report.facts.items() if key != "why"]
        parts += ["## Facts", markdown_table(("what", "value"), rest)]
    said = [*limits(report), f"Not attacked: {report.facts.get('not attacked', NOT_ATTACKED)}"]
    parts += ["## Limits", "\n".join(f"- {escape(line)}" for line in said)]
    return "\n\n".join(parts) + "\n"


def escape(words: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line break, no table separator."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", words)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", words)  # inside a word an underscore is harmless


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, every cell of the body escaped."""
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdict(entry: Check | Row) -> bool | None:
    return entry.verdict if isinstance(entry, Row) else entry.passed


def _kept(entries: Sequence[Check | Row], max_rows: int) -> list[Check | Row]:
    """All failed entries and the first others up to ``max_rows``, in the original order."""
    room = max_rows - sum(_verdict(entry) is False for entry in entries)
    kept: list[Check | Row] = []
    for entry in entries:
        if _verdict(entry) is False:
            kept.append(entry)
        elif room > 0:
            kept.append(entry)
            room -= 1
    return kept
