"""Encoding: a Contrast and a Select become padded token batches with the positions and labels that count."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .contrast import Contrast, Example
from .errors import InputError, NotEnoughDataError, ShapeError
from .positions import Positions, selected
from .tokens import TEXT_KINDS, Select

_TOKENISED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One prompt as token ids, with the positions that count and one label for each of them.

    Attributes:
        ids: token ids, no padding.
        positions: indices into ids.
        labels: one class id or real per position.
        owner: index of the example in its contrast.
    """

    ids: list[int]
    positions: list[int]
    labels: list[int] | list[float]
    owner: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A padded batch. ``b`` prompts, ``t`` positions, ``m`` selected positions in all.

    Attributes:
        ids: ``[b, t]`` token ids.
        mask: ``[b, t]`` 1 for real tokens, 0 for padding.
        position_ids: ``[b, t]`` counted from the first real token, so that left padding changes nothing; None where
            padding is on the right: each family then numbers its positions in its own way (RoBERTa begins at 2).
        row, column: ``[m]`` where the selected positions are.
        z: ``[m]`` labels (``[b]`` when pooled: one per prompt).
        owner: ``[m]`` example index (``[b]`` when pooled).
        pooled: average the selected positions of each prompt.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor | None
    row: Tensor
    column: Tensor
    z: Tensor
    owner: Tensor
    pooled: bool

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device, so that no site has to move it again."""
        names = ("ids", "mask", "position_ids", "row", "column", "z", "owner")
        tensors = {name: t for name in names if (t := getattr(self, name)) is not None}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})

    def arguments(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the forward."""
        arguments = {"input_ids": self.ids, "attention_mask": self.mask}
        return arguments if self.position_ids is None else {**arguments, "position_ids": self.position_ids}

    def pick(self, x: Tensor) -> Tensor:
        """Return the selected rows ``[m, d]`` (or their means ``[b, d]``) of activations ``x`` [b, t, d].

        Raises:
            ShapeError: x has not one row for every position of the batch.
        """
        b, t = self.ids.shape
        if x.ndim < 2 or x.shape[:-1] not in ((b, t), (b * t,)):
            raise ShapeError(
                f"a site gives {tuple(x.shape)} for {b} prompts of {t} tokens; needed [{b}, {t}, d]. Name a site that "
                "has one vector per token."
            )
        row, column = self.row.to(x.device), self.column.to(x.device)
        rows = x.reshape(b, t, -1)[row, column]  # routers and experts see [b * t, d]
        if not self.pooled:
            return rows
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = wide.new_zeros(b, wide.shape[-1]).index_add_(0, row, wide)
        return sums / wide.new_zeros(b).index_add_(0, row, wide.new_ones(len(row)))[:, None]

    def labels(self, x: Tensor) -> Tensor:
        """Return the label of every row of ``pick(x)``."""
        return self.z.to(x.device)

    def owners(self, x: Tensor) -> Tensor:
        """Return the example of every row of ``pick(x)``."""
        return self.owner.to(x.device)


def encode(
    contrast: Contrast, tokenizer: Any, select: Select, *, max_length: int | None = None
) -> list[Encoded]:
    """Return every example as token ids with its selected positions and labels.

    Args:
        contrast: labelled prompts.
        tokenizer: a Hugging Face tokenizer; a fast one (with character offsets) for word, words, after_prompt
            and token-level labels.
        select: which positions count.
        max_length: longest prompt the model takes, in tokens.

    Raises:
        InputError: a prompt is longer than ``max_length``, character offsets are needed and missing, or
            token-level labels would be averaged.
        NotEnoughDataError: no token of a prompt is left after the selection.
    """
    spans_needed = contrast.kind == "tokens" or select.kind in TEXT_KINDS or select.splits
    if spans_needed and not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which Select({select.kind!r}) and "
            "token-level labels need; load the fast tokenizer of this model."
        )
    if contrast.kind == "tokens" and select.pooled:
        raise InputError(
            f"Select({select.kind!r}) makes one row per prompt, but each token has a label; use 'words' or 'all'."
        )
    ready = select.resolve(tokenizer)
    encoded = []
    for i, (example, ids, offsets) in enumerate(_tokenised(contrast, tokenizer, spans_needed)):
        if max_length is not None and len(ids) > max_length:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, the model takes {max_length}: {example.text[:60]!r}... "
                "Shorten it."
            )
        positions = _positions(ids, offsets, example, ready)
        labels = _labels(positions, offsets, example, contrast.kind)
        if contrast.kind == "tokens":
            positions = [p for p, label in zip(positions, labels, strict=True) if label >= 0]
            labels = [label for label in labels if label >= 0]
        elif not positions:
            raise NotEnoughDataError(
                f"no token of prompt {i} ({example.text[:60]!r}, {len(ids)} tokens) is left for {select}: "
                "sink and special positions are excluded. Use a longer prompt, sinks=0, or another selection."
            )
        encoded.append(Encoded(ids, positions, labels, i))
    if not any(e.positions for e in encoded):
        raise NotEnoughDataError(f"no labelled token is left in {len(encoded)} prompts for {select}.")
    return encoded


def _tokenised(contrast: Contrast, tokenizer: Any, spans: bool) -> Iterator[tuple[Example, list[int], Any]]:
    """Yield examples with token ids and character offsets; a tokenizer's output is far larger than the ids."""
    for start in range(0, len(contrast.examples), _TOKENISED_AT_ONCE):
        examples = contrast.examples[start : start + _TOKENISED_AT_ONCE]
        texts = [example.text for example in examples]
        out = tokenizer(texts, add_special_tokens=True, return_offsets_mapping=spans)
        offsets = out["offset_mapping"] if spans else [None] * len(texts)
        for example, ids, where in zip(examples, out["input_ids"], offsets, strict=True):
            yield example, list(ids), where


def _positions(ids: list[int], offsets: Any, example: Example, select: Select) -> list[int]:
    """Return the selected indices into ids; the selection is in token ids (see ``Select.resolve``)."""
    index = torch.arange(len(ids))[None]
    begin = _generation_begin(offsets, example, select) if select.splits else len(ids)
    number = (index - begin).clamp_min(-1)
    at = Positions(index, number, torch.tensor([begin]), torch.tensor(ids)[None])
    allowed = selected(select, at)[0].nonzero()[:, 0].tolist()
    match select.kind:
        case "word":
            return _inside(allowed, offsets, _span(example, select))[-1:]
        case "span":
            return _inside(allowed, offsets, _span(example, select))
        case "words":
            if not example.words:
                raise InputError(
                    f"Select('words') needs token-level labels; the example {example.text[:60]!r} has none."
                )
            return [p for span in example.words for p in _inside(allowed, offsets, span)[-1:]]
        case _:
            return allowed


def _generation_begin(offsets: Any, example: Example, select: Select) -> int:
    """Return the index of the first token at or after ``prompt_end``; an example without one is all prompt."""
    if example.prompt_end == 0 and select.kind != "after_prompt":
        return len(offsets)
    return next((p for p, (start, _) in enumerate(offsets) if start >= example.prompt_end), len(offsets))


def _span(example: Example, select: Select) -> tuple[int, int]:
    """Return the characters that ``word`` and ``span`` select: those of the given text, else of the focus."""
    if select.text:
        found = re.search(rf"(?<!\w){re.escape(select.text)}(?!\w)", example.text)
        if found is None:
            raise InputError(
                f"Select({select.kind!r}) finds no word {select.text!r} in {example.text[:60]!r}."
            )
        return found.span()
    if example.focus is None:
        raise InputError(
            f"Select({select.kind!r}) needs a focus word; the example {example.text[:60]!r} has none. Name the word: "
            f"Select({select.kind!r}, text=...)."
        )
    return example.focus


def _inside(allowed: list[int], offsets: Any, span: tuple[int, int]) -> list[int]:
    return [p for p in allowed if _overlaps(offsets[p], span)]


def _overlaps(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    return offset[0] < span[1] and offset[1] > span[0]


def _labels(positions: list[int], offsets: Any, example: Example, kind: str) -> list:
    if kind != "tokens":
        return [example.label] * len(positions)
    labels = example.label
    assert isinstance(labels, tuple)
    found = []
    for p in positions:
        # The token belongs to the word in which it ends (a leading space belongs to the word that follows).
        words = [i for i, span in enumerate(example.words) if span[0] < offsets[p][1] <= span[1]]
        found.append(labels[words[0]] if words else -1)
    return found


class Batches(Sequence[Batch]):
    """Batches of prompts, padded when they are asked for: token ids are all that is kept."""

    def __init__(
        self, chunks: Sequence[Sequence[Encoded]], *, pad_id: int, side: str, pooled: bool, real: bool
    ) -> None:
        self._chunks = chunks
        self._pad_id, self._side, self._pooled, self._real = pad_id, side, pooled, real

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(
                self._chunks[index],
                pad_id=self._pad_id,
                side=self._side,
                pooled=self._pooled,
                real=self._real,
            )
        return _pad(self._chunks[index], self._pad_id, self._side, self._pooled, self._real)

    @property
    def padding(self) -> float:
        """Share of all positions that are padding, 0 to 1."""
        real = sum(len(e.ids) for chunk in self._chunks for e in chunk)
        return 1 - real / max(1, sum(len(chunk) * len(chunk[0].ids) for chunk in self._chunks))

    def digest(self) -> str:
        """16 hex digits that change with any token, position, label or batch boundary."""
        content = repr([[(e.ids, e.positions, e.labels, e.owner) for e in chunk] for chunk in self._chunks])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def batches(
    encoded: Sequence[Encoded],
    *,
    batch_tokens: int,
    pad_id: int,
    side: Literal["left", "right"],
    pooled: bool,
    real: bool,
) -> Batches:
    """Return batches of prompts of similar length, each at most ``batch_tokens`` positions including padding.

    Args:
        encoded: prompts; those without a selected position are dropped.
        batch_tokens: budget per batch, >= 1; a longer prompt gets a batch of its own.
        pad_id: token id for padding.
        side: where padding goes.
        pooled: see ``Batch``.
        real: labels are real numbers rather than class ids.
    """
    if batch_tokens < 1:
        raise InputError(f"got batch_tokens={batch_tokens}; needed at least 1.")
    # Longest first: the largest batch comes first, so a machine that is too small says so at once.
    order = sorted((e for e in encoded if e.positions), key=lambda e: (-len(e.ids), e.owner))
    chunks, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // len(order[start].ids))
        chunks.append(order[start : start + size])
        start += size
    return Batches(chunks, pad_id=pad_id, side=side, pooled=pooled, real=real)


def pad_id_of(tokenizer: Any) -> int:
    """Return the id to pad with; padding is masked, so any id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def longest_text(model: nn.Module) -> int | None:
    """Return how many tokens a model takes, None if it does not say."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _pad(chunk: Sequence[Encoded], pad_id: int, side: str, pooled: bool, real: bool) -> Batch:
    width = len(chunk[0].ids)
    ids = torch.full((len(chunk), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(chunk), width, dtype=torch.int64)
    row, column, z, owner = [], [], [], []
    for b, e in enumerate(chunk):
        start = width - len(e.ids) if side == "left" else 0
        ids[b, start : start + len(e.ids)] = torch.tensor(e.ids)
        mask[b, start : start + len(e.ids)] = 1
        row += [b] * len(e.positions)
        column += [start + p for p in e.positions]
        z += e.labels[:1] if pooled else e.labels
        owner += [e.owner] * (1 if pooled else len(e.positions))
    position_ids = (mask.cumsum(1) - 1).clamp_min(0) if side == "left" else None
    labels = torch.tensor(z, dtype=torch.float64 if real else torch.int64)
    return Batch(
        ids, mask, position_ids, torch.tensor(row), torch.tensor(column), labels, torch.tensor(owner), pooled
    )


def completion_tokens(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Return the token ids of prompt and completion together, and the indices of those that end behind the prompt.

    Tokenised jointly, as the model will see them: a token that covers the seam belongs to the completion. Special tokens
    belong to neither.

    Raises:
        InputError: the tokenizer gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which tell prompt and completion apart; "
            "load the fast tokenizer of this model."
        )
    out = tokenizer(prompt + completion, add_special_tokens=True, return_offsets_mapping=True)
    behind = [k for k, (_, end) in enumerate(out["offset_mapping"]) if end > len(prompt)]
    return list(out["input_ids"]), behind
