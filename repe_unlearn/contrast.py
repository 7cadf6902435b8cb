"""Contrast: labelled prompts whose content and wording must not leak across splits."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repe_unlearn import readers
from repe_unlearn.description import Description, describe
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.example import Example, Kind, Span, check, class_ids, is_int, label_set, real, short
from repe_unlearn.splitting import Row, partition

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Contrast", "Example"]


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """Labelled prompts that show a concept: checked on construction, never changed afterwards.

    Attributes:
        name: what the concept is called in tables and reports.
        kind: "classes" (one class per prompt), "reals" (one number per prompt), "tokens" (one class per
            word).
        classes: names of the classes, `classes[label]`; empty for reals.
        examples: the prompts.
        dropped: prompts that `split` left out because they shared content with one side and wording with the
            other.

    Raises:
        NotEnoughDataError: no prompts, fewer prompts than classes, or one label only.
        InputError: a text, label or span is unusable; the message names the example, counting from 0.

    Example:
        >>> pairs = [("He is late.", "She is late."), ("His cat sleeps.", "Her cat sleeps.")]
        >>> contrast = Contrast.from_pairs(pairs, classes=("male", "female"), name="gender")
        >>> len(contrast), contrast.labels
        (4, (0, 1, 0, 1))
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    dropped: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "examples", tuple(self.examples))
        check(self)

    # ---- reading

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts."""
        return tuple(example.text for example in self.examples)

    @property
    def labels(self) -> tuple[int | float | tuple[int, ...], ...]:
        """Class id, real value or tuple of class ids of every prompt."""
        return tuple(example.label for example in self.examples)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of every prompt; its pair stands in where it has none, its text where it has neither."""
        return tuple(example.group or example.pair or example.text for example in self.examples)

    @property
    def templates(self) -> tuple[str, ...]:
        """The template of every prompt, "" where it has none."""
        return tuple(example.template for example in self.examples)

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pair of every prompt; an unpaired prompt stands alone under its own text."""
        return tuple(example.pair or example.text for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __repr__(self) -> str:
        return self.describe().line()

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    def units(self) -> tuple[int, float]:
        """How many pairs `sample` can take, and how many prompts one of them has on average.

        Without pairs the unit is one prompt of each class, so the smallest class counts; for reals and tokens it
        is a single prompt.
        """
        named = [example.pair for example in self.examples if example.pair]
        if named:
            return len(set(named)), len(named) / len(set(named))
        if self.kind == "classes":
            return min(Counter(self.labels).values()), float(len(self.classes))
        return len(self), 1.0

    def digest(self) -> str:
        """16 hex digits that change with any text, label, class, group or template."""
        content = repr(
            (self.kind, self.classes, [(e.text, e.label, e.group, e.template) for e in self.examples])
        )
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def describe(self) -> Description:
        """Count prompts, classes, groups, templates, pairs, lengths and duplicates.

        Returns:
            A frozen record that prints as a table.

        Example:
            >>> contrast = Contrast.from_labels(["good film", "bad film"], ["pos", "neg"], name="sentiment")
            >>> dict(contrast.describe().counts)
            {'neg': 1, 'pos': 1}
        """
        return describe(self)

    # ---- dividing

    def split(self, test: float = 0.25, seed: int = 0) -> tuple[Contrast, Contrast]:
        """Divide into (fit, heldout) so that no group, template, pair or text of one occurs in the other.

        Groups and templates are each divided. A prompt whose group is held out but whose template is not (or
        the
        other way round) belongs to neither side and is counted in `dropped` of both. Where all prompts share
        one
        template, or have none, only the groups are divided. Pairs stay whole.

        Args:
            test: share of `heldout` among the prompts kept, strictly between 0 and 1.
            seed: equal seeds give equal splits.

        Returns:
            Two contrasts with the same name, kind and classes; prompts keep their order.

        Raises:
            InputError: `test` is outside (0, 1).
            NotEnoughDataError: no split leaves two classes on both sides.

        Example:
            >>> fit, heldout = Contrast.builtin("gender", pairs=400).split(test=0.2)
            >>> set(fit.templates) & set(heldout.templates), set(fit.groups) & set(heldout.groups)
            (set(), set())
        """
        rows = [
            Row((e.group or e.pair or e.text, e.pair, e.text), e.template, label_set(e))
            for e in self.examples
        ]
        every = {y for row in rows for y in row.labels}
        sides = partition(rows, test=test, seed=seed, wanted=2 if self.kind == "reals" else len(every))
        dropped = len(rows) - sum(map(len, sides))
        fit, heldout = (
            replace(self, examples=tuple(self.examples[i] for i in side), dropped=dropped) for side in sides
        )
        return fit, heldout

    def sample(self, pairs: int, seed: int = 0) -> Contrast:
        """Keep `pairs` whole pairs, spread evenly over the templates; without pairs, `pairs` prompts of each
        class.

        Args:
            pairs: how many pairs. Where no prompt has a pair: prompts of each class (classes), or prompts
                (reals, tokens).
            seed: equal seeds give equal samples.

        Returns:
            The smaller contrast; prompts keep their order.

        Raises:
            InputError: `pairs` is not a positive whole number.
            NotEnoughDataError: there are fewer pairs (or prompts of a class) than asked for.

        Example:
            >>> Contrast.builtin("tense", pairs=100).sample(10).describe().n_pairs
            10
        """
        if not is_int(pairs) or pairs < 1:
            raise InputError(f"pairs={pairs!r}: a positive whole number is needed")
        rng = random.Random(f"sample:{seed}")
        paired = any(example.pair for example in self.examples)
        strata: dict[object, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, example in enumerate(self.examples):
            if paired and example.pair:
                strata["pairs"][example.pair].append(i)
            elif not paired:
                strata[example.label if self.kind == "classes" else "prompts"][str(i)].append(i)
        kept: list[int] = []
        for stratum, units in strata.items():
            if len(units) < pairs:
                what = stratum if isinstance(stratum, str) else f"{self.classes[int(str(stratum))]!r} prompts"
                raise NotEnoughDataError(
                    f"asked for {pairs} {what}, but {self.name!r} has {len(units)}; ask for fewer"
                )
            kept.extend(i for unit in _spread(list(units.values()), self.templates, pairs, rng) for i in unit)
        return replace(self, examples=tuple(self.examples[i] for i in sorted(kept)), dropped=0)

    # ---- rewording

    def chat(self, tokenizer: Any, system: str | None = None, continuation: bool = False) -> Contrast:
        """Render every text as a chat turn, moving `focus`, `words` and `prompt_end` along with it.

        A beginning-of-sequence token that the tokenizer adds anyway is left out of the text, so that
        tokenizing
        the result in the default way gives the ids that the chat template stands for.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            system: system message; None sends none.
            continuation: the user message is the prompt only (`text[:prompt_end]`), and the rest of the text
                follows
                as the opening of the assistant's answer. Every example then needs a `prompt_end` inside its
                text.

        Returns:
            The same examples with the rendered texts, each ending where the assistant would go on.

        Raises:
            InputError: the tokenizer has no chat template, the template refuses or rewrites the text, or
                `continuation` is asked for where a prompt or a continuation is empty.
        """
        from repe_unlearn.chat import Renderer

        renderer = Renderer.of(tokenizer, system)
        rendered = []
        for i, example in enumerate(self.examples):
            cut = example.prompt_end if continuation else len(example.text)
            if continuation and not (example.text[:cut].strip() and example.text[cut:].strip()):
                raise InputError(
                    f"example {i}: continuation=True needs a prompt and a rest, but prompt_end={cut} leaves "
                    f"one of them empty in {short(example.text)}; set prompt_end or use continuation=False"
                )
            rendered.append(renderer.render(example, cut))
        return replace(self, examples=tuple(rendered))

    # ---- making

    @classmethod
    def from_pairs(
        cls,
        pairs: Iterable[tuple[str, str]],
        classes: tuple[str, str] = ("a", "b"),
        *,
        name: str = "pairs",
        groups: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
    ) -> Contrast:
        """Make a two-class contrast from pairs of texts with the same content.

        Args:
            pairs: (text of class 0, text of class 1).
            classes: names of class 0 and class 1.
            name: what the concept is called.
            groups: content of each pair; by default every pair is its own group.
            templates: wording of each pair.

        Returns:
            Two examples per pair, class 0 first.

        Raises:
            InputError: an item is not a pair of texts, or lengths differ.

        Example:
            >>> Contrast.from_pairs([("I was", "I am"), ("she was", "she is")], ("past", "present")).classes
            ('past', 'present')
        """
        made = list(pairs)
        for i, pair in enumerate(made):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"pair {i} is {pair!r}: a tuple of two texts (class 0, class 1) is needed")
        return cls._make(
            name,
            "classes",
            tuple(classes),
            [text for pair in made for text in pair],
            [label for _ in made for label in (0, 1)],
            groups=_twice(groups, len(made), "groups"),
            templates=_twice(templates, len(made), "templates"),
            pairs=[f"pair-{i}" for i in range(len(made)) for _ in (0, 1)],
        )

    @classmethod
    def from_classes(
        cls,
        texts_by_class: Mapping[str, Sequence[str]],
        *,
        name: str = "classes",
        groups: Mapping[str, Sequence[str]] | None = None,
        templates: Mapping[str, Sequence[str]] | None = None,
    ) -> Contrast:
        """Make a contrast from the texts of each class.

        Args:
            texts_by_class: class name -> its texts; the order of the names is the order of the class ids.
            name: what the concept is called.
            groups: class name -> content of each of its texts.
            templates: class name -> wording of each of its texts.

        Returns:
            One example per text.

        Raises:
            InputError: a class has one string instead of a list of texts, or lengths differ.

        Example:
            >>> Contrast.from_classes({"cat": ["meow", "purr"], "dog": ["woof"]}, name="pet").labels
            (0, 0, 1)
        """
        for klass, texts in texts_by_class.items():
            if isinstance(texts, str):
                raise InputError(f"class {klass!r} has one string {short(texts)}; a list of texts is needed")
        return cls._make(
            name,
            "classes",
            tuple(texts_by_class),
            [text for texts in texts_by_class.values() for text in texts],
            [i for i, texts in enumerate(texts_by_class.values()) for _ in texts],
            groups=_flat(groups, texts_by_class, "groups"),
            templates=_flat(templates, texts_by_class, "templates"),
        )

    @classmethod
    def from_labels(
        cls,
        texts: Iterable[str],
        labels: Iterable[str | int],
        *,
        classes: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        pairs: Sequence[str] | None = None,
        name: str = "labels",
    ) -> Contrast:
        """Make a contrast from texts and one class label each.

        Args:
            texts: the prompts.
            labels: class names, or class ids.
            classes: names of the classes in the order of their ids; by default the sorted distinct labels.
            groups: content of each text.
            templates: wording of each text.
            pairs: pair of each text.
            name: what the concept is called.

        Returns:
            One example per text.

        Raises:
            InputError: lengths differ, a label is no class, or labels mix names and ids.

        Example:
            >>> Contrast.from_labels(["a b", "c d", "e f"], ["pos", "neg", "pos"]).labels
            (1, 0, 1)
        """
        ids, names = class_ids(list(labels), classes)
        return cls._make(
            name, "classes", names, list(texts), ids, groups=groups, templates=templates, pairs=pairs
        )

    @classmethod
    def from_reals(
        cls,
        texts: Iterable[str],
        values: Iterable[float],
        *,
        groups: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        pairs: Sequence[str] | None = None,
        name: str = "reals",
    ) -> Contrast:
        """Make a contrast from texts and one finite number each.

        Args:
            texts: the prompts.
            values: the quantity that each text shows.
            groups: content of each text.
            templates: wording of each text.
            pairs: pair of each text.
            name: what the quantity is called.

        Returns:
            One example per text.

        Raises:
            InputError: lengths differ or a value is no finite number.

        Example:
            >>> Contrast.from_reals(["It is cold.", "It is hot."], [-3, 31.5], name="celsius").labels
            (-3.0, 31.5)
        """
        reals = [real(value, i) for i, value in enumerate(values)]
        return cls._make(
            name, "reals", (), list(texts), reals, groups=groups, templates=templates, pairs=pairs
        )

    @classmethod
    def from_tokens(
        cls,
        sentences: Iterable[tuple[Sequence[str], Sequence[str | None]]],
        *,
        classes: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        name: str = "tokens",
    ) -> Contrast:
        """Make a token-level contrast from words and one tag each; the text is the words joined by single
        spaces.

        Args:
            sentences: (words, tags) of each sentence, equally long; a tag of None leaves the word unlabelled.
            classes: names of the tags in the order of their ids; by default the sorted distinct tags.
            groups: content of each sentence.
            templates: wording of each sentence.
            name: what the concept is called.

        Returns:
            One example per sentence, with the character span of every word.

        Raises:
            InputError: words and tags differ in length, a word is empty, or a tag is no class.

        Example:
            >>> contrast = Contrast.from_tokens([(["cats", "sleep"], ["NOUN", "VERB"])])
            >>> contrast.examples[0].words, contrast.labels
            (((0, 4), (5, 10)), ((0, 1),))
        """
        made = [(list(words), list(tags)) for words, tags in sentences]
        for i, (words, tags) in enumerate(made):
            if len(words) != len(tags):
                raise InputError(
                    f"sentence {i} has {len(words)} words and {len(tags)} tags; one tag per word is needed"
                )
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise InputError(f"sentence {i} holds an empty word: {words!r}")
        ids, names = class_ids([tag for _, tags in made for tag in tags if tag is not None], classes)
        following = iter(ids)
        labels = [tuple(-1 if tag is None else next(following) for tag in tags) for _, tags in made]
        texts = [" ".join(words) for words, _ in made]
        contrast_words = [_word_spans(words) for words, _ in made]
        return cls._make(
            name, "tokens", names, texts, labels, groups=groups, templates=templates, words=contrast_words
        )

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        kind: Kind = "classes",
        text: str = "text",
        label: str = "label",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        template: str | None = None,
        pair: str | None = None,
        positive: str | None = None,
        negative: str | None = None,
    ) -> Contrast:
        """Read one JSON object per line.

        Args:
            path: the file, UTF-8.
            name: what the concept is called; by default the file name.
            kind: what the labels are. For "tokens" the text column holds a list of words and the label column
                a list
                of tags (null for an unlabelled word).
            text: column of the prompt.
            label: column of the label.
            classes: names of the classes in the order of their ids.
            group: column of the content, if any.
            template: column of the wording, if any.
            pair: column of the pair, if any.
            positive: column of the class-1 text of a pair; goes with `negative` and replaces text, label and
                pair.
            negative: column of the class-0 text of a pair.

        Returns:
            One example per line, or two where the lines hold pairs.

        Raises:
            InputError: no such file, or a column is missing (the message lists those found).
            FileFormatError: a line is no JSON object; the message gives its number.
            NotEnoughDataError: the file is empty.
        """
        columns = readers.Columns(text, label, group, template, pair, positive, negative)
        return cls._from_table(readers.read_jsonl(path), name or Path(path).stem, kind, columns, classes)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        kind: Kind = "classes",
        delimiter: str = ",",
        text: str = "text",
        label: str = "label",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        template: str | None = None,
        pair: str | None = None,
        positive: str | None = None,
        negative: str | None = None,
    ) -> Contrast:
        """Read a CSV file whose first line names the columns.

        Args:
            path: the file, UTF-8.
            name: what the concept is called; by default the file name.
            kind: what the labels are. For "tokens" both cells hold words separated by spaces ("-" leaves one
                unlabelled).
            delimiter: the character between cells.
            text: column of the prompt.
            label: column of the label.
            classes: names of the classes in the order of their ids.
            group: column of the content, if any.
            template: column of the wording, if any.
            pair: column of the pair, if any.
            positive: column of the class-1 text of a pair; goes with `negative` and replaces text, label and
                pair.
            negative: column of the class-0 text of a pair.

        Returns:
            One example per row, or two where the rows hold pairs.

        Raises:
            InputError: no such file, or a column is missing (the message lists those found).
            FileFormatError: a row has more or fewer cells than the header; the message gives its line.
            NotEnoughDataError: the file holds no rows.
        """
        columns = readers.Columns(text, label, group, template, pair, positive, negative)
        table = readers.read_csv(path, delimiter=delimiter)
        return cls._from_table(table, name or Path(path).stem, kind, columns, classes)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        name: str = "dataset",
        kind: Kind = "classes",
        text: str = "text",
        label: str = "label",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        template: str | None = None,
        pair: str | None = None,
        positive: str | None = None,
        negative: str | None = None,
    ) -> Contrast:
        """Read one split of a Hugging Face dataset; class names come from its `ClassLabel` where it has one.

        Args:
            dataset: one split (not a dictionary of splits).
            name: what the concept is called.
            kind: what the labels are. For "tokens" the text column holds lists of words, the label column
                lists of tags.
            text: column of the prompt.
            label: column of the label.
            classes: names of the classes in the order of their ids.
            group: column of the content, if any.
            template: column of the wording, if any.
            pair: column of the pair, if any.
            positive: column of the class-1 text of a pair; goes with `negative` and replaces text, label and
                pair.
            negative: column of the class-0 text of a pair.

        Returns:
            One example per row, or two where the rows hold pairs.

        Raises:
            InputError: a dictionary of splits, or a column is missing (the message lists those found).
            NotEnoughDataError: the split is empty.
        """
        columns = readers.Columns(text, label, group, template, pair, positive, negative)
        table = readers.read_dataset(dataset, columns)
        return cls._from_table(table, name, kind, columns, classes or table.class_names)

    @classmethod
    def builtin(cls, name: str, *, pairs: int = 2048, seed: int = 0) -> Contrast:
        """Generate a built-in contrast of minimal pairs in English, the same for equal arguments on every
        machine.

        The content (occupations, names, verbs, objects, places, times) comes in 16 blocks without a word in
        common;
        the block is the group and the sentence frame the template.

        Args:
            name: "gender" (female or male, of the person a sentence is about) or "tense" (past or present).
            pairs: number of pairs; twice as many prompts. At most 40000.
            seed: equal seeds give equal prompts.

        Returns:
            Two examples per pair that differ only in the words that carry the concept.

        Raises:
            InputError: no built-in of that name, or `pairs` is not a positive whole number.
            NotEnoughDataError: more than 40000 pairs.

        Example:
            >>> Contrast.builtin("gender", pairs=50).classes
            ('female', 'male')
        """
        from repe_unlearn.builtin import BUILTINS

        if name not in BUILTINS:
            raise InputError(f"no built-in contrast {name!r}; there are {', '.join(sorted(BUILTINS))}")
        if not is_int(pairs) or pairs < 1:
            raise InputError(f"pairs={pairs!r}: a positive whole number is needed")
        return BUILTINS[name](pairs=pairs, seed=seed)

    @classmethod
    def _from_table(
        cls,
        table: readers.Table,
        name: str,
        kind: Kind,
        columns: readers.Columns,
        classes: Sequence[str] | None,
    ) -> Contrast:
        groups, templates = table.strings(columns.group), table.strings(columns.template)
        if columns.positive is not None or columns.negative is not None:
            if columns.positive is None or columns.negative is None or kind != "classes":
                raise InputError("pairs need both positive= and negative=, and kind='classes'")
            names = tuple(classes) if classes else ("negative", "positive")
            if len(names) != 2:
                raise InputError(
                    f"pairs have two classes (negative, positive), but {len(names)} were named: {names}"
                )
            texts = zip(table.texts(columns.negative), table.texts(columns.positive), strict=True)
            return cls.from_pairs(texts, (names[0], names[1]), name=name, groups=groups, templates=templates)
        if kind == "tokens":
            sentences = table.sentences(columns.text, columns.label)
            return cls.from_tokens(sentences, classes=classes, groups=groups, templates=templates, name=name)
        texts, pairs = table.texts(columns.text), table.strings(columns.pair)
        if kind == "reals":
            values = table.reals(columns.label)
            return cls.from_reals(texts, values, groups=groups, templates=templates, pairs=pairs, name=name)
        if kind != "classes":
            raise InputError(f"kind={kind!r}: one of 'classes', 'reals', 'tokens' is needed")
        labels = table.labels(columns.label, classes)
        return cls.from_labels(
            texts, labels, classes=classes, groups=groups, templates=templates, pairs=pairs, name=name
        )

    @classmethod
    def _make(
        cls,
        name: str,
        kind: Kind,
        classes: tuple[str, ...],
        texts: Sequence[str],
        labels: Sequence[int | float | tuple[int, ...]],
        *,
        groups: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        pairs: Sequence[str] | None = None,
        words: Sequence[tuple[Span, ...]] | None = None,
    ) -> Contrast:
        columns: dict[str, Sequence[Any]] = {"label": labels}
        for key, column in (("group", groups), ("template", templates), ("pair", pairs), ("words", words)):
            if column is not None:
                columns[key] = column
        for key, column in columns.items():
            if len(column) != len(texts):
                raise InputError(f"{len(texts)} texts but {len(column)} {key}s; one {key} per text is needed")
        rows = zip(texts, zip(*columns.values(), strict=True), strict=True)
        examples = tuple(Example(text, **dict(zip(columns, row, strict=True))) for text, row in rows)
        return cls(name, kind, classes, examples)


def _twice(column: Sequence[str] | None, n: int, what: str) -> list[str] | None:
    if column is None:
        return None
    if len(column) != n:
        raise InputError(f"{n} pairs but {len(column)} {what}; one per pair is needed")
    return [value for value in column for _ in (0, 1)]


def _flat(
    columns: Mapping[str, Sequence[str]] | None, texts: Mapping[str, Sequence[str]], what: str
) -> list[str] | None:
    if columns is None:
        return None
    if set(columns) != set(texts):
        raise InputError(f"{what} has the classes {sorted(columns)}, the texts have {sorted(texts)}")
    for klass in texts:
        if len(columns[klass]) != len(texts[klass]):
            raise InputError(f"class {klass!r}: {len(texts[klass])} texts but {len(columns[klass])} {what}")
    return [value for klass in texts for value in columns[klass]]


def _word_spans(words: Sequence[str]) -> tuple[Span, ...]:
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return tuple(spans)


def _spread(
    units: Sequence[list[int]], templates: Sequence[str], n: int, rng: random.Random
) -> list[list[int]]:
    """`n` of the units, as evenly over the templates as their numbers allow."""
    order = list(units)
    rng.shuffle(order)
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for k, unit in enumerate(order):
        template = templates[unit[0]]
        turns.append((seen[template], k))  # the k-th unit of a template waits for all first, second, ... ones
        seen[template] += 1
    return [order[k] for _, k in sorted(turns)[:n]]
