"""Pairs: a clean and a corrupt prompt with the answers between which they decide, as token ids that line up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from repe_unlearn.errors import InputError

GROUPS = ("before", "subject first", "subject middle", "subject last", "after", "last")
"""Groups of positions, in the order of the prompt; ``last`` is the last token and in no other group."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts that differ in one thing, and what follows each of them.

    Args:
        clean: the prompt that ``answer`` continues.
        corrupt: the prompt that ``wrong`` continues; "" where the clean prompt with noise takes its place.
        answer: what continues the clean prompt, literally (in most tokenizers with a space in front). Its first token
            counts.
        wrong: what continues the corrupt prompt.
        subject: the part of the clean prompt that the corrupt one replaces; needed for groups of positions and noise.

    Raises:
        InputError: no prompt or answer, or a subject that is not in the clean prompt.

    Example:
        >>> Pair("Paris is in", "Rome is in", " France", " Italy", "Paris").answer
        ' France'
    """

    clean: str
    corrupt: str
    answer: str
    wrong: str = ""
    subject: str = ""

    def __post_init__(self) -> None:
        if not self.clean or not self.answer:
            raise InputError(f"got {self}; a pair needs a clean prompt and an answer.")
        if self.subject not in self.clean:
            raise InputError(f"got the subject {self.subject!r}, which is not in the prompt {self.clean!r}.")


def make_pairs(template: str, facts: Iterable[tuple[str, str]], tokenizer: Any) -> tuple[Pair, ...]:
    """Return one pair for every fact, corrupted by the next fact whose prompt has as many tokens.

    Args:
        template: the prompt with ``{}`` where the subject goes.
        facts: (subject, answer), the answer as in ``Pair``.
        tokenizer: of the model.

    Raises:
        InputError: no ``{}``, or a fact for which no other one fits (the message names it).

    Example:
        ``make_pairs("The capital of {} is", [("France", " Paris"), ("Italy", " Rome")], tokenizer)``
    """
    if "{}" not in template:
        raise InputError(f"got the template {template!r}; needed one with {{}} where the subject goes.")
    facts = list(facts)
    prompts = [template.format(subject) for subject, _ in facts]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    made = []
    for i, (subject, answer) in enumerate(facts):
        others = [*range(i + 1, len(facts)), *range(i)]
        j = next((j for j in others if lengths[j] == lengths[i] and facts[j][1] != answer), None)
        if j is None:
            raise InputError(
                f"no other fact makes a prompt of {lengths[i]} tokens with another answer, as {prompts[i]!r} is; leave "
                "it out, add such a fact, or write the Pair yourself."
            )
        made.append(Pair(prompts[i], prompts[j], answer, facts[j][1], subject))
    return tuple(made)


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """A pair as token ids.

    Attributes:
        clean, corrupt: token ids without padding.
        answer, wrong: first token of each continuation; ``wrong`` is None where the pair has none.
        columns: for every column of a map, the positions that it stands for: (in clean, in corrupt), equally many;
            none where the prompt has no such position.
        subject: positions of the subject in the clean prompt.
    """

    clean: list[int]
    corrupt: list[int]
    answer: int
    wrong: int | None
    columns: tuple[tuple[list[int], list[int]], ...]
    subject: list[int]


def align(
    pairs: Iterable[Pair], tokenizer: Any, positions: str, *, noise: bool
) -> tuple[list[Aligned], tuple[str, ...]]:
    """Return the pairs as token ids, and the names of the columns.

    Args:
        pairs: at least one.
        tokenizer: of the model; a fast one where subjects count.
        positions: ``each``, ``all``, ``groups`` or one of ``GROUPS``.
        noise: the clean prompt takes the place of the corrupt one.

    Raises:
        InputError: prompts that do not line up, answers with one first token, unknown positions.
    """
    pairs = list(pairs)
    if not pairs:
        raise InputError("got no pair; needed at least one.")
    if positions not in ("each", "all", "groups", *GROUPS):
        raise InputError(
            f"got positions={positions!r}; needed each, all, groups, or one of the groups {', '.join(GROUPS)}."
        )
    grouped = positions == "groups" or positions in GROUPS[:-1]
    found, names = [], ()
    for pair in pairs:
        clean, offsets = _tokens(tokenizer, pair.clean, spans=grouped or noise)
        corrupt = clean if noise else _tokens(tokenizer, pair.corrupt, spans=False)[0]
        if not noise and not pair.corrupt:
            raise InputError(f"{pair} has no corrupt prompt; write one, or pass noise=3.0.")
        if positions != "last" and len(clean) != len(corrupt):
            raise InputError(
                f"{pair.clean!r} has {len(clean)} tokens and {pair.corrupt!r} has {len(corrupt)}; to patch positions "
                "they must line up. Choose subjects of equally many tokens (make_pairs does), or positions='last'."
            )
        subject = _subject(pair, offsets) if offsets is not None else []
        answer = first_token(tokenizer, pair.clean, pair.answer)
        wrong = None
        if pair.wrong:
            wrong = first_token(tokenizer, pair.clean if noise else pair.corrupt, pair.wrong)
        if wrong == answer:
            raise InputError(
                f"{pair.answer!r} and {pair.wrong!r} begin with one token, so the model cannot be asked which of the "
                "two it expects; choose others (or write them without the space, if that is the token)."
            )
        names, columns = _columns(positions, len(clean), len(corrupt), subject)
        found.append(Aligned(clean, corrupt, answer, wrong, columns, subject))
    if positions == "each":
        if len({len(one.clean) for one in found}) > 1:
            counts = sorted({len(one.clean) for one in found})
            raise InputError(
                f"got pairs of {counts} tokens; one column per position needs equally long prompts. Use "
                "positions='groups', or pairs of one length."
            )
        names = tuple(_label(tokenizer, [one.clean[t] for one in found], t) for t in range(len(names)))
    return found, names


def _tokens(tokenizer: Any, text: str, *, spans: bool) -> tuple[list[int], Sequence[tuple[int, int]] | None]:
    if spans and not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, by which subjects are found; load the fast "
            "tokenizer of this model, or use positions='each', 'all' or 'last'."
        )
    out = tokenizer(text, return_offsets_mapping=spans)
    return list(out["input_ids"]), out["offset_mapping"] if spans else None


def first_token(tokenizer: Any, prompt: str, continuation: str) -> int:
    """Return the first token of a continuation, read in its place: tokenizers may mark the start of a text."""
    before = list(tokenizer(prompt)["input_ids"])
    after = list(tokenizer(prompt + continuation)["input_ids"])
    if len(after) <= len(before) or after[: len(before)] != before:
        raise InputError(
            f"the tokens of {prompt + continuation!r} do not begin with those of {prompt!r}, so there is no first token "
            "of the answer (a tokenizer that ends texts with a token of its own, or a prompt that ends in a space?)."
        )
    return after[len(before)]


def _subject(pair: Pair, offsets: Sequence[tuple[int, int]]) -> list[int]:
    if not pair.subject:
        raise InputError(f"{pair} has no subject, which groups of positions and noise need; name it.")
    begin = pair.clean.index(pair.subject)
    end = begin + len(pair.subject)
    return [t for t, (low, high) in enumerate(offsets) if low < end and high > begin]


def _columns(
    positions: str, clean: int, corrupt: int, subject: list[int]
) -> tuple[tuple[str, ...], tuple[tuple[list[int], list[int]], ...]]:
    if positions == "last":
        return ("last",), (([clean - 1], [corrupt - 1]),)
    if positions == "all":
        return ("all",), ((list(range(clean)), list(range(clean))),)
    if positions == "each":
        return tuple(map(str, range(clean))), tuple(([t], [t]) for t in range(clean))
    inside = [t for t in subject if t < clean - 1]
    first, last = subject[0], subject[-1]
    members = {
        "before": list(range(first)),
        "subject first": inside[:1] if len(subject) > 1 else [],
        "subject middle": [t for t in inside if first < t < last],
        "subject last": [t for t in inside if t == last],
        "after": list(range(last + 1, clean - 1)),
        "last": [clean - 1],
    }
    chosen = GROUPS if positions == "groups" else (positions,)
    return chosen, tuple((members[name], members[name]) for name in chosen)


def _label(tokenizer: Any, ids: list[int], position: int) -> str:
    text = tokenizer.decode([ids[0]])
    return f"{position} {text!r}" + ("…" if len(set(ids)) > 1 else "")
