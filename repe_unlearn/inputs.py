"""Inputs: batches of tensors for models that read no text, and for text that is already token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from .errors import InputError, NotEnoughDataError, ShapeError
from .tokens import Select

# Padding never counts: these tensors say where it is, if the caller does not name the positions.
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One batch for any model: pixels, audio features, token ids; a sequence of them stands in for a contrast.

    Give ``capture``, ``gather`` or ``fit_sequential`` ``None`` for the tokenizer and a list of these. The list may be
    any sequence that makes its items when asked for them: only one batch is needed at a time (and one pass before, to
    count the classes).

    Args:
        tensors: keyword arguments of the model's forward, each ``[b, ...]``.
        z: ``[b]`` one label per example or ``[b, t]`` one per position; integer class ids or reals. Negative ids in
            ``[b, t]`` are left out (-100 is common).
        positions: ``[b, t]`` bool, True where a position counts; at every site of shape ``[b, t, d]``. Default: where
            ``attention_mask`` (or ``decoder_attention_mask``) is on if its shape fits the site, else everywhere. The
            first position and special tokens count like any other: only here can they be left out.

    Raises:
        ShapeError: the tensors differ in ``b``, or z or positions do not fit.
        InputError: no tensor at all.

    Example:
        >>> Inputs({"pixel_values": torch.zeros(4, 3, 8, 8)}, z=torch.tensor([0, 1, 0, 1]))
        Inputs(pixel_values [4, 3, 8, 8], z [4])
    """

    tensors: Mapping[str, Tensor]
    z: Tensor
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.tensors or not all(isinstance(t, Tensor) and t.ndim for t in self.tensors.values()):
            raise InputError(
                "got no tensor, or something that is none, in Inputs.tensors; needed the forward's keyword arguments, "
                "each [b, ...], e.g. {'pixel_values': images}."
            )
        sizes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        if len({shape[0] for shape in sizes.values()}) != 1:
            raise ShapeError(f"got tensors {sizes}; needed the same number of examples in each.")
        if self.z.ndim not in (1, 2) or self.z.shape[0] != len(self):
            raise ShapeError(f"got z {tuple(self.z.shape)} for {len(self)} examples; needed [b] or [b, t].")
        p = self.positions
        if p is not None and (p.dtype != torch.bool or p.ndim != 2 or p.shape[0] != len(self)):
            raise ShapeError(f"got positions {tuple(p.shape)} of {p.dtype}; needed bool [{len(self)}, t].")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __repr__(self) -> str:
        parts = {**self.tensors, "z": self.z} | (
            {} if self.positions is None else {"positions": self.positions}
        )
        return f"Inputs({', '.join(f'{name} {list(t.shape)}' for name, t in parts.items())})"


@dataclass(frozen=True, slots=True, eq=False)
class InputBatch:
    """``Inputs`` in the form that the capture loop runs: what to call the model with and which rows to take.

    Attributes:
        inputs: the tensors.
        pooled: average the positions of each example.
        first: index of its first example in the whole data.
    """

    inputs: Inputs
    pooled: bool
    first: int

    def to(self, device: torch.device) -> InputBatch:
        """Return the batch on another device."""
        i = self.inputs
        tensors = {name: t.to(device, non_blocking=True) for name, t in i.tensors.items()}
        positions = None if i.positions is None else i.positions.to(device)
        return replace(self, inputs=Inputs(tensors, i.z.to(device), positions))

    def arguments(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the forward."""
        return dict(self.inputs.tensors)

    def pick(self, x: Tensor) -> Tensor:
        """Return the rows that count, ``[m, d]`` (pooled: ``[b, d]``), of activations ``x`` [b, ..., d]."""
        grid = self._grid(x)
        mask = self._mask(grid)
        if not self.pooled:
            return grid[mask]
        wide = grid.to(torch.promote_types(x.dtype, torch.float32))
        counts = mask.sum(1, keepdim=True)
        if not bool(counts.all()):
            raise NotEnoughDataError("an example has no position that counts; leave it out or name one.")
        # where, not a product: what lies at a padded position may be NaN.
        return torch.where(mask[..., None], wide, 0).sum(1) / counts

    def labels(self, x: Tensor) -> Tensor:
        """Return the label of every row of ``pick(x)``."""
        mask, z = self._mask(self._grid(x)), self.inputs.z.to(x.device)
        if self.pooled:
            return z
        return (z[:, None].expand(mask.shape) if z.ndim == 1 else z)[mask]

    def owners(self, x: Tensor) -> Tensor:
        """Return the example of every row of ``pick(x)``."""
        mask = self._mask(self._grid(x))
        index = torch.arange(self.first, self.first + len(mask), device=x.device)
        return index if self.pooled else index[:, None].expand(mask.shape)[mask]

    def _grid(self, x: Tensor) -> Tensor:
        b = len(self.inputs)
        flat = x.ndim == 2 and x.shape[0] % b == 0  # routers, experts and OPT's MLP see [b * t, d]
        if not flat and (x.ndim < 2 or x.shape[0] != b):
            raise ShapeError(f"a site gives {tuple(x.shape)} for {b} examples; needed [{b}, ..., d].")
        return x.reshape(b, -1, x.shape[-1])

    def _mask(self, grid: Tensor) -> Tensor:
        shape, i = grid.shape[:2], self.inputs
        if i.positions is not None:
            if i.positions.shape != shape:
                raise ShapeError(
                    f"a site has {shape[1]} positions per example, Inputs.positions {i.positions.shape[1]}; leave "
                    "positions out, or capture this site on its own."
                )
            mask = i.positions.to(grid.device)
        else:
            masks = [i.tensors[name] for name in _MASKS if name in i.tensors]
            fitting = [m for m in masks if m.shape == shape]
            mask = (
                fitting[0].to(grid.device, torch.bool) if fitting else grid.new_ones(shape, dtype=torch.bool)
            )
        if i.z.ndim == 1:
            return mask
        if i.z.shape != shape:
            raise ShapeError(
                f"a site has {shape[1]} positions per example, z {i.z.shape[1]}; needed the same."
            )
        z = i.z.to(grid.device)
        return mask if z.is_floating_point() else mask & (z >= 0)


class InputBatches(Sequence[InputBatch]):
    """The batches of a sequence of ``Inputs``, each made when it is asked for."""

    def __init__(self, data: Sequence[Inputs], pooled: bool, firsts: Sequence[int], chosen: Sequence[int]):
        self._data, self._pooled, self._firsts, self._chosen = data, pooled, firsts, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> InputBatch: ...
    @overload
    def __getitem__(self, index: slice) -> InputBatches: ...
    def __getitem__(self, index: int | slice) -> InputBatch | InputBatches:
        if isinstance(index, slice):
            return InputBatches(self._data, self._pooled, self._firsts, self._chosen[index])
        i = self._chosen[index]
        return InputBatch(self._data[i], self._pooled, self._firsts[i])

    def digest(self) -> str:
        """16 hex digits that change with any byte of the data; reads all of it."""
        state = hashlib.blake2b(digest_size=8)
        for batch in self:
            i = batch.inputs
            for name, t in [*i.tensors.items(), ("z", i.z), ("positions", i.positions)]:
                if t is not None:
                    state.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
                    state.update(
                        t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    )
        return state.hexdigest()


def input_batches(data: Sequence[Inputs], select: Select) -> InputBatches:
    """Return the batches of some inputs.

    Raises:
        InputError: something else than Inputs, no inputs, a selection other than all or mean, or one label per position
            where positions would be averaged.
    """
    if select not in (Select("all"), Select("mean")):
        raise InputError(
            f"got {select!r} for Inputs, which know no words or special tokens; needed 'all' or 'mean'. Choose positions "
            "with Inputs(..., positions=)."
        )
    firsts, total = [], 0
    for item in data:
        if not isinstance(item, Inputs):
            raise InputError(
                f"got {type(item).__name__} among the Inputs; without a tokenizer all must be Inputs."
            )
        if select.pooled and item.z.ndim == 2:
            raise InputError(
                "Select('mean') makes one row per example, but each position has a label; use 'all'."
            )
        firsts.append(total)
        total += len(item)
    if not firsts:
        raise InputError("got an empty list of Inputs; needed at least one.")
    return InputBatches(data, select.pooled, firsts, range(len(firsts)))


def class_count(data: Sequence[Inputs]) -> int | None:
    """Return the number of classes of all labels together, None for reals.

    Raises:
        InputError: some labels are class ids and some reals, or an example's class id is negative.
    """
    real = {item.z.is_floating_point() for item in data}
    if len(real) > 1:
        raise InputError("got class ids in some Inputs and reals in others; needed one kind of z.")
    if True in real:
        return None
    if any(bool((item.z < 0).any()) for item in data if item.z.ndim == 1):
        raise InputError("got a negative class id in z [b]; only z [b, t] may leave positions out that way.")
    return 1 + max((int(item.z.max()) for item in data if item.z.numel()), default=0)
