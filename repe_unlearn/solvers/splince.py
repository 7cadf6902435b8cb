"""SPLINCE: erase one concept and keep the covariance with a second one."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning, NotEnoughDataError, NumericalWarning
from repe_unlearn.moments import Moments

from .agreement import require_same_x
from .linalg import Factor, Shrinkage, check, correlation_factor, independent_columns, scales

_CLOSE = 1e-2  # rad; below it the eraser moves x up to 100 times as far as leace does


def splince(
    m: Moments,
    *,
    preserve: Moments,
    affine: bool = True,
    shrinkage: Shrinkage = "olse",
    rtol: float | None = None,
    min_angle: float = 1e-6,
) -> Eraser:
    """Return the eraser that leaves no covariance of x with z and all of the covariance of x with y.

    Both are exact for the sample behind ``m`` and ``preserve``, whatever the shrinkage: P Σxz = 0 and
    P Σxy = Σxy. With ``shrinkage=None``, a nonsingular covariance and ``affine=True`` it is the affine map
    with these two properties (and so also the oblique projection) that changes x least in mean square; it
    never changes x less than ``leace``. Nothing is promised about non-linear predictors of z, nor about y
    itself: whoever knows y still knows what y says of z.

    With Σxx = D F Fᵀ D, orthonormal bases U of ``F⁻¹ D⁻¹ Σxz`` and Q of ``F⁻¹ D⁻¹ Σxy``, and the thin SVD
    ``(I - Q Qᵀ) U = W S Gᵀ``: ``left = D F U G S⁻¹``, ``right = Wᵀ F⁻¹ D⁻¹``. S holds the sines of the angles
    between the two concepts, in whitened coordinates; where one vanishes no such map exists.

    Args:
        m: moments of x [d] and of the concept z to erase.
        preserve: moments of the *same* x and of the concept y to keep, with y in the place of z.
        affine: keep the mean of x (needs a bias when baked).
        shrinkage: as ``leace``.
        rtol: canonical correlations up to this count as zero; default ``10 * max(d, k) * eps`` of float64.
        min_angle: smallest angle between the concepts that is accepted, in rad, in (0, pi/2).

    Returns:
        Eraser of rank ``rank(Σxz)``; rank 0 with a NoConceptWarning if x and z are uncorrelated to rounding.
        Angles under 0.01 rad come with a NumericalWarning.

    Raises:
        InputError: the ranges of Σxz and Σxy meet (the message names the directions and the angle), or
            ``preserve`` was taken over other activations.
        ShapeError: ``preserve`` has another width.
        NotEnoughDataError: one class, constant z or y, or fewer than 2 samples.
        NonFiniteError: NaN or infinity in the moments.

    Reference:
        Holstege, Ravfogel, Wouters: Preserving task-relevant information under linear concept removal,
        NeurIPS 2025, arXiv 2506.10703.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, z, y = torch.randn(200, 8), torch.arange(200) % 2, torch.arange(200) // 2 % 2
        >>> x[:, 0] += 3 * z + y
        >>> x[:, 1] += y
        >>> before, concept = Moments.of(x, y), Moments.of(x, z)
        >>> erased = splince(concept, preserve=before)(x)
        >>> bool(Moments.of(erased, z).cov_xz.abs().max() < 1e-6)
        True
        >>> bool((Moments.of(erased, y).cov_xz - before.cov_xz).abs().max() < 1e-6)
        True
    """
    if not 0 < min_angle < math.pi / 2:
        raise InputError(f"got min_angle={min_angle!r}; needed an angle in rad between 0 and pi/2.")
    check(m)
    require_same_x(m, preserve, "preserve")
    try:
        check(preserve)
    except NotEnoughDataError as error:
        raise NotEnoughDataError(f"preserve (its z is the concept to keep): {error}") from None
    std_x, std_z = scales(m)
    _, std_y = scales(preserve)
    factor = correlation_factor(m, std_x, shrinkage)
    cross_z = m.cov_xz / std_x[:, None] / std_z
    cross_y = preserve.cov_xz / std_x[:, None] / std_y
    u, q = _range(factor, cross_z, rtol), _range(factor, cross_y, rtol)
    v = u - q @ (q.T @ u)
    v = v - q @ (q.T @ v)  # once more: the first pass leaves rounding that a small sine would blow up
    w, sines, gt = torch.linalg.svd(v, full_matrices=False)
    if sines.numel() == 0:
        warnings.warn(
            f"x and z are uncorrelated to rounding over {m.n:g} samples: the eraser is the identity. "
            "If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=2,
        )
    else:
        angle = math.asin(min(1.0, float(sines[-1])))
        shared = (u @ gt[-1])[:, None]
        where = (
            f"the direction of z {_combination(factor, cross_z, shared, 'z')} and the direction of y "
            f"{_combination(factor, cross_y, q @ (q.T @ shared), 'y')} are {angle:.1e} rad apart in x"
        )
        if angle < min_angle:
            raise InputError(
                f"got two concepts whose traces in x meet: {where}; needed at least {min_angle:.0e} rad. No "
                "map removes one and keeps the other. Preserve fewer columns of y, or leave that column of z."
            )
        if angle < _CLOSE:
            warnings.warn(
                f"{where}: the eraser moves x up to {1 / math.sin(angle):.0f} times as far as leace would. "
                "Preserve fewer columns of y, or check on held-out prompts what is left of x.",
                NumericalWarning,
                stacklevel=2,
            )
    left = std_x[:, None] * factor.times(u @ (gt.T / sines))
    right = factor.solve_transposed(w).T / std_x
    return Eraser(left, right, m.mean_x if affine else torch.zeros_like(m.mean_x))


def _range(factor: Factor, cross: Tensor, rtol: float | None) -> Tensor:
    """Return an orthonormal basis [d, r] of the whitened cross-correlations [d, k]."""
    u, s, _ = torch.linalg.svd(factor.solve(independent_columns(cross)), full_matrices=False)
    tolerance = 10 * max(cross.shape) * torch.finfo(cross.dtype).eps if rtol is None else rtol
    return u[:, s > tolerance]


def _combination(factor: Factor, cross: Tensor, direction: Tensor, letter: str) -> str:
    """Return the combination of (standardised) columns whose whitened trace in x is ``direction`` [d, 1]."""
    weights = (torch.linalg.pinv(factor.solve(cross), rtol=1e-10) @ direction)[:, 0]
    weights = weights / weights.norm().clamp_min(torch.finfo(weights.dtype).tiny)
    largest = weights.abs().argsort(descending=True)[:3].tolist()
    terms = [f"{float(weights[i]):+.2f} {letter}[{i}]" for i in largest if abs(float(weights[i])) >= 0.005]
    dropped = "" if len(weights) <= 3 else " ..."
    return f"({' '.join(terms)}{dropped})"
