"""Facts: pieces of knowledge to forget or to keep, each asked for in several wordings."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from .errors import InputError, NotEnoughDataError
from .example import Span

__all__ = ["FORMS", "ROLES", "Fact", "Facts", "Form", "Question", "Role", "Sample"]

Role = Literal["forget", "retain", "neighbour", "decoy"]
Form = Literal["seen", "unseen", "reversed", "multi_hop", "in_context"]
ROLES: tuple[Role, ...] = get_args(Role)
FORMS: tuple[Form, ...] = get_args(Form)

_WRITTEN: tuple[Form, ...] = ("seen", "unseen", "reversed", "multi_hop")  # in_context is made from the others
_SLOT = re.compile(r"\{(\w+)\}")
_SHOWN = 3  # facts that an in-context question shows first
_SPLITS = 256  # random splits among which split_relearn chooses


@dataclass(frozen=True, slots=True)
class Fact:
    """One subject, one relation, one answer.

    Attributes:
        subject: what it is about, e.g. ``France``.
        relation: names the templates, e.g. ``capital``.
        answer: the right continuation, without a leading space.
        distractors: wrong answers of the same kind; a question offers them all.
        role: ``forget``; ``retain`` (must survive); ``neighbour`` (must survive, and is about what is forgotten: same
            subjects); ``decoy`` (the model never knew it, so an attack must not "recover" it).
        details: further slots for templates, e.g. ``{"people": "French"}``.
    """

    subject: str
    relation: str
    answer: str
    distractors: tuple[str, ...] = ()
    role: Role = "forget"
    details: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distractors", tuple(self.distractors))
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))

    def __hash__(self) -> int:
        return hash((self.subject, self.relation, self.answer, self.role))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping can be neither copied nor pickled.
        return Fact, (
            self.subject,
            self.relation,
            self.answer,
            self.distractors,
            self.role,
            dict(self.details),
        )

    def slots(self) -> dict[str, str]:
        """Return what the slots of templates are filled with."""
        return {**self.details, "subject": self.subject, "answer": self.answer}


@dataclass(frozen=True, slots=True)
class Question:
    """One fact in one wording: a prompt, its right continuation and wrong ones.

    Attributes:
        prompt: does not end in a space.
        answer: continuation, beginning with a space.
        options: wrong continuations, beginning with a space; not one of them is right.
        fact: index of the fact in its ``Facts``.
        form: sort of wording.
        template: the wording itself.
        subject: characters of the prompt that name the subject; None where it is not named.
    """

    prompt: str
    answer: str
    options: tuple[str, ...]
    fact: int
    form: Form
    template: str
    subject: Span | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A text whose end, the completion, is what a loss counts; an empty prompt counts the whole text."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """An immutable set of facts with their roles, and the wordings in which each relation is asked for.

    Args:
        facts: at least one.
        templates: relation -> form -> wordings. A wording is the text up to the answer, with the slots ``{subject}`` and
            those in ``Fact.details``. Forms: ``seen`` (the only ones that may be used for solving), ``unseen`` (for
            measuring), ``reversed`` (with ``{answer}``, asking for the subject), ``multi_hop`` (does not name the
            subject). ``in_context`` questions are seen ones behind other facts of the relation.
        name: of the set.

    Raises:
        NotEnoughDataError: no fact.
        InputError: a fact without a ``seen`` wording, a wording with a slot that is not there or used for both solving
            and measuring, an unknown role or form, an answer among its distractors, an empty string.

    Example:
        >>> facts = Facts.of([("France", "Paris"), ("Japan", "Tokyo", "retain")], ["The capital of {subject} is"])
        >>> facts.questions("seen", roles=["forget"])[0].prompt
        'The capital of France is'
    """

    facts: tuple[Fact, ...]
    templates: Mapping[str, Mapping[str, tuple[str, ...]]]
    name: str = "facts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        frozen = {
            relation: MappingProxyType({form: tuple(texts) for form, texts in forms.items()})
            for relation, forms in self.templates.items()
        }
        object.__setattr__(self, "templates", MappingProxyType(frozen))
        if not self.facts:
            raise NotEnoughDataError(f"{self.name!r} holds no facts; at least one is needed.")
        for relation in frozen:
            _check_templates(relation, frozen[relation])
        for i, fact in enumerate(self.facts):
            _check_fact(i, fact, frozen)

    @classmethod
    def of(
        cls,
        rows: Iterable[Sequence[str]],
        seen: Sequence[str],
        unseen: Sequence[str] = (),
        *,
        relation: str = "fact",
        distractors: int = 3,
        seed: int = 0,
        name: str = "facts",
    ) -> Facts:
        """Return facts of one relation from rows (subject, answer) or (subject, answer, role).

        Args:
            rows: role is ``forget`` where it is not given.
            seen: wordings for solving.
            unseen: wordings for measuring.
            relation: its name.
            distractors: how many other answers of these rows become wrong options of each.
            seed: of that choice.
            name: of the set.

        Raises:
            as the constructor.
        """
        rows = [tuple(row) for row in rows]
        for i, row in enumerate(rows):
            if len(row) not in (2, 3):
                raise InputError(
                    f"row {i} has {len(row)} fields; needed (subject, answer) or (subject, answer, role)."
                )
        pool = [row[1] for row in rows]
        rng = random.Random(seed)
        facts = []
        for subject, answer, *rest in rows:
            role: Any = rest[0] if rest else "forget"  # the constructor checks it
            facts.append(Fact(subject, relation, answer, draw(pool, {answer}, distractors, rng), role))
        return cls(tuple(facts), {relation: {"seen": tuple(seen), "unseen": tuple(unseen)}}, name)

    @classmethod
    def builtin(cls, name: str, **options: Any) -> Facts:
        """Return a set that comes with the package.

        Args:
            name: ``capitals`` (real knowledge: forget those of one continent) or ``planted`` (fictional people, for a
                model that is trained on them).
            options: ``repe_unlearn.builtin.capitals`` and ``planted`` say which.

        Raises:
            InputError: another name.
        """
        from . import builtin

        makers: dict[str, Callable[..., Facts]] = {"capitals": builtin.capitals, "planted": builtin.planted}
        if name not in makers:
            raise InputError(f"got {name!r}; needed one of {', '.join(makers)}, or a file.")
        return makers[name](**options)

    def __reduce__(self) -> tuple[Any, ...]:
        templates = {relation: dict(forms) for relation, forms in self.templates.items()}
        return Facts, (self.facts, templates, self.name)

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(f.role == role for f in self.facts)} {role}" for role in self.roles)
        return f"Facts({self.name!r}, {counts}; relations {', '.join(self.relations)})"

    def _repr_html_(self) -> str:
        from .tables import html_table

        rows = [(f.role, f.relation, f.subject, f.answer, ", ".join(f.distractors)) for f in self.facts[:8]]
        return html_table(
            repr(self), ("role", "relation", "subject", "answer", "distractors"), rows, len(self)
        )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that occur."""
        return tuple(role for role in ROLES if any(f.role == role for f in self.facts))

    @property
    def relations(self) -> tuple[str, ...]:
        """The relations that occur."""
        return tuple(dict.fromkeys(f.relation for f in self.facts))

    def where(self, keep: Callable[[Fact], bool]) -> Facts:
        """Return the facts for which ``keep`` is true.

        Raises:
            NotEnoughDataError: none is left.
        """
        return replace(self, facts=tuple(f for f in self.facts if keep(f)))

    def only(self, *roles: Role, relation: str | None = None) -> Facts:
        """Return the facts with one of these roles, and of one relation if it is given.

        Raises:
            NotEnoughDataError: none is left.
        """
        return self.where(lambda f: f.role in roles and relation in (None, f.relation))

    def having(self, indices: Iterable[int]) -> Facts:
        """Return the facts with these indices.

        Raises:
            NotEnoughDataError: none is left.
        """
        return replace(self, facts=tuple(self.facts[i] for i in sorted(set(indices))))

    def questions(
        self, *forms: Form, roles: Iterable[Role] | None = None, seed: int = 0
    ) -> tuple[Question, ...]:
        """Return every fact in every wording of some forms; facts without wordings of a form have none.

        Args:
            forms: default ``seen``.
            roles: default all.
            seed: of the facts that an in-context question shows first.

        Raises:
            InputError: an unknown form.
        """
        forms = forms or ("seen",)
        if unknown := set(forms) - set(FORMS):
            raise InputError(f"got the form {min(unknown)!r}; needed one of {', '.join(FORMS)}.")
        wanted = set(ROLES if roles is None else roles)
        found: list[Question] = []
        for form in forms:
            for i, fact in enumerate(self.facts):
                if fact.role in wanted:
                    found += self._asked(i, fact, form, seed)
        return tuple(found)

    def samples(self, *forms: Form, roles: Iterable[Role] | None = None) -> tuple[Sample, ...]:
        """Return the questions with their right answers, e.g. for gradient methods."""
        return tuple(Sample(q.prompt, q.answer) for q in self.questions(*forms, roles=roles))

    def split_relearn(self, seed: int = 0) -> tuple[Facts, Facts]:
        """Return two halves of what is to be forgotten: one to teach again, one to test whether that brings it back.

        No subject is in both. Of many random splits the one is taken whose halves have the most similar answers, so that
        the answers of one half say as little as possible about those of the other.

        Raises:
            NotEnoughDataError: fewer than two subjects are to be forgotten.
        """
        forget = self.where(lambda f: f.role == "forget")
        subjects = sorted({f.subject for f in forget})
        if len(subjects) < 2:
            raise NotEnoughDataError(
                f"one subject is to be forgotten ({subjects[0]!r}); two halves need at least two."
            )

        def uneven(taught: set[str]) -> int:
            surplus: Counter[tuple[str, str]] = Counter()
            for f in forget:
                surplus[f.relation, f.answer] += 1 if f.subject in taught else -1
            return sum(abs(count) for count in surplus.values())

        rng = random.Random(seed)
        taught = min((set(rng.sample(subjects, len(subjects) // 2)) for _ in range(_SPLITS)), key=uneven)
        return forget.where(lambda f: f.subject in taught), forget.where(lambda f: f.subject not in taught)

    def training_text(self, *roles: Role, repeats: int = 1, seed: int = 0) -> list[str]:
        """Return sentences that teach these facts in their ``seen`` wordings, shuffled.

        Args:
            roles: default ``forget``, ``retain`` and ``neighbour``: all but decoys.
            repeats: how often each sentence occurs.
            seed: of the order.

        Raises:
            NotEnoughDataError: no facts of these roles.
        """
        taught: tuple[Role, ...] = roles or ("forget", "retain", "neighbour")
        sentences = [f"{s.text}." for s in self.samples("seen", roles=taught)] * repeats
        if not sentences:
            raise NotEnoughDataError(f"there are no facts to teach with the roles {', '.join(taught)}.")
        random.Random(seed).shuffle(sentences)
        return sentences

    def _asked(self, i: int, fact: Fact, form: Form, seed: int) -> Iterator[Question]:
        source: Form = "seen" if form == "in_context" else form
        slots = fact.slots()
        for template in self.templates[fact.relation].get(source, ()):
            prompt, subject = fill(template, slots)
            if form == "in_context":
                shown = self._shown(i, template, seed)
                if not shown:
                    return
                prompt, subject = (
                    shown + prompt,
                    subject and (subject[0] + len(shown), subject[1] + len(shown)),
                )
            answer, options = fact.answer, fact.distractors
            if form == "reversed":
                answer, options = fact.subject, self._other_subjects(fact, seed)
            yield Question(prompt, f" {answer}", tuple(f" {o}" for o in options), i, form, template, subject)

    def _shown(self, i: int, template: str, seed: int) -> str:
        """Return some other facts of the relation, not to be forgotten, as text."""
        fact = self.facts[i]
        others = [
            f
            for f in self.facts
            if f.relation == fact.relation and f.subject != fact.subject and f.role == "retain"
        ]
        chosen = random.Random(f"{seed} {i}").sample(others, min(_SHOWN, len(others)))
        return "".join(f"{fill(template, f.slots())[0]} {f.answer}.\n" for f in chosen)

    def _other_subjects(self, fact: Fact, seed: int) -> tuple[str, ...]:
        right = {f.subject for f in self.facts if (f.relation, f.answer) == (fact.relation, fact.answer)}
        pool = [f.subject for f in self.facts if f.relation == fact.relation]
        rng = random.Random(f"{seed} {fact.subject} {fact.relation}")
        return draw(pool, right, max(1, len(fact.distractors)), rng)

    def to_jsonl(self, path: str | Path) -> Path:
        """Write one line per fact, and the wordings in a first line of their own.

        Raises:
            OutputExistsError: the file exists.
        """
        from .tensorfile import write_text

        head = {
            "name": self.name,
            "templates": {r: {f: list(t) for f, t in fs.items()} for r, fs in self.templates.items()},
        }
        lines = [json.dumps(head, ensure_ascii=False)]
        for f in self.facts:
            row = {"subject": f.subject, "relation": f.relation, "answer": f.answer, "role": f.role}
            extra = {"distractors": list(f.distractors), "details": dict(f.details)}
            lines.append(json.dumps({**row, **{k: v for k, v in extra.items() if v}}, ensure_ascii=False))
        return write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Facts:
        """Read what ``to_jsonl`` wrote.

        Raises:
            InputError: no such file, or as the constructor.
            FileFormatError: a line that is none of these; the message says which.
            NotEnoughDataError: no fact.
        """
        from .facts_files import read_facts

        return read_facts(path)

    @classmethod
    def from_tofu(
        cls,
        forget: str | Path,
        retain: str | Path,
        *,
        neighbour: str | Path | None = None,
        question: str = "question",
        answer: str = "answer",
        perturbed: str = "perturbed_answer",
    ) -> Facts:
        """Read questions and answers in the manner of TOFU, one JSON object per line; the subject is the question.

        Args:
            forget: file of what is to be forgotten.
            retain: file of what must survive.
            neighbour: file of what must survive and is about the same things.
            question: column of questions.
            answer: column of answers.
            perturbed: column of wrong answers, a list of texts; facts without it have no distractors.

        Raises:
            InputError: no such file or column, or as the constructor.
            FileFormatError: a line that is no JSON object; the message gives the line.
            NotEnoughDataError: an empty file.
        """
        from .facts_files import read_tofu

        return read_tofu(
            forget, retain, neighbour=neighbour, question=question, answer=answer, perturbed=perturbed
        )

    @classmethod
    def from_counterfact_csv(
        cls, path: str | Path, *, forget: float = 0.5, distractors: int = 3, seed: int = 0
    ) -> Facts:
        """Read true and false statements in the manner of CounterFact, to forget those about some subjects.

        The file has the columns ``label`` (1 true, 0 false), ``relation`` (the wording with ``{}`` for the subject),
        ``subject`` and ``target``. Each relation has this one wording: there are no unseen ones.

        Args:
            path: the file.
            forget: share of the subjects to forget, drawn at random; the others are ``retain``.
            distractors: wrong answers per fact: those of its false statements, then other answers to the same wording.
            seed: of both draws.

        Raises:
            InputError: no such file or column, statements that are all true or all false, or as the constructor.
            FileFormatError: a row that does not fit; the message gives the line.
        """
        from .facts_files import read_counterfact

        return read_counterfact(path, forget=forget, distractors=distractors, seed=seed)

    @classmethod
    def from_csv(
        cls, path: str | Path, *, templates: str | Path | Mapping[str, Mapping[str, Any]] | None = None
    ) -> Facts:
        """Read one fact per row.

        Args:
            path: file with the columns ``subject``, ``relation``, ``answer``, and perhaps ``role`` (default forget),
                ``distractors`` and the forms ``seen``, ``unseen``, ``reversed``, ``multi_hop``. Several distractors or
                wordings in a cell are separated by ``|``; a relation has the wordings of all its rows. Any other column
                is a slot for templates.
            templates: relation -> form -> list of wordings, or a JSON file of these, in place of the columns.

        Raises:
            InputError: no such file or column, or as the constructor.
            FileFormatError: a row with too many or too few cells, or templates that are none.
            NotEnoughDataError: no rows.
        """
        from .facts_files import read_table

        return read_table(path, templates=templates)

    @classmethod
    def read(cls, source: str | Path, **options: Any) -> Facts:
        """Read facts from wherever a name points to.

        Args:
            source: a ``.jsonl`` file (``from_jsonl``), a ``.csv`` file (``from_counterfact_csv`` where it has that
                one's columns, else ``from_csv``), a folder with ``forget.jsonl`` and ``retain.jsonl`` (``from_tofu``), or
                the name of a built-in set (``builtin``).
            options: go to that function.

        Raises:
            InputError: nothing of this name, or another suffix.
            as the functions named.

        Example:
            >>> len(Facts.read("planted", forget=2, retain=2, decoys=2, relations=1, options=2))
            6
        """
        from .facts_files import read

        return read(source, **options)


def fill(template: str, slots: Mapping[str, str]) -> tuple[str, Span | None]:
    """Return a wording with its slots filled, and the characters that name the subject."""
    text, subject, end = "", None, 0
    for match in _SLOT.finditer(template):
        text += template[end : match.start()]
        if match[1] == "subject" and subject is None:
            subject = (len(text), len(text) + len(slots["subject"]))
        text, end = text + slots[match[1]], match.end()
    return text + template[end:], subject


def draw(pool: Iterable[str], right: Iterable[str], count: int, rng: random.Random) -> tuple[str, ...]:
    """Return wrong answers drawn from a pool without repeats, sorted first so that the draw depends on the seed only."""
    wrong = sorted(set(pool) - set(right))
    return tuple(rng.sample(wrong, min(count, len(wrong))))


def _check_templates(relation: str, forms: Mapping[str, tuple[str, ...]]) -> None:
    if unknown := set(forms) - set(_WRITTEN):
        raise InputError(
            f"relation {relation!r} has the form {min(unknown)!r}; needed one of {', '.join(_WRITTEN)}."
        )
    if not forms.get("seen"):
        raise InputError(f"relation {relation!r} has no 'seen' wording; needed at least one to solve with.")
    for form, texts in forms.items():
        slot = "answer" if form == "reversed" else "subject"
        for text in texts:
            has = slot in _SLOT.findall(text)
            if has != (form != "multi_hop") or text != text.rstrip() or not text:
                needed = "no {subject}" if form == "multi_hop" else "{" + slot + "}"
                raise InputError(
                    f"relation {relation!r}, form {form!r}: got the wording {text!r}; needed one with {needed} that does "
                    "not end in a space."
                )
    if both := set(forms["seen"]) & set(forms.get("unseen", ())):
        raise InputError(
            f"relation {relation!r}: {min(both)!r} is both seen and unseen; keep wordings apart."
        )


def _check_fact(i: int, fact: Fact, templates: Mapping[str, Mapping[str, tuple[str, ...]]]) -> None:
    where = f"fact {i} ({fact.subject!r}, {fact.relation!r})"
    if fact.role not in ROLES:
        raise InputError(f"{where} has the role {fact.role!r}; needed one of {', '.join(ROLES)}.")
    for text in (fact.subject, fact.relation, fact.answer, *fact.distractors):
        if not isinstance(text, str) or not text.strip() or text != text.strip():
            raise InputError(f"{where} holds {text!r}; needed text without spaces around it.")
    if fact.answer in fact.distractors:
        raise InputError(f"{where} has its answer {fact.answer!r} among the distractors; remove it there.")
    if fact.relation not in templates:
        raise InputError(
            f"{where}: no wordings for this relation; there are some for {', '.join(templates)}."
        )
    slots = fact.slots()
    for texts in templates[fact.relation].values():
        for text in texts:
            if missing := set(_SLOT.findall(text)) - set(slots):
                raise InputError(
                    f"{where} has no {min(missing)!r}, which the wording {text!r} asks for; add it to details."
                )
