"""Tables for notebooks, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], total: int | None = None
) -> str:
    """Return a table in which every text is escaped.

    Args:
        title: goes above the table.
        columns: names.
        rows: one value per column.
        total: number of rows if not all are shown; a last line then says how many are missing.

    Example:
        >>> html_table("a < b", ["n"], [[1]], total=3)
        '<b>a &lt; b</b><table><tr><th>n</th></tr><tr><td>1</td></tr><tr><td colspan="1">… and 2 more</td></tr></table>'
    """
    columns, rows = list(columns), list(rows)
    head = _line("th", columns)
    body = "".join(_line("td", row) for row in rows)
    missing = (total or 0) - len(rows)
    more = f'<tr><td colspan="{len(columns)}">… and {missing} more</td></tr>' if missing > 0 else ""
    return f"<b>{escape(title)}</b><table>{head}{body}{more}</table>"


def _line(tag: str, values: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values) + "</tr>"
