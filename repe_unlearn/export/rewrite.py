"""New values of one tensor on disk, block by block, so that the work stays in the cache and memory small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from repe_unlearn.errors import ModelMismatchError, NonFiniteError, ShapeError
from repe_unlearn.export.safetensors_io import Header, TensorSpec, read_tensor, tensor_bytes, tensor_reader
from repe_unlearn.patch import Edit

__all__ = ["AnyEdit", "new_values"]


class AnyEdit(Protocol):
    """What is needed of one edit: a pure map from the old to the new tensor, same shape and dtype."""

    def apply(self, weight: Tensor) -> Tensor:
        """Return the new tensor."""
        ...


def new_values(edit: AnyEdit, spec: TensorSpec, origin: tuple[Header, str] | None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor after an edit, computed in float64 and cast once.

    The same arithmetic as `edit.apply`, which is also what happens to edits that are no `patch.Edit`: those need the
    whole tensor at once, the others a block of it. Every piece is overwritten by the next.

    Args:
        edit: of this tensor.
        spec: of the tensor.
        origin: where its old values are; None for zeros.

    Raises:
        NonFiniteError: NaN or infinity came out.
        ModelMismatchError: the edit is for another shape, or returns another shape or dtype.
    """
    dtype = spec.torch_dtype
    assert dtype is not None  # only plain floats are edited
    if not isinstance(edit, Edit):
        yield tensor_bytes(_whole(edit, spec, origin))
        return
    if edit.shape != spec.shape:
        raise ModelMismatchError(
            f"The edit of {spec.name} is for shape {list(edit.shape)}; the checkpoint's tensor has {list(spec.shape)}."
        )
    blocks = edit.blocks()
    if not blocks:
        return
    place, rows = blocks[0]  # the largest
    # Both are used again and again: fresh memory costs more than the arithmetic.
    narrow = torch.empty((rows.stop, *spec.shape[len(place) + 1 :]), dtype=dtype)
    wide = torch.empty_like(narrow, dtype=torch.float64)
    with nullcontext(Tensor.zero_) if origin is None else tensor_reader(*origin) as read:
        for place, rows in blocks:
            count = rows.stop - rows.start
            block = read(narrow[:count])
            block.copy_(edit.add_to(wide[:count].copy_(block), place, rows))
            _require_finite(spec.name, block)
            yield tensor_bytes(block)


def _whole(edit: AnyEdit, spec: TensorSpec, origin: tuple[Header, str] | None) -> Tensor:
    """Return the new tensor on the CPU, contiguous, after holding the edit to its promise."""
    old = torch.zeros(spec.shape, dtype=spec.torch_dtype) if origin is None else read_tensor(*origin)
    try:
        new = edit.apply(old).detach().cpu().contiguous()
    except (RuntimeError, ShapeError) as error:
        raise ModelMismatchError(
            f"The edit of {spec.name} does not fit the checkpoint's tensor {list(spec.shape)}: {error}"
        ) from error
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ModelMismatchError(
            f"The edit of {spec.name} returned {new.dtype} {list(new.shape)}; needed {old.dtype} {list(old.shape)}."
        )
    _require_finite(spec.name, new)
    return new


def _require_finite(name: str, new: Tensor) -> None:
    # A finite sum has finite terms, and adding is many times faster than looking at every element.
    total = float(new.sum(dtype=torch.promote_types(new.dtype, torch.float32)))
    if not math.isfinite(total) and not torch.isfinite(new).all():
        raise NonFiniteError(
            f"The edit of {name} produced NaN or infinite values in {new.dtype}. Check the patch, or patch a "
            "checkpoint in a wider dtype."
        )
