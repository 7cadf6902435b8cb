"""One labelled prompt, and the rules that prompts, labels and spans of a contrast obey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from repe_unlearn.errors import InputError, NotEnoughDataError

if TYPE_CHECKING:
    from repe_unlearn.contrast import Contrast

__all__ = ["Example", "Kind", "Span", "check", "class_ids", "is_int", "label_set", "real", "short"]

Kind = Literal["classes", "reals", "tokens"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled prompt; the `Contrast` that holds it checks it.

    Attributes:
        text: the prompt.
        label: class id, real value, or one class id per word (token-level; -1 is an unlabelled word).
        group: content that must not be shared across splits; "" means that only the pair (or the example)
            shares it.
        template: wording that must not be shared across splits; "" means none.
        pair: name shared by examples that differ only in the label, the unit of statistics; "" means
            unpaired.
        focus: character span of the word that carries the concept.
        words: character span of each labelled word (token-level only), as long as `label`.
        prompt_end: number of leading characters that are the prompt; what follows is the continuation.

    Example:
        >>> Example("The baker said that she was late.", label=0, focus=(20, 23)).focus
        (20, 23)
    """

    text: str
    label: int | float | tuple[int, ...]
    group: str = ""
    template: str = ""
    pair: str = ""
    focus: Span | None = None
    words: tuple[Span, ...] = ()
    prompt_end: int = 0


def check(contrast: Contrast) -> None:
    """Raise what is wrong with a contrast, naming the example by its number from 0.

    Args:
        contrast: the contrast under construction.

    Raises:
        NotEnoughDataError: no prompts, fewer prompts than classes, or one label only.
        InputError: the kind, a class name, text, label or span is unusable.
    """
    _check_head(contrast)
    for i, example in enumerate(contrast.examples):
        _check_example(contrast, i, example)
    _check_labels(contrast)


def _check_head(contrast: Contrast) -> None:
    kind, classes = contrast.kind, contrast.classes
    if kind not in ("classes", "reals", "tokens"):
        raise InputError(f"kind={kind!r}: one of 'classes', 'reals', 'tokens' is needed")
    if not contrast.examples:
        raise NotEnoughDataError(
            f"contrast {contrast.name!r} holds no prompts; at least two with different labels are needed"
        )
    if kind == "reals" and classes:
        raise InputError(f"a contrast of reals has no classes, but {classes} were given; pass classes=()")
    if not all(isinstance(klass, str) and klass.strip() for klass in classes):
        raise InputError(f"classes {classes!r}: every class needs a name that is a non-empty string")
    if len(set(classes)) < len(classes):
        raise InputError(f"classes {classes!r}: names must differ")
    if kind == "classes" and len(contrast.examples) < len(classes):
        raise NotEnoughDataError(
            f"{len(contrast.examples)} prompts for {len(classes)} classes; each class needs at least one"
        )


def _check_example(contrast: Contrast, i: int, example: Example) -> None:
    if not isinstance(example, Example):
        raise InputError(
            f"example {i} is {type(example).__name__}, an Example is needed; see Contrast.from_..."
        )
    text, label = example.text, example.label
    if not isinstance(text, str):
        raise InputError(f"example {i}: the text is {type(text).__name__}, a string is needed")
    if not text.strip():
        raise InputError(f"example {i}: the text is empty or only whitespace; remove the row or fill it")
    if not all(isinstance(key, str) for key in (example.group, example.template, example.pair)):
        raise InputError(f"example {i}: group, template and pair must be strings")
    if contrast.kind == "tokens":
        if not isinstance(label, tuple) or len(label) != len(example.words):
            length = len(label) if isinstance(label, tuple) else "no tuple of"
            raise InputError(
                f"example {i}: {length} labels for {len(example.words)} words; each word needs one class id"
            )
    elif isinstance(label, tuple) or example.words:
        raise InputError(
            f"example {i}: labels per word need kind='tokens', but the kind is {contrast.kind!r}"
        )
    if contrast.kind == "reals":
        real(label, i)
    else:
        for value in label if isinstance(label, tuple) else (label,):
            lowest = -1 if contrast.kind == "tokens" else 0
            if not is_int(value) or not lowest <= value < len(contrast.classes):
                raise InputError(
                    f"example {i}: label {value!r} is no class id; {lowest}..{len(contrast.classes) - 1} are "
                    f"possible with the classes {contrast.classes}"
                )
    for what, span in (("focus", example.focus), *(("word", span) for span in example.words)):
        if span is not None and not (len(span) == 2 and 0 <= span[0] < span[1] <= len(text)):
            raise InputError(
                f"example {i}: {what} span {span} is empty or outside the {len(text)} characters of the text"
            )
    if not is_int(example.prompt_end) or not 0 <= example.prompt_end <= len(text):
        raise InputError(
            f"example {i}: prompt_end={example.prompt_end!r} is outside the text of {len(text)} characters"
        )


def _check_labels(contrast: Contrast) -> None:
    shown = set().union(*(label_set(example) for example in contrast.examples))
    if len(shown) > 1:
        return
    n = len(contrast.examples)
    if not shown:
        raise NotEnoughDataError(
            f"no word of the {n} prompts is labelled; at least two different labels are needed"
        )
    only = next(iter(shown))
    what = f"{only}" if contrast.kind == "reals" else f"{contrast.classes[int(only)]!r}"
    things = f"labelled words of {n} prompts" if contrast.kind == "tokens" else f"{n} prompts"
    raise NotEnoughDataError(f"all {things} are {what}; a contrast needs at least two different labels")


def label_set(example: Example) -> frozenset[float]:
    """Distinct labels of one example; unlabelled words have none."""
    label = example.label
    return frozenset(y for y in label if y >= 0) if isinstance(label, tuple) else frozenset({label})


def class_ids(labels: Sequence[Any], classes: Sequence[str] | None) -> tuple[list[int], tuple[str, ...]]:
    """Turn labels that are all names, or all whole numbers, into class ids.

    Args:
        labels: names or ids.
        classes: names of the classes in the order of their ids; by default the sorted distinct labels.

    Returns:
        One id per label, and the names.

    Raises:
        InputError: a name is no class, or names, ids and other things are mixed.

    Example:
        >>> class_ids(["pos", "neg"], None)
        ([1, 0], ('neg', 'pos'))
    """
    if isinstance(classes, str):
        raise InputError(f"classes={classes!r}: a list of names is needed, not one string")
    names = tuple(classes) if classes is not None else None
    if all(isinstance(label, str) for label in labels):
        names = names if names is not None else tuple(sorted(set(labels)))
        ids = {name: i for i, name in enumerate(names)}
        for i, label in enumerate(labels):
            if label not in ids:
                raise InputError(f"label {i} is {label!r}, which is none of the classes {names}")
        return [ids[label] for label in labels], names
    for i, label in enumerate(labels):
        if not isinstance(label, Integral):
            raise InputError(
                f"label {i} is {label!r} ({type(label).__name__}); all must be strings or whole numbers. "
                "For numbers as such use from_reals"
            )
    if names is None:
        distinct = sorted({int(label) for label in labels})
        return [distinct.index(int(label)) for label in labels], tuple(map(str, distinct))
    return [int(label) for label in labels], names


def real(value: object, i: int) -> float:
    """The value as a float; InputError names example `i` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"example {i}: the label is {value!r}, a real number is needed")
    if not math.isfinite(value):
        raise InputError(f"example {i}: the label is {value!r}, a finite number is needed; remove the row")
    return float(value)


def is_int(value: object) -> bool:
    """Whether the value is a whole number, NumPy ones included and truth values excluded."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def short(text: str) -> str:
    """The text in quotes, cut to 60 characters for messages."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
