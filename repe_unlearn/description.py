"""Describe a contrast in numbers: what a reader wants to know before trusting a result on it."""

from __future__ import annotations

import html
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repe_unlearn.contrast import Contrast, Example

__all__ = ["Description", "describe"]

_EXAMPLES = 3
_ROWS = 60  # a table of a thousand templates helps nobody


@dataclass(frozen=True, slots=True)
class Description:
    """The numbers of one contrast; prints as a readable table.

    Attributes:
        name: name of the contrast.
        kind: "classes", "reals" or "tokens".
        n: number of prompts.
        counts: (class, prompts) pairs, for tokens (class, words); for reals (statistic, value) pairs.
        n_groups: number of distinct groups (pairs and single prompts stand in where there is no group).
        n_templates: number of distinct templates, 0 if there are none.
        n_pairs: number of named pairs.
        mean_words: mean number of words of a prompt (separated by whitespace).
        mean_characters: mean number of characters of a prompt.
        balance: (template, prompts of each class in the order of the classes) of every template; empty for
            reals.
        duplicates: number of prompts whose text occurred before.
        conflicts: number of texts that occur with different labels: no model can tell these apart.
        dropped: prompts that a split left out.
        shown: up to three pairs (or single prompts) as (label, text) tuples.
    """

    name: str
    kind: str
    n: int
    counts: tuple[tuple[str, float], ...]
    n_groups: int
    n_templates: int
    n_pairs: int
    mean_words: float
    mean_characters: float
    balance: tuple[tuple[str, tuple[int, ...]], ...]
    duplicates: int
    conflicts: int
    dropped: int
    shown: tuple[tuple[tuple[str, str], ...], ...]

    def line(self) -> str:
        """One line with the most important numbers.

        Returns:
            For example `Contrast('gender': 100 prompts, female 50 / male 50, 50 pairs, 16 groups, 40
            templates)`.
        """
        counts = " / ".join(f"{what} {value:g}" for what, value in self.counts)
        parts = [f"{self.n} prompts", counts]
        parts += [f"{self.n_pairs} pairs"] if self.n_pairs else []
        parts += [f"{self.n_groups} groups"]
        parts += [f"{self.n_templates} templates"] if self.n_templates else []
        parts += [f"{self.dropped} dropped"] if self.dropped else []
        return f"Contrast({self.name!r}: {', '.join(parts)})"

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.kind})"]
        lines += [f"  {what:<20} {value}" for what, value in self._facts()]
        if self.balance:
            lines += ["  prompts per template" if self.kind == "classes" else "  labelled words per template"]
            lines += [
                f"    {' / '.join(map(str, row)):<13} {template}" for template, row in self.balance[:_ROWS]
            ]
            lines += self._more()
        lines += ["  examples"]
        for pair in self.shown:
            lines += [f"    {label:<13} {text}" for label, text in pair]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def cells(*values: object) -> str:
            return "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in values) + "</tr>"

        facts = "".join(cells(*fact) for fact in self._facts())
        shown = "".join(cells(label, text) for pair in self.shown for label, text in pair)
        balance = "".join(cells(" / ".join(map(str, row)), t) for t, row in self.balance[:_ROWS])
        balance += "".join(cells("", line.strip()) for line in self._more())
        folded = (
            f"<details><summary>per template</summary><table>{balance}</table></details>" if balance else ""
        )
        title = f"<b>{html.escape(self.name)}</b> ({html.escape(self.kind)})"
        return f"<div>{title}<table>{facts}</table>{folded}<table>{shown}</table></div>"

    def _more(self) -> list[str]:
        rest = len(self.balance) - _ROWS
        return [f"    ... and {rest} more templates"] if rest > 0 else []

    def _facts(self) -> list[tuple[str, str]]:
        counts = ", ".join(f"{what} {value:g}" for what, value in self.counts)
        what = {"classes": "prompts per class", "tokens": "words per class", "reals": "values"}[self.kind]
        return [
            ("prompts", str(self.n)),
            (what, counts),
            ("groups", str(self.n_groups)),
            ("templates", str(self.n_templates)),
            ("pairs", str(self.n_pairs)),
            ("mean length", f"{self.mean_words:.1f} words, {self.mean_characters:.1f} characters"),
            ("duplicate texts", f"{self.duplicates} ({self.conflicts} texts with different labels)"),
            ("dropped by split", str(self.dropped)),
        ]


def describe(contrast: Contrast) -> Description:
    """Count what `Description` lists.

    Args:
        contrast: any contrast.

    Returns:
        A frozen record.
    """
    texts = contrast.texts
    templates = [template for template in contrast.templates if template]
    labels_of: dict[str, set[object]] = defaultdict(set)
    for example in contrast:
        labels_of[example.text].add(example.label)
    return Description(
        name=contrast.name,
        kind=contrast.kind,
        n=len(contrast),
        counts=_counts(contrast),
        n_groups=len(set(contrast.groups)),
        n_templates=len(set(templates)),
        n_pairs=len({example.pair for example in contrast if example.pair}),
        mean_words=statistics.fmean(len(text.split()) for text in texts),
        mean_characters=statistics.fmean(map(len, texts)),
        balance=_balance(contrast),
        duplicates=len(texts) - len(set(texts)),
        conflicts=sum(len(labels) > 1 for labels in labels_of.values()),
        dropped=contrast.dropped,
        shown=_shown(contrast),
    )


def _ids(example: Example) -> tuple[int, ...]:
    label = example.label
    return tuple(y for y in label if y >= 0) if isinstance(label, tuple) else (int(label),)


def _counts(contrast: Contrast) -> tuple[tuple[str, float], ...]:
    if contrast.kind == "reals":
        values = [float(example.label) for example in contrast if not isinstance(example.label, tuple)]
        return (
            ("min", min(values)),
            ("mean", statistics.fmean(values)),
            ("max", max(values)),
            ("sd", statistics.pstdev(values)),
        )
    seen = Counter(y for example in contrast for y in _ids(example))
    return tuple((klass, seen[i]) for i, klass in enumerate(contrast.classes))


def _balance(contrast: Contrast) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if contrast.kind == "reals":
        return ()
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    for example in contrast:
        if example.template:
            seen[example.template].update(_ids(example))
    return tuple((t, tuple(seen[t][i] for i in range(len(contrast.classes)))) for t in sorted(seen))


def _shown(contrast: Contrast) -> tuple[tuple[tuple[str, str], ...], ...]:
    units: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair, example in zip(contrast.pairs, contrast.examples, strict=True):
        units[pair].append((_label_text(contrast, example), example.text))
    # Evenly spaced: neighbours often come from one file, author or template.
    found = list(units.values())
    step = max(1, len(found) // _EXAMPLES)
    return tuple(tuple(unit) for unit in found[::step][:_EXAMPLES])


def _label_text(contrast: Contrast, example: Example) -> str:
    if isinstance(example.label, tuple):
        return " ".join(contrast.classes[y] if y >= 0 else "-" for y in example.label)
    return f"{example.label:g}" if contrast.kind == "reals" else contrast.classes[int(example.label)]
