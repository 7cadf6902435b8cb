"""Select: which tokens of a sequence count, when activations are captured and when a plan is applied."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeGuard
from urllib.parse import quote, unquote

from .errors import InputError

Kind = Literal["last", "mean", "all", "word", "span", "words", "after_prompt"]
Phase = Literal["both", "prompt", "generation"]

_KINDS = ("last", "mean", "all", "word", "span", "words", "after_prompt")
_PHASES = ("both", "prompt", "generation")
TEXT_KINDS = ("word", "span", "words")
"""Kinds that need the text itself, so that they only work on capture."""


@dataclass(frozen=True, slots=True)
class Select:
    """Which token positions of every sequence are used; padding never is.

    A position counts if it passes every filter (sinks, specials, phase, window, include, exclude); ``kind``
    then chooses among those that are left. One value serves ``capture`` and ``apply``: what was fit is what
    gets edited.

    The first ``sinks`` tokens of each sequence are left out whatever the kind: the first position of a causal
    model is an attention sink with activations unlike all others, and one such row outweighs hundreds of
    ordinary ones. Special tokens (BOS, EOS, chat markers) are left out too unless ``specials`` is True.

    Positions are counted from 0 without padding. On capture the prompt is ``text[:prompt_end]`` of an example,
    or all of it where ``prompt_end`` is 0, and the rest is generation. When a plan is applied the prompt is
    what ``generate`` was given (or what one forward got), and a generated token is one that is fed back: the
    logits that choose the first one are made at the last prompt token.

    Args:
        kind: ``"last"`` the last ``count`` tokens that are left; ``"mean"`` the average over all that are left
            (one row per prompt); ``"all"`` each of them; ``"word"`` the last token of one word, ``"span"`` all
            its tokens; ``"words"`` the last token of each labelled word (token-level labels);
            ``"after_prompt"`` every token that begins at or after the example's ``prompt_end``. A plan is
            applied to ``"all"``, ``"after_prompt"``, or ``"last"`` with ``phase="prompt"``.
        sinks: number of leading tokens never used, >= 0.
        specials: also use special tokens.
        text: the word or phrase that ``"word"`` and ``"span"`` look for (first occurrence as a whole word);
            empty means the example's own ``focus``.
        phase: ``"prompt"``, ``"generation"`` or ``"both"``.
        start: first position of a window; a negative number counts from the end of the prompt (-1 is its last
            token). None: from the beginning.
        stop: first position after the window, counted like ``start``. None: to the end, generation included.
        count: how many tokens ``"last"`` takes, >= 1.
        include: token ids, or texts of single tokens, of which nothing else is used; empty means any token.
        exclude: token ids or texts that are never used, whatever ``include`` says.

    Raises:
        InputError: a value outside its range, or a combination that can select nothing.

    Example:
        >>> Select.parse("all,sinks=0").sinks, str(Select("mean", start=-4, exclude=[13, "."]))
        (0, 'mean,sinks=1,start=-4,exclude=13+.')
    """

    kind: Kind = "last"
    sinks: int = 1
    specials: bool = False
    text: str = ""
    phase: Phase = "both"
    start: int | None = None
    stop: int | None = None
    count: int = 1
    include: tuple[int | str, ...] = ()
    exclude: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"got Select kind {self.kind!r}; needed one of {', '.join(_KINDS)}.")
        if self.phase not in _PHASES:
            raise InputError(f"got phase={self.phase!r}; needed one of {', '.join(_PHASES)}.")
        if not _whole(self.sinks) or self.sinks < 0:
            raise InputError(f"got sinks={self.sinks!r}; needed a whole number >= 0.")
        if not _whole(self.count) or self.count < 1:
            raise InputError(f"got count={self.count!r}; needed a whole number >= 1.")
        if self.count > 1 and self.kind != "last":
            raise InputError(f"Select({self.kind!r}) takes no count; got {self.count}. Use 'last'.")
        if self.text and self.kind not in ("word", "span"):
            raise InputError(f"Select({self.kind!r}) takes no text; got {self.text!r}. Use 'word' or 'span'.")
        if self.kind == "after_prompt" and self.phase == "prompt":
            raise InputError("Select('after_prompt', phase='prompt') selects nothing; leave one of them out.")
        for name in ("start", "stop"):
            if getattr(self, name) is not None and not _whole(getattr(self, name)):
                raise InputError(f"got {name}={getattr(self, name)!r}; needed a whole number or None.")
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        if len(bounds) == 2 and (bounds[0] < 0) == (bounds[1] < 0) and bounds[0] >= bounds[1]:
            raise InputError(f"got start={self.start}, stop={self.stop}: an empty window.")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _tokens(name, getattr(self, name)))

    @classmethod
    def parse(cls, text: str) -> Select:
        """Return the selection that a command line or a file names, e.g. ``"last"``,
        ``"all,sinks=0,specials"`` or ``"mean,phase=prompt,start=-8,exclude=13+."``.
        """
        kind, *options = (part.strip() for part in text.split(","))
        select = cls(kind)  # type: ignore[arg-type]  # checked in __post_init__
        found: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name == "specials" and value in ("", "true"):
                found[name] = True
            elif name in ("sinks", "count", "start", "stop") and re.fullmatch(r"-?\d+", value):
                found[name] = int(value)
            elif name == "phase" and value:
                found[name] = value
            elif name == "text" and value:
                found[name] = unquote(value)
            elif name in ("include", "exclude") and value:
                found[name] = tuple(int(t) if t.isdecimal() else unquote(t) for t in value.split("+"))
            else:
                raise InputError(
                    f"got option {option!r} in {text!r}; needed 'sinks=N', 'specials', 'text=WORD', "
                    "'phase=prompt', 'phase=generation', 'start=N', 'stop=N', 'count=N', 'include=A+B' or "
                    "'exclude=A+B'."
                )
        return replace(select, **found)

    def __str__(self) -> str:
        parts = [self.kind, f"sinks={self.sinks}"]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if value is True:
                parts.append(field.name)
            elif isinstance(value, tuple):
                parts.append(f"{field.name}=" + "+".join(_written(token) for token in value))
            else:
                parts.append(f"{field.name}={_quoted(value) if isinstance(value, str) else value}")
        return ",".join(parts)

    @property
    def pooled(self) -> bool:
        """True when the selected positions of a prompt are averaged into one row."""
        return self.kind == "mean"

    @property
    def splits(self) -> bool:
        """True when it matters where the prompt ends."""
        negative = any(bound is not None and bound < 0 for bound in (self.start, self.stop))
        return self.kind == "after_prompt" or self.phase != "both" or negative

    def resolve(self, tokenizer: Any = None) -> Select:
        """Return the same selection in token ids alone: texts looked up, specials among the excluded ids.

        Args:
            tokenizer: a Hugging Face tokenizer. None is enough for a selection with ``specials=True`` and no
                texts.

        Raises:
            InputError: a tokenizer is needed, or a text is not one token (with or without a space before it).
        """
        texts = [token for token in (*self.include, *self.exclude) if isinstance(token, str)]
        if tokenizer is None and (texts or not self.specials):
            what = f"the text {texts[0]!r} of a token" if texts else "special tokens to leave out"
            raise InputError(
                f"Select({str(self)!r}) names {what}, whose ids only the tokenizer knows; pass tokenizer=..., or "
                "use token ids and specials=True."
            )
        include, exclude = (
            [i for t in side for i in _ids(t, tokenizer)] for side in (self.include, self.exclude)
        )
        if not self.specials and tokenizer is not None:
            exclude += tokenizer.all_special_ids
        return replace(
            self, specials=True, include=tuple(dict.fromkeys(include)), exclude=tuple(dict.fromkeys(exclude))
        )


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(name: str, value: object) -> tuple[int | str, ...]:
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
    good = [t for t in given if (isinstance(t, str) and t) or (_whole(t) and t >= 0)]
    if len(good) < len(given):
        raise InputError(f"got {name}={value!r}; needed a list of token ids >= 0 or texts of single tokens.")
    return tuple(good)


def _ids(token: int | str, tokenizer: Any) -> list[int]:
    if isinstance(token, int):
        return [token]
    # A word after a space is another token than the same word at the start of a line: both are meant.
    forms = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (token, " " + token)]
    found = [ids[0] for ids in forms if len(ids) == 1]
    if not found:
        raise InputError(
            f"{token!r} is {len(forms[0])} tokens for {type(tokenizer).__name__}; needed the text of one token."
        )
    return found


def _quoted(text: str) -> str:
    """Escape what the text form is made of, and spaces at the ends."""
    return re.sub(r"[,+%]|^\s|\s$", lambda found: quote(found[0], safe=""), text)


def _written(token: int | str) -> str:
    if isinstance(token, int):
        return str(token)
    return f"%{ord(token[0]):02X}{token[1:]}" if token.isdecimal() and token.isascii() else _quoted(token)
