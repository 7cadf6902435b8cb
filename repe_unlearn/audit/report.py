"""Report: checks, curves and facts of one verification, and the forms it can be read in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from repe_unlearn.audit import text
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.record import from_record, from_strict_json, to_record, to_strict_json
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.writing import refuse_taken, write_together
from repe_unlearn.errors import FileFormatError, InputError, MissingDependencyError, VerificationError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Check", "Report", "Series"]

SCHEMA = 2
_ROWS_SINCE = 2  # series of schema 1 have no rows
KIND = "repe_unlearn.report"
FILES = ("report.json", "report.md", "report.html")
_LISTED = 10  # failed checks spelled out by raise_if_failed; more would bury the first ones


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Checks, curves and facts of one verification; it passes if some check has a verdict and none fails.

    Args:
        title: what was verified.
        subtitle: one line of context.
        checks: every measurement, in the order in which it should be read.
        series: the curves behind the checks.
        facts: what is needed to judge and repeat the run: model, concept, prompts, solver, machine, versions,
            seconds, seeds. Some keys have a place of their own in the HTML: ``"command"`` (how to reproduce),
            ``"not attacked"`` (limits), and of an audit ``"verdict"`` (in place of passed or failed) and ``"why"``.
        verdict: one line in plain words, by whoever made the report.

    Raises:
        InputError: an entry of ``checks`` or ``series`` has the wrong type.

    Example:
        >>> report = Report("Demo", "", (Check.at_most("probe", 0.5, 0.6, control=0.9),), (), {"seed": "0"})
        >>> report.passed, len(report.failed)
        (True, 0)
    """

    title: str
    subtitle: str
    checks: tuple[Check, ...]
    series: tuple[Series, ...]
    facts: Mapping[str, str]
    verdict: str = ""

    def __post_init__(self):
        for field, kind in (("checks", Check), ("series", Series)):
            entries = tuple(getattr(self, field))
            for entry in entries:
                if not isinstance(entry, kind):
                    raise InputError(
                        f"{field} holds a {type(entry).__name__}; it may hold only {kind.__name__}."
                    )
            object.__setattr__(self, field, entries)
        for field in ("title", "subtitle", "verdict"):
            object.__setattr__(self, field, str(getattr(self, field)))
        facts = {str(key): str(value) for key, value in self.facts.items()}
        object.__setattr__(self, "facts", MappingProxyType(facts))

    @property
    def passed(self) -> bool:
        """True if at least one check has a verdict and every verdict is True."""
        verdicts = [check.passed for check in self.checks if check.passed is not None]
        return bool(verdicts) and all(verdicts)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks whose verdict is False, in order."""
        return tuple(check for check in self.checks if check.passed is False)

    def raise_if_failed(self) -> None:
        """Return silently exactly when the report passed.

        Raises:
            VerificationError: a check failed (at most 10 are listed with value and bound), or no check has a
                verdict, so that nothing was verified.

        Example:
            >>> Report("t", "", (Check.at_most("kl", 0.01, 0.05),), (), {}).raise_if_failed()
        """
        if self.passed:
            return
        judged = sum(check.passed is not None for check in self.checks)
        if not judged:
            raise VerificationError(
                f"{self.title}: none of the {len(self.checks)} checks has a verdict: nothing was verified. "
                "Add checks with a bound (Check.at_most, Check.at_least)."
            )
        failed = self.failed
        lines = [f"{self.title}: {len(failed)} of {judged} checks failed."]
        lines += [f"  {text.one_line(check)}" for check in failed[:_LISTED]]
        if len(failed) > _LISTED:
            lines.append(f"  and {len(failed) - _LISTED} more")
        lines.append("Read the whole report (print it, or save it to a folder) before using this model.")
        raise VerificationError("\n".join(lines))

    def table(self, max_rows: int = 40) -> Table:
        """A rich table: whole-model checks, then one row per name of the others; failed rows are never cut.

        Args:
            max_rows: at most this many rows unless more failed, at least 1.

        Returns:
            A ``rich.table.Table``.

        Raises:
            MissingDependencyError: rich is not installed.
            InputError: ``max_rows`` is below 1.

        Example:
            >>> Report("t", "", (Check.at_most("kl", 0.01, 0.05),), (), {}).table().row_count
            1
        """
        return text.to_table(self, max_rows)

    def to_markdown(self) -> str:
        """The report as GitHub Markdown, every string escaped.

        Returns:
            Headline, summary tables, failed checks, facts and limits; no figures.

        Example:
            >>> Report("Demo", "", (), (), {}).to_markdown().splitlines()[0]
            '# Demo'
        """
        return text.to_markdown(self)

    def to_json(self) -> str:
        """The whole report as strict JSON (RFC 8259, schema version 2), read back exactly by ``from_json``.

        Returns:
            Indented JSON. A number that is not finite is null, with ``not_finite`` beside it saying which.

        Example:
            >>> '"value": null' in Report("t", "", (Check.at_most("kl", float("nan"), 1),), (), {}).to_json()
            True
        """
        return to_strict_json(
            {
                "kind": KIND,
                "schema": SCHEMA,
                "title": self.title,
                "subtitle": self.subtitle,
                "verdict": self.verdict,
                "passed": self.passed,
                "facts": dict(self.facts),
                "checks": [to_record(check) for check in self.checks],
                "series": [to_record(series) for series in self.series],
            }
        )

    @classmethod
    def from_json(cls, source: str) -> Report:
        """The report that ``to_json`` wrote, equal in every field.

        Args:
            source: the JSON text itself (not a path).

        Returns:
            The report.

        Raises:
            FileFormatError: not JSON, not a report, another schema version, a missing, unknown or unusable
                field, or a stored verdict that its checks do not support.

        Example:
            >>> Report.from_json(Report("Demo", "", (), (), {}).to_json()).title
            'Demo'
        """
        content = from_strict_json(source)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise FileFormatError(
                f'this JSON is not a report: it has no "kind": "{KIND}". Pass a report.json.'
            )
        if content.get("schema") not in range(1, SCHEMA + 1):
            raise FileFormatError(
                f"report schema {content.get('schema')!r} cannot be read; this release reads 1 to {SCHEMA}. "
                "Use the release that wrote it, or run the verification again."
            )
        named = {field.name for field in dataclasses.fields(cls)} | {"kind", "schema", "passed"}
        if set(content) != named:
            raise FileFormatError(
                f"the report lacks {sorted(named - set(content))} and has unknown "
                f"{sorted(set(content) - named)}; it was cut or edited. Run the verification again."
            )
        texts = [content["title"], content["subtitle"], content["verdict"]]
        if not isinstance(content["facts"], dict) or not all(
            isinstance(value, str) for value in (*texts, *content["facts"].values())
        ):
            raise FileFormatError("title, subtitle, verdict and every fact of a report must be strings.")
        if not isinstance(content["checks"], list) or not isinstance(content["series"], list):
            raise FileFormatError("checks and series of a report must be lists.")
        if content["schema"] < _ROWS_SINCE:
            content["series"] = [
                {**entry, "rows": []} if isinstance(entry, dict) else entry for entry in content["series"]
            ]
        report = cls(
            title=content["title"],
            subtitle=content["subtitle"],
            checks=tuple(
                from_record(Check, entry, f"checks[{i}]") for i, entry in enumerate(content["checks"])
            ),
            series=tuple(
                from_record(Series, entry, f"series[{i}]") for i, entry in enumerate(content["series"])
            ),
            facts=content["facts"],
            verdict=content["verdict"],
        )
        if content["passed"] is not report.passed:
            raise FileFormatError(
                f"the report says passed={content['passed']!r}, but its checks say {report.passed}; "
                "it was edited. Run the verification again."
            )
        return report

    def to_html(self) -> str:
        """The report as one HTML page that loads nothing from elsewhere and runs no script.

        Returns:
            The page, light and dark, with its figures inside.

        Raises:
            MissingDependencyError: jinja2 (or matplotlib, when there are series) is not installed.

        Example:
            >>> Report("Demo", "", (), (), {}).to_html()[:15]
            '<!doctype html>'
        """
        from repe_unlearn.audit.html import page  # imports this module

        return page(self)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write report.json, report.md and report.html, each atomically; a failure leaves no new file behind.

        With ``force``, a failure between two moves can leave one file new and another old, both whole.

        Args:
            folder: where to; made if it does not exist.
            force: replace reports that are already there.

        Returns:
            The path of report.html.

        Raises:
            OutputExistsError: one of the three files exists and ``force`` is False.
            MissingDependencyError: the HTML needs jinja2 and matplotlib.

        Example:
            >>> import tempfile
            >>> Report("Demo", "", (), (), {}).save(tempfile.mkdtemp()).name
            'report.html'
        """
        folder = Path(folder)
        refuse_taken(folder, FILES, force=force)  # before the figures are drawn, which takes seconds
        contents: dict[str, str] = dict(
            zip(FILES, (self.to_json(), self.to_markdown(), self.to_html()), strict=True)
        )
        write_together(folder, contents, force=force)
        return folder / "report.html"

    def __str__(self) -> str:
        return text.to_text(self)

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {text.tally(self)})"

    def _repr_html_(self) -> str | None:
        """The summary for a notebook; None (so that the text is shown) where jinja2 is not installed."""
        from repe_unlearn.audit.html import fragment  # imports this module

        try:
            return fragment(self)
        except MissingDependencyError:
            return None
