"""One batch of activations and labels, checked and flattened to rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError, ShapeError


def checked_rows(
    x: Tensor,
    z: Tensor,
    classes: int | None,
    weight: Tensor | None,
    mask: Tensor | None,
    widen: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check and flatten one batch to x [n, d], z [n, k], weight [n] or None, all finite.

    Args:
        x: ``[..., d]``.
        z: ``[...]`` ids or reals, or ``[..., k]``.
        classes: number of classes for ids.
        weight: ``[...]`` or None. Rows of weight 0 are left out, like those that the mask hides.
        mask: ``[...]`` or None.
        widen: convert x to float64; otherwise it keeps its dtype and, where it can, its memory.

    Raises:
        ShapeError, NonFiniteError, InputError: see ``Moments.of``.
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ShapeError(
            f"got x of dtype {x.dtype} and shape {tuple(x.shape)}; needed floating-point activations "
            "of shape [..., d]."
        )
    lead = x.shape[:-1]
    count = math.prod(lead)
    if z.shape != lead and (z.ndim == 0 or z.shape[:-1] != lead):
        raise ShapeError(
            f"got x {tuple(x.shape)} and z {tuple(z.shape)}; needed z of shape {tuple(lead)} "
            f"or {(*lead, 'k')}."
        )
    rows = x.detach().reshape(count, x.shape[-1])
    rows = rows.to(torch.float64) if widen else rows
    columns = 1 if z.shape == lead else z.shape[-1]
    labels = z.detach().reshape(count, columns).to(rows.device)
    weights = None
    if weight is not None:
        weights = _flat(weight, lead, "weight").to(rows.device, torch.float64)
        if (weights < 0).any():
            raise InputError(
                "got a negative sample weight; needed weights >= 0 (use '-' on Moments to take samples out)."
            )
    keep = None if mask is None else _flat(mask, lead, "mask").to(rows.device, torch.bool)
    if weights is not None and bool((weights == 0).any()):
        keep = weights != 0 if keep is None else keep & (weights != 0)
    if keep is not None:
        rows, labels = rows[keep], labels[keep]
        weights = weights[keep] if weights is not None else None
    # After the mask, so that an ignored position may hold any label (-100 is common).
    ids = z.shape == lead and not z.is_floating_point()
    targets = _one_hot(labels[:, 0], classes) if ids else labels.to(torch.float64)
    for name, value in (("x", rows), ("z", None if ids else targets), ("weight", weights)):
        if value is not None and not all_finite(value):
            bad = int((~torch.isfinite(value)).reshape(value.shape[0], -1).any(1).sum())
            raise NonFiniteError(
                f"{name} holds NaN or infinite values in {bad} of {value.shape[0]} rows; nothing was added."
            )
    return rows, targets, weights


def all_finite(value: Tensor) -> bool:
    """True when no entry is NaN or infinite; one pass without a mask of the same shape."""
    if value.numel() == 0:
        return True
    # NaN is passed on by both; a sum would do too, but it overflows in half precision.
    low, high = torch.aminmax(value)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _flat(value: Tensor, lead: torch.Size, name: str) -> Tensor:
    if value.shape != lead:
        raise ShapeError(f"got {name} {tuple(value.shape)}; needed {tuple(lead)}, one entry per sample.")
    return value.reshape(-1)


def _one_hot(ids: Tensor, classes: int | None) -> Tensor:
    if ids.numel() == 0:
        return torch.zeros(0, classes or 0, dtype=torch.float64, device=ids.device)
    ids = ids.to(torch.int64)
    low, high = (int(end) for end in torch.aminmax(ids))
    k = classes if classes is not None else high + 1
    if low < 0 or high >= k:
        raise InputError(f"got class ids from {low} to {high}; needed 0 <= id < {k} (the number of classes).")
    columns = torch.zeros(len(ids), k, dtype=torch.float64, device=ids.device)
    return columns.scatter_(1, ids[:, None], 1.0)
