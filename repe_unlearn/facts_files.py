"""Read facts from files: our own JSONL, tables, question-answer sets, true and false statements, and free text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FileFormatError, InputError, NotEnoughDataError
from .facts import Fact, Facts, Role, Sample, draw
from .readers import Table, read_csv, read_jsonl

__all__ = ["Corpus", "read", "read_counterfact", "read_facts", "read_kept", "read_table", "read_tofu"]

_WORDINGS = {
    "seen": ("Question: {subject}\nAnswer:",),
    "unseen": ("Q: {subject}\nA:", "Please answer the question.\n{subject}\nThe answer is:"),
}
_COUNTERFACT = ("label", "relation", "subject", "target")
_BAR = "|"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Free text to forget or to retain, passage by passage.

    Attributes:
        texts: passages without surrounding spaces, none of them empty.
        name: of the corpus.

    Raises:
        NotEnoughDataError: no passage.
    """

    texts: tuple[str, ...]
    name: str = "corpus"

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(text.strip() for text in self.texts if text.strip()))
        if not self.texts:
            raise NotEnoughDataError(f"{self.name!r} holds no text; needed at least one passage.")

    @classmethod
    def read(cls, path: str | Path, *, column: str = "text") -> Corpus:
        """Read passages: those between blank lines of a .txt file, or one column of a .jsonl file.

        Raises:
            InputError: no such file, another suffix, or no such column.
            FileFormatError: not UTF-8, or a line that is no JSON object; the message gives the line.
            NotEnoughDataError: no text.
        """
        path = Path(path)
        if path.suffix == ".jsonl":
            return cls(tuple(read_jsonl(path).texts(column, blank=True)), path.stem)
        if path.suffix != ".txt":
            raise InputError(f"{path} ends in {path.suffix!r}; needed a .txt or .jsonl file of texts.")
        if not path.is_file():
            raise InputError(f"there is no file {str(path)!r}; check the path.")
        try:
            return cls(tuple(re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))), path.stem)
        except UnicodeDecodeError as error:
            raise FileFormatError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
            ) from error

    def samples(self) -> tuple[Sample, ...]:
        """Return the passages as samples whose every token counts."""
        return tuple(Sample("", text) for text in self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self)} passages, {sum(len(t.split()) for t in self.texts)} words)"


def read(source: str | Path, **options: Any) -> Facts:
    """Do what ``Facts.read`` says."""
    path = Path(source)
    if path.is_dir():
        return read_tofu(path / "forget.jsonl", path / "retain.jsonl", **options)
    if path.suffix == ".jsonl":
        return read_facts(path, **options)
    if path.suffix == ".csv":
        columns = read_csv(path).columns
        kind = read_counterfact if set(_COUNTERFACT) <= set(columns) else read_table
        return kind(path, **options)
    if path.suffix:
        raise InputError(f"{path} ends in {path.suffix!r}; needed .jsonl, .csv, or a folder.")
    return Facts.builtin(str(source), **options)


def read_facts(path: str | Path) -> Facts:
    """Do what ``Facts.from_jsonl`` says."""
    table = read_jsonl(path)
    head, *rows = table.rows
    if not isinstance(head.get("templates"), dict):
        asked = {"question", "answer"} <= set(head)
        raise FileFormatError(
            f"{path}: the first line has no 'templates'; needed relation -> form -> list of wordings, as Facts.to_jsonl "
            "writes them."
            + (" For files of questions and answers there is Facts.from_tofu." if asked else "")
        )
    known = {"subject", "relation", "answer", "distractors", "role", "details"}
    facts = []
    for i, row in enumerate(rows, start=1):
        if wrong := {"subject", "relation", "answer"} - set(row) or set(row) - known:
            raise FileFormatError(
                f"{path}, fact {i}: the keys {sorted(wrong)} are missing or unknown; needed subject, relation, answer, "
                "and perhaps role, distractors, details."
            )
        if not isinstance(row.get("distractors", []), list) or not isinstance(row.get("details", {}), dict):
            raise FileFormatError(
                f"{path}, fact {i}: needed a list of distractors, and an object of details."
            )
        facts.append(Fact(**row))
    return Facts(
        tuple(facts), _wordings(head["templates"], str(path)), str(head.get("name", Path(path).stem))
    )


def read_tofu(
    forget: str | Path,
    retain: str | Path,
    *,
    neighbour: str | Path | None = None,
    question: str = "question",
    answer: str = "answer",
    perturbed: str = "perturbed_answer",
) -> Facts:
    """Do what ``Facts.from_tofu`` says."""
    files: dict[Role, str | Path | None] = {"forget": forget, "retain": retain, "neighbour": neighbour}
    facts: list[Fact] = []
    for role, path in files.items():
        if path is not None:
            facts += _asked(path, role, question, answer, perturbed)
    return Facts(tuple(facts), {"question": _WORDINGS}, Path(forget).stem)


def read_kept(source: str | Path) -> Facts:
    """Read facts that should stay: one file of questions and answers in the manner of TOFU, or what ``read`` takes."""
    path = Path(source)
    if path.suffix == ".jsonl" and {"question", "answer"} <= set(read_jsonl(path).columns):
        facts = _asked(path, "retain", "question", "answer", "perturbed_answer")
        return Facts(tuple(facts), {"question": _WORDINGS}, path.stem)
    return read(source)


def _asked(path: str | Path, role: Role, question: str, answer: str, perturbed: str) -> list[Fact]:
    """Return the facts of one file of questions and answers."""
    table = read_jsonl(path)
    facts = []
    for i, (row, q, a) in enumerate(zip(table.rows, table.texts(question), table.texts(answer), strict=True)):
        wrong = row.get(perturbed, [])
        wrong = [wrong] if isinstance(wrong, str) else wrong
        if not isinstance(wrong, list) or not all(isinstance(text, str) for text in wrong):
            raise FileFormatError(f"{path}, row {i}: {perturbed!r} holds {wrong!r}; needed texts.")
        # A perturbed answer that is the right one would be no wrong option.
        others = dict.fromkeys(text.strip() for text in wrong if text.strip() != a.strip())
        facts.append(Fact(q.strip(), "question", a.strip(), tuple(others), role))
    return facts


def read_counterfact(path: str | Path, *, forget: float = 0.5, distractors: int = 3, seed: int = 0) -> Facts:
    """Do what ``Facts.from_counterfact_csv`` says."""
    if not 0 < forget <= 1:
        raise InputError(f"got forget={forget}; needed a share of the subjects, above 0 and at most 1.")
    table = read_csv(path)
    table.check(_COUNTERFACT)
    if (labels := set(table.texts("label"))) != {"0", "1"}:
        raise InputError(
            f"{path}: the labels are {', '.join(sorted(labels))}; needed statements that are true (1) and such that are "
            "false (0)."
        )
    true: dict[tuple[str, str], str] = {}
    false: dict[tuple[str, str], dict[str, None]] = {}
    pools: dict[str, list[str]] = {}
    for i, row in enumerate(table.rows):
        relation, subject, target = (row[name].strip() for name in _COUNTERFACT[1:])
        if relation.count("{}") != 1:
            raise FileFormatError(
                f"{path}, row {i + table.first}: the wording {relation!r} has not one {{}} for the subject."
            )
        if row["label"] == "1":
            true.setdefault((relation, subject), target)
            pools.setdefault(relation, []).append(target)
        else:
            false.setdefault((relation, subject), {})[target] = None
    rng = random.Random(seed)
    subjects = sorted({subject for _, subject in true})
    chosen = set(rng.sample(subjects, max(1, round(forget * len(subjects)))))
    facts = []
    for (relation, subject), target in true.items():
        wrong = [text for text in false.get((relation, subject), ()) if text != target][:distractors]
        more = draw(pools[relation], {target, *wrong}, distractors - len(wrong), rng)
        role: Role = "forget" if subject in chosen else "retain"
        facts.append(Fact(subject, relation, target, (*wrong, *more), role))
    wordings = {relation: {"seen": (relation.replace("{}", "{subject}"),)} for relation in pools}
    return Facts(tuple(facts), wordings, Path(path).stem)


def read_table(
    path: str | Path, *, templates: str | Path | Mapping[str, Mapping[str, Any]] | None = None
) -> Facts:
    """Do what ``Facts.from_csv`` says."""
    table = read_csv(path)
    columns = [name for name in table.columns if name in ("seen", "unseen", "reversed", "multi_hop")]
    table.check(("subject", "relation", "answer"))
    if templates is None and "seen" not in columns:
        raise InputError(
            f"{path} has no column 'seen'; needed one with wordings, separated by {_BAR}, or templates=."
        )
    plain = {"subject", "relation", "answer", "role", "distractors", *columns}
    facts = tuple(
        Fact(
            row["subject"].strip(),
            row["relation"].strip(),
            row["answer"].strip(),
            _parts(row.get("distractors", "")),
            row.get("role", "").strip() or "forget",  # type: ignore[arg-type]  # Facts checks it
            {name: text.strip() for name, text in row.items() if name not in plain},
        )
        for row in table.rows
    )
    wordings = _collected(table, columns) if templates is None else _given(templates)
    return Facts(facts, wordings, Path(path).stem)


def _collected(table: Table, columns: list[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return relation -> form -> the wordings that any of its rows gives."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in table.rows:
        forms = found.setdefault(row["relation"].strip(), {})
        for form in columns:
            forms[form] = tuple(dict.fromkeys((*forms.get(form, ()), *_parts(row[form]))))
    return found


def _given(templates: str | Path | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[str, ...]]]:
    if isinstance(templates, Mapping):
        return _wordings(templates, "templates=")
    try:
        return _wordings(json.loads(Path(templates).read_text(encoding="utf-8-sig")), str(templates))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{templates} is no JSON file ({error}); needed wordings.") from error


def _wordings(found: Any, source: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return relation -> form -> wordings, or refuse what is not of that shape."""
    forms = list(found.values()) if isinstance(found, Mapping) else [None]
    for form in forms:
        if not isinstance(form, Mapping) or not all(
            isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
            for texts in form.values()
        ):
            raise FileFormatError(
                f"{source} holds no wordings ({form!r}); needed relation -> form -> list of texts, such as "
                '{"capital": {"seen": ["The capital of {subject} is"]}}.'
            )
    return {
        relation: {form: tuple(texts) for form, texts in forms.items()} for relation, forms in found.items()
    }


def _parts(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split(_BAR) if part.strip())
