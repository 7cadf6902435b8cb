"""Edit: what is added to one parameter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NonFiniteError, ShapeError

_AT_ONCE = 2**19  # numbers that are edited at once: 4 MB in float64, which stay in the cache of a processor


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """What is added to one parameter: ``left @ right`` (low rank) or, with ``right`` None, ``left`` itself.

    Stacked parameters (the experts of a mixture, [E, rows, cols]) take factors with leading axes; a factor without
    them is shared by the whole stack.

    Args:
        left: ``[..., rows, r]``, or the shape of the parameter.
        right: ``[..., r, cols]`` or None.
        rule: which rule made it, in words; ends up in reports and manifests.

    Raises:
        ShapeError: left and right do not fit.
        NonFiniteError: NaN or infinity.

    Example:
        >>> Edit(torch.ones(8, 3, 1), torch.ones(1, 2), "one right for all experts").shape
        (8, 3, 2)
    """

    left: Tensor
    right: Tensor | None
    rule: str

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is None:
                continue
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"an edit ({self.rule}) holds NaN or infinite values; check the eraser it came from."
                )
            object.__setattr__(self, name, value.detach().to("cpu", torch.float64).clone())
        if self.right is not None and not _fit(self.left.shape, self.right.shape):
            raise ShapeError(
                f"an edit has left {tuple(self.left.shape)} and right {tuple(self.right.shape)}; needed "
                "[..., m, r] and [..., r, n]."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter it fits."""
        if self.right is None:
            return tuple(self.left.shape)
        return (*self._stack, self.left.shape[-2], self.right.shape[-1])

    @property
    def _stack(self) -> tuple[int, ...]:
        """The axes of a stack before the two of its matrices."""
        if self.right is None:
            return tuple(self.left.shape[:-2])
        # torch.broadcast_shapes would import sympy, which takes longer than editing a gigabyte.
        pairs = itertools.zip_longest(self.left.shape[-3::-1], self.right.shape[-3::-1], fillvalue=1)
        return tuple(a if b == 1 else b for a, b in pairs)[::-1]

    @property
    def rank(self) -> int | None:
        """Rank of a low-rank edit (of every matrix of a stack), None for a dense one."""
        return None if self.right is None else self.left.shape[-1]

    @property
    def mT(self) -> Edit:
        """The edit of the parameter with its last two axes swapped: of a Conv1D weight, which is stored [in, out]."""
        if self.right is None:
            return Edit(self.left.mT, None, self.rule)
        return Edit(self.right.mT, self.left.mT, self.rule)

    def delta(self) -> Tensor:
        """Return the change as a dense float64 tensor."""
        return self.left if self.right is None else self.left @ self.right

    def norm(self) -> float:
        """Return the Frobenius norm of the change."""
        if self.right is None:
            return float(self.left.norm())
        # ||LR||² = tr(LᵀL RRᵀ): r×r instead of the dense product
        return float(((self.left.mT @ self.left) * (self.right @ self.right.mT)).sum().clamp_min(0).sqrt())

    def part(self, index: tuple[int | slice, ...]) -> Edit:
        """Return the edit of ``parameter[index]``: one matrix of a stack, or some of its rows.

        Args:
            index: ``()`` for all, or one number per axis of the stack, with a slice of rows after them or not.

        Example:
            >>> Edit(torch.ones(8, 6, 1), torch.ones(1, 2), "x").part((7, slice(0, 3))).shape
            (3, 2)
        """
        if not index:
            return self
        if self.right is None:
            return Edit(self.left[index], None, self.rule)
        stack = self._stack
        left = self.left.expand(*stack, *self.left.shape[-2:])[index]
        right = self.right.expand(*stack, *self.right.shape[-2:])[index[: len(stack)]]
        return Edit(left, right, self.rule)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the edited parameter: computed in float64, cast once to the parameter's dtype.

        Memory besides the result: a few rows of one matrix in float64.

        Raises:
            ShapeError: the parameter has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ShapeError(
                f"the edit ({self.rule}) is for shape {self.shape}; the parameter has {tuple(weight.shape)}."
            )
        edited = torch.empty_like(weight)
        wide = None
        for place, rows in self.blocks():
            old = weight[(*place, rows)]
            if wide is None:  # the first block is the largest
                wide = torch.empty(old.shape, dtype=torch.float64, device=old.device)
            edited[(*place, rows)] = self.add_to(wide[: len(old)].copy_(old), place, rows)
        return edited

    def blocks(self) -> list[tuple[tuple[int, ...], slice]]:
        """Return the parameter cut into blocks of whole rows, in the order of the elements, the largest first.

        Returns:
            The place in the stack (``()`` where there is none) and the rows there, for every block.
        """
        stack = self._stack
        rows, *width = self.shape[len(stack) :]
        step = max(1, _AT_ONCE // max(1, math.prod(width)))
        cuts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        return list(itertools.product(itertools.product(*map(range, stack)), cuts))

    def add_to(self, values: Tensor, place: tuple[int, ...], rows: slice) -> Tensor:
        """Add the change of one block to its values, float64 and contiguous, in place; return them."""
        if self.right is None:
            return values.add_(self.left[(*place, rows)].to(values.device))
        stack = self._stack
        left = self.left.expand(*stack, *self.left.shape[-2:])[(*place, rows)]
        right = self.right.expand(*stack, *self.right.shape[-2:])[place]
        return values.addmm_(left.to(values.device), right.to(values.device))


def _fit(left: torch.Size, right: torch.Size) -> bool:
    """True when two factors can be multiplied, leading axes broadcast."""
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        return False
    return all(a == b or 1 in (a, b) for a, b in zip(left[-3::-1], right[-3::-1], strict=False))
