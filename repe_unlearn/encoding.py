"""Encoding: a Contrast and a Select become padded token batches with the positions and labels that count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .contrast import Contrast, Example
from .errors import InputError, NotEnoughDataError
from .tokens import Select


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
        position_ids: ``[b, t]`` counted from the first real token, so that left padding changes nothing.
        row, column: ``[m]`` where the selected positions are.
        z: ``[m]`` labels (``[b]`` when pooled: one per prompt).
        owner: ``[m]`` example index (``[b]`` when pooled).
        pooled: average the selected positions of each prompt.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    row: Tensor
    column: Tensor
    z: Tensor
    owner: Tensor
    pooled: bool

    def pick(self, x: Tensor) -> Tensor:
        """Return the selected rows ``[m, d]`` (or their means ``[b, d]``) of activations ``x`` [b, t, d]."""
        row, column = self.row.to(x.device), self.column.to(x.device)
        rows = x[row, column]
        if not self.pooled:
            return rows
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = wide.new_zeros(x.shape[0], x.shape[-1]).index_add_(0, row, wide)
        return sums / torch.bincount(row, minlength=x.shape[0]).to(wide)[:, None]


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
    spans_needed = contrast.kind == "tokens" or select.kind in ("word", "span", "words", "after_prompt")
    if spans_needed and not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which Select({select.kind!r}) and "
            "token-level labels need; load the fast tokenizer of this model."
        )
    if contrast.kind == "tokens" and select.pooled:
        raise InputError(
            f"Select({select.kind!r}) makes one row per prompt, but each token has a label; use 'words' or 'all'."
        )
    special = set(tokenizer.all_special_ids)
    texts = list(contrast.texts)
    out = tokenizer(texts, add_special_tokens=True, return_offsets_mapping=spans_needed)
    encoded = []
    for i, example in enumerate(contrast.examples):
        ids = list(out["input_ids"][i])
        if max_length is not None and len(ids) > max_length:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, the model takes {max_length}: {example.text[:60]!r}... "
                "Shorten it."
            )
        offsets = out["offset_mapping"][i] if spans_needed else None
        allowed = [p for p in range(select.sinks, len(ids)) if select.specials or ids[p] not in special]
        positions = _positions(allowed, offsets, example, select)
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


def _positions(allowed: list[int], offsets: Any, example: Example, select: Select) -> list[int]:
    match select.kind:
        case "last":
            return allowed[-1:]
        case "mean" | "all":
            return allowed
        case "after_prompt":
            return [p for p in allowed if offsets[p][0] >= example.prompt_end]
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


def _span(example: Example, select: Select) -> tuple[int, int]:
    """Return the characters that ``word`` and ``span`` select: those of the given text, else of the focus."""
    if select.text:
        found = re.search(rf"(?<!\w){re.escape(select.text)}(?!\w)", example.text)
        if found is None:
            raise InputError(f"{select} finds no word {select.text!r} in {example.text[:60]!r}.")
        return found.span()
    if example.focus is None:
        raise InputError(
            f"{select} needs a focus word; the example {example.text[:60]!r} has none. Name the word: "
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


def batches(
    encoded: Sequence[Encoded],
    *,
    batch_tokens: int,
    pad_id: int,
    side: Literal["left", "right"],
    pooled: bool,
    real: bool,
) -> list[Batch]:
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
    result: list[Batch] = []
    while order:
        width = len(order[0].ids)
        size = max(1, batch_tokens // width)
        result.append(_pad(order[:size], width, pad_id, side, pooled, real))
        order = order[size:]
    return result


def _pad(chunk: Sequence[Encoded], width: int, pad_id: int, side: str, pooled: bool, real: bool) -> Batch:
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
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    labels = torch.tensor(z, dtype=torch.float64 if real else torch.int64)
    return Batch(
        ids, mask, position_ids, torch.tensor(row), torch.tensor(column), labels, torch.tensor(owner), pooled
    )
