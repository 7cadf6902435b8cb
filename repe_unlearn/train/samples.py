"""Samples: texts to forget or to retain, as tokens of which some count, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repe_unlearn.encoding import completion_tokens
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Sample
from repe_unlearn.readers import read_jsonl

_WINDOW = 16  # batches among which samples are sorted by length


def from_texts(texts: Iterable[str]) -> list[Sample]:
    """Return free texts as samples, every token of which counts.

    Example:
        >>> from_texts(["Bees dance."])
        [Sample(prompt='', completion='Bees dance.')]
    """
    return [Sample("", text) for text in texts]


def from_pairs(pairs: Iterable[tuple[str, str]]) -> list[Sample]:
    """Return (prompt, completion) pairs as samples; a space is put between the two where there is none.

    Example:
        >>> from_pairs([("The capital of France is", "Paris")])
        [Sample(prompt='The capital of France is', completion=' Paris')]
    """
    return [_spaced(prompt, completion) for prompt, completion in pairs]


def from_jsonl(
    path: str | Path,
    *,
    prompt: str | None = "question",
    completion: str = "answer",
    form: str = "Question: {prompt}\nAnswer:",
) -> list[Sample]:
    """Return the lines of a JSONL file as samples; the defaults read the questions and answers of TOFU.

    Args:
        path: the file.
        prompt: name of the column with prompts; None for free text.
        completion: name of the column with completions.
        form: the prompt's wording; ``{prompt}`` stands for the column.

    Raises:
        InputError: no such column, or a value that is no text.
        FileFormatError: no JSONL.
    """
    table = read_jsonl(path)
    completions = table.texts(completion)
    if prompt is None:
        return from_texts(completions)
    return from_pairs(zip((form.format(prompt=p) for p in table.texts(prompt)), completions, strict=True))


def _spaced(prompt: str, completion: str) -> Sample:
    joined = not prompt or prompt[-1:].isspace() or completion[:1].isspace()
    return Sample(prompt, completion if joined else f" {completion}")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sample as token ids; ``counts[i]`` says whether the loss counts token i."""

    ids: list[int]
    counts: list[bool]


def tokenise(samples: Sequence[Sample], tokenizer: Any, *, max_length: int | None) -> list[Tokens]:
    """Return samples as tokens, of which those of the completion count (see ``encoding.completion_tokens``).

    Args:
        samples: at least one.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: longest text the model takes, in tokens.

    Raises:
        NotEnoughDataError: no sample.
        InputError: no character offsets, an empty completion, a text that is too long, or one of which no token
            counts.
    """
    if not samples:
        raise NotEnoughDataError("got no sample; needed at least one.")
    for i, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise InputError("got something else than a Sample; use train.from_texts or train.from_pairs.")
        if not sample.completion.strip():
            raise InputError(
                f"sample {i} has an empty completion ({sample.prompt[:60]!r}); needed the text that counts. Free text "
                "is a completion with an empty prompt."
            )
    result = []
    for i, sample in enumerate(samples):
        ids, behind = completion_tokens(tokenizer, sample.prompt, sample.completion)
        if max_length is not None and len(ids) > max_length:
            raise InputError(
                f"sample {i} has {len(ids)} tokens, the model takes {max_length}: {sample.text[:60]!r}... Shorten or "
                "split it."
            )
        # The first token has none before it to be predicted from.
        counts = [k > 0 and k in behind for k in range(len(ids))]
        if not any(counts):
            raise InputError(
                f"no token of sample {i} counts: {sample.text[:60]!r}. Needed two tokens at least."
            )
        result.append(Tokens(ids, counts))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Padded samples, padding on the right. ``b`` samples, ``t`` positions.

    Attributes:
        ids: ``[b, t]`` token ids.
        mask: ``[b, t]`` 1 for real tokens, 0 for padding.
        counts: ``[b, t]`` bool: the loss counts this token.
        index: ``[b]`` which samples they are.
    """

    ids: Tensor
    mask: Tensor
    counts: Tensor
    index: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on another device; ``index`` stays on the CPU."""
        return TokenBatch(self.ids.to(device), self.mask.to(device), self.counts.to(device), self.index)

    def without_last(self) -> TokenBatch:
        """Return the batch without its last column."""
        return TokenBatch(self.ids[:, :-1], self.mask[:, :-1], self.counts[:, :-1], self.index)


def pad(tokens: Sequence[Tokens], chosen: Sequence[int], pad_id: int) -> TokenBatch:
    """Return the chosen samples as one batch."""
    width = max(len(tokens[i].ids) for i in chosen)
    ids = torch.full((len(chosen), width), pad_id)
    mask = torch.zeros(len(chosen), width, dtype=torch.int64)
    counts = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, i in enumerate(chosen):
        n = len(tokens[i].ids)
        ids[row, :n], mask[row, :n] = torch.tensor(tokens[i].ids), 1
        counts[row, :n] = torch.tensor(tokens[i].counts)
    return TokenBatch(ids, mask, counts, torch.tensor(chosen))


def in_order(tokens: Sequence[Tokens], size: int, pad_id: int) -> Iterator[TokenBatch]:
    """Yield every sample once, longest first, in batches of at most ``size``."""
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i].ids))
    for start in range(0, len(order), size):
        yield pad(tokens, order[start : start + size], pad_id)


def shuffled(
    tokens: Sequence[Tokens], size: int, pad_id: int, generator: torch.Generator
) -> Iterator[TokenBatch]:
    """Yield batches of at most ``size`` samples for ever: each sample once per epoch, in random order.

    A batch holds samples of similar length, and the batches of an epoch are of about one size.
    """
    while True:
        for window in torch.randperm(len(tokens), generator=generator).split(size * _WINDOW):
            order = sorted(window.tolist(), key=lambda i: len(tokens[i].ids))
            parts = torch.tensor(order).tensor_split(math.ceil(len(order) / size))
            for k in torch.randperm(len(parts), generator=generator).tolist():
                yield pad(tokens, parts[k].tolist(), pad_id)
