"""Select: which tokens of a prompt count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .errors import InputError

Kind = Literal["last", "mean", "all", "word", "span", "words", "after_prompt"]

_KINDS = ("last", "mean", "all", "word", "span", "words", "after_prompt")


@dataclass(frozen=True, slots=True)
class Select:
    """Which token positions of every prompt are used; padding never is.

    The first ``sinks`` tokens of each prompt are left out whatever the kind: the first position of a causal
    model is an attention sink with activations unlike all others, and one such row outweighs hundreds of
    ordinary ones. Special tokens (BOS, EOS, chat markers) are left out too unless ``specials`` is True.

    Args:
        kind: ``"last"`` the last token that is left; ``"mean"`` the average over all that are left (one row
            per prompt); ``"all"`` each of them; ``"word"`` the last token of one word, ``"span"`` all its
            tokens; ``"words"`` the last token of each labelled word (token-level labels);
            ``"after_prompt"`` every token that begins at or after the example's ``prompt_end``.
        sinks: number of leading tokens never used, >= 0.
        specials: also use special tokens.
        text: the word or phrase that ``"word"`` and ``"span"`` look for (first occurrence as a whole word);
            empty means the example's own ``focus``.

    Raises:
        InputError: unknown kind, negative sinks, or a text for a kind that takes none.

    Example:
        >>> Select.parse("mean"), Select.parse("all,sinks=0").sinks
        (Select(kind='mean', sinks=1, specials=False, text=''), 0)
    """

    kind: Kind = "last"
    sinks: int = 1
    specials: bool = False
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"got Select kind {self.kind!r}; needed one of {', '.join(_KINDS)}.")
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise InputError(f"got sinks={self.sinks!r}; needed a whole number >= 0.")
        if self.text and self.kind not in ("word", "span"):
            raise InputError(f"Select({self.kind!r}) takes no text; got {self.text!r}. Use 'word' or 'span'.")

    @classmethod
    def parse(cls, text: str) -> Select:
        """Return the selection that a command line or a file names, e.g. ``"last"`` or
        ``"all,sinks=0,specials"``.
        """
        kind, *options = (part.strip() for part in text.split(","))
        select = cls(kind)  # type: ignore[arg-type]  # checked in __post_init__
        for option in options:
            name, _, value = option.partition("=")
            if name == "specials" and value in ("", "true"):
                select = replace(select, specials=True)
            elif name == "sinks" and value.isdecimal():
                select = replace(select, sinks=int(value))
            elif name == "text" and value:
                select = replace(select, text=value)
            else:
                raise InputError(
                    f"got option {option!r} in {text!r}; needed 'sinks=N', 'specials' or 'text=WORD'."
                )
        return select

    def __str__(self) -> str:
        specials, text = ",specials" if self.specials else "", f",text={self.text}" if self.text else ""
        return f"{self.kind},sinks={self.sinks}{specials}{text}"

    @property
    def pooled(self) -> bool:
        """True when the selected positions of a prompt are averaged into one row."""
        return self.kind == "mean"
