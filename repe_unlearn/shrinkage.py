"""Shrinkage: how much of the identity to mix into a correlation matrix that few samples estimate badly.

All rules return the weight ρ of the identity in ``(1 - ρ) C + ρ I``, a number in [0, 1]. C is the *correlation*
matrix, so no rule depends on the units of x; constant coordinates do not count. What a rule has to know differs:

| rule | reads | offered for |
|---|---|---|
| None | nothing, ρ = 0 | all |
| a number | nothing, ρ = the number | all |
| ``"olse"`` | C and n | all |
| ``"ledoit_wolf"`` | C, n and the sum of ‖y‖⁴ over the standardised rows y, which no second moment holds | rows, ``ThinMoments`` |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from .rows import all_finite

Shrinkage = Literal["olse", "ledoit_wolf"] | float | None


def check_shrinkage(shrinkage: Shrinkage) -> None:
    """Refuse what is not a rule.

    Raises:
        InputError: not None, ``"olse"``, ``"ledoit_wolf"`` or a number from 0 to 1.
    """
    if shrinkage is None or shrinkage in ("olse", "ledoit_wolf"):
        return
    if not isinstance(shrinkage, int | float) or not 0 <= shrinkage <= 1:
        raise InputError(
            f"got shrinkage={shrinkage!r}; needed 'olse', 'ledoit_wolf' (with ThinMoments), "
            "a number from 0 to 1, or None."
        )


def olse_weight(gap: Tensor, trace: Tensor, n: float | Tensor) -> Tensor:
    """Return the weight of the identity in the optimal linear shrinkage estimator, from two numbers of C.

    Asymptotically optimal in Frobenius norm among linear estimates when d and n grow in proportion, without
    an assumption on the distribution beyond finite moments of order above 4. The weight is clamped to [0, 1],
    which the published formula is not for nearly uncorrelated coordinates; inside, it is the same number.

    Args:
        gap: ``[...]`` ``‖C - t I‖²`` in Frobenius norm, with ``t = tr C / d``.
        trace: ``[...]`` ``tr C``.
        n: number of samples.

    Returns:
        ``[...]`` in [0, 1]; 1 where C is a multiple of the identity already.

    Reference:
        Bodnar, Gupta, Parolya: On the strong convergence of the optimal linear shrinkage estimator for large
        dimensional covariance matrix, 2014, arXiv 1308.2608.

    Example:
        >>> c = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> olse_weight((c - torch.eye(2)).square().sum(), c.trace(), 100).item()
        0.08
    """
    noise = trace.square() / n  # what the off-target part of C would be about from n samples of white noise
    return torch.where(gap > noise, noise / torch.where(gap > 0, gap, 1.0), torch.ones_like(gap))


def ledoit_wolf_weight(gap: Tensor, fourth: Tensor, square: Tensor, n: float) -> Tensor:
    """Return the weight of the identity in the Ledoit-Wolf estimator, from three numbers of C and its rows.

    Consistent for the best linear estimate in Frobenius norm when d and n grow in proportion. The same number
    as ``sklearn.covariance.ledoit_wolf`` on standardised rows.

    Args:
        gap: ``‖C - t I‖²`` in Frobenius norm, with ``t = tr C / d``.
        fourth: ``Σ w ‖y‖⁴ / n`` over the rows y whose mean outer product is C.
        square: ``‖C‖²``.
        n: number of samples.

    Returns:
        A number in [0, 1]; 0 where C is a multiple of the identity already.

    Reference:
        Ledoit, Wolf: A well-conditioned estimator for large-dimensional covariance matrices, Journal of
        Multivariate Analysis 88 (2004) 365-411.
    """
    spread = ((fourth - square) / n).clamp_min(0.0)  # mean ‖y yᵀ - C‖² / n: the variance of C as an estimate
    return torch.where(gap > 0, torch.minimum(spread, gap) / torch.where(gap > 0, gap, 1.0), 0.0)


def shrinkage_of(x: Tensor, shrinkage: Shrinkage) -> float:
    """Return the weight of the identity that a rule gives to the correlation matrix of rows.

    Args:
        x: ``[n, d]`` rows; constant coordinates do not count.
        shrinkage: a rule, see the top of this module.

    Raises:
        ShapeError: x is not two-dimensional or not floating point.
        NonFiniteError: NaN or infinity in x.
        NotEnoughDataError: fewer than 2 rows, or every coordinate is constant.
        InputError: an unknown rule.

    Example:
        >>> x = torch.eye(4).repeat(5, 1)
        >>> round(shrinkage_of(x, "ledoit_wolf"), 3), shrinkage_of(x, 0.25)
        (0.4, 0.25)
    """
    check_shrinkage(shrinkage)
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"got x {x.dtype} {tuple(x.shape)}; needed floating-point rows [n, d].")
    if not all_finite(x):
        raise NonFiniteError("x holds NaN or infinite values; check the activations it was made from.")
    rows = x.to(torch.float64)
    mean = rows.mean(0)
    rows = rows - mean
    variance = rows.square().mean(0)
    eps = torch.finfo(torch.float64).eps
    moving = variance > (64 * eps * mean).square()
    if len(x) < 2 or not moving.any():
        raise NotEnoughDataError(
            f"got {len(x)} rows of which {int(moving.sum())} coordinates vary; needed at least 2 rows and 1."
        )
    return row_weight(rows[:, moving] / variance[moving].sqrt() / len(x) ** 0.5, None, len(x), shrinkage)


def row_weight(y: Tensor, weight: Tensor | None, n: float, shrinkage: Shrinkage) -> float:
    """Return the weight of the identity from rows ``y`` [m, d] with ``C = yᵀ y``, at the cost of ``y yᵀ``.

    Args:
        y: ``[m, d]`` float64, already multiplied by the square roots of ``weight / n``.
        weight: ``[m]`` weights of the rows, or None for ones.
        n: sum of the weights.
        shrinkage: a rule.
    """
    check_shrinkage(shrinkage)
    if shrinkage is None:
        return 0.0
    if not isinstance(shrinkage, str):
        return float(shrinkage)
    m, d = y.shape
    # ‖yᵀ y‖ = ‖y yᵀ‖; the smaller of the two products.
    square = (y @ y.T if m <= d else y.T @ y).square().sum()
    lengths = y.square().sum(1)
    trace = lengths.sum()
    gap = (square - trace.square() / d).clamp_min(0.0)
    if shrinkage == "olse":
        return float(olse_weight(gap, trace, n))
    # y is sqrt(w / n) times the standardised row, so w ‖row‖⁴ / n = n ‖y‖⁴ / w.
    ones = torch.ones_like(lengths) if weight is None else weight
    fourth = (n * lengths.square() / ones.clamp_min(torch.finfo(ones.dtype).tiny)).sum()
    return float(ledoit_wolf_weight(gap, fourth, square, n))
