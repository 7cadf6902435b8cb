"""Card: the section on an audit for a model card."""

from __future__ import annotations

import math

from repe_unlearn.audit import text
from repe_unlearn.audit.report import Report
from repe_unlearn.errors import InputError

_PARTS = ("leak.", "cost.", "refusal.")
_SHOWN = 24  # rows; a card is read by people


def card(report: Report) -> str:
    """Return a Markdown section that says what an audit found, at which budget, and what it does not say.

    Args:
        report: of ``audit``.

    Returns:
        Markdown from a heading of the second level on, every string escaped.

    Raises:
        InputError: a report without a verdict, for example of ``verify``.

    Example:
        ``export.checkpoint("base", patch, "edited", card=card(report))``
    """
    facts = require_audit(report)
    rows = [one for one in report.checks if one.name.startswith(_PARTS) and not math.isnan(one.value)]
    body = [
        (
            one.name,
            text.with_interval(one),
            one.bound or "—",
            text.WORDS[one.passed],
            text.number(one.control),
        )
        for one in rows[:_SHOWN]
    ]
    reasons = [f"- {text.escape(line)}" for line in facts.get("why", "").splitlines()]
    parts = [
        "## Unlearning audit",
        f"**{text.escape(facts['verdict'])}.** {text.escape(report.verdict)}",
        f"Attacker: {text.escape(facts['attacker'])}. Budget: {text.escape(facts['budget'])}. "
        f"Facts: {text.escape(facts['facts'])}.",
        "\n".join(reasons),
        text.markdown_table(("measure", "value [95 %]", "limit", "", "random edit"), body),
        f"Not attacked: {text.escape(facts['not attacked'])}.",
        "A leak is the share of the original's knowledge that an attack gets out: 0 a model that never knew, 1 the original. "
        "“Not recovered” holds for these attacks at this budget; it is no proof of erasure.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def require_audit(report: Report) -> dict[str, str]:
    """Return the facts of an audit's report.

    Raises:
        InputError: a report of something else.
    """
    if "verdict" not in report.facts:
        raise InputError(
            f"the report {report.title!r} has no verdict of an audit; needed one that 'audit' made."
        )
    return dict(report.facts)
