"""LEACE: least-squares concept erasure."""

from __future__ import annotations

import warnings

import torch

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NoConceptWarning
from repe_unlearn.moments import Moments

from .linalg import Shrinkage, check, correlation_factor, independent_columns, scales


def leace(
    m: Moments, *, affine: bool = True, shrinkage: Shrinkage = "olse", rtol: float | None = None
) -> Eraser:
    """Return the eraser after which no linear predictor of z beats a constant, at least mean-square change.

    Exact for the sample behind ``m``: the erased x has zero covariance with z, whatever the shrinkage (which
    only moves the result away from least change). With ``affine=True`` the mean of x is kept and the
    guarantee covers predictors with an intercept. With ``affine=False`` the same projection is used without
    the constant, for places that have no bias slot; the covariance is zero all the same. The least-change
    claim holds for ``shrinkage=None``, a nonsingular covariance and ``affine=True``.

    With Σxx = D F Fᵀ D (D the standard deviations) and the thin SVD ``F⁻¹ D⁻¹ Σxz = U S Vᵀ``:
    ``left = D F U``, ``right = Uᵀ F⁻¹ D⁻¹``, so that ``right @ left = I`` and ``P = I - left @ right``
    annihilates Σxz. The result does not depend on the units of z and is equivariant to those of every
    coordinate of x.

    Args:
        m: moments of x [d] and z [k].
        affine: keep the mean of x (needs a bias when baked).
        shrinkage: ``"olse"``, a weight in [0, 1] towards the identity of the *correlation* matrix, or None.
        rtol: canonical correlations up to this count as zero; default ``10 * max(d, k) * eps`` of float64.

    Returns:
        Eraser of rank ``rank(Σxz)`` (at most k - 1 for one-hot z); rank 0 with a NoConceptWarning if x and z
        are uncorrelated to rounding.

    Raises:
        NotEnoughDataError: one class, constant z, or fewer than 2 samples.
        NonFiniteError: NaN or infinity in the moments.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819, Theorem 4.3.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, z = torch.randn(200, 8), torch.arange(200) % 2
        >>> x[:, 0] += 3 * z
        >>> m = Moments.of(leace(Moments.of(x, z))(x), z)
        >>> bool(m.cov_xz.abs().max() < 1e-6)
        True
    """
    check(m)
    std_x, std_z = scales(m)
    factor = correlation_factor(m, std_x, shrinkage)
    white = factor.solve(independent_columns(m.cov_xz / std_x[:, None] / std_z))
    u, s, _ = torch.linalg.svd(white, full_matrices=False)
    # s are correlations (numbers between 0 and 1 without a unit), so the bound is relative by nature.
    tolerance = 10 * max(m.d, m.k) * torch.finfo(torch.float64).eps if rtol is None else rtol
    u = u[:, s > tolerance]
    if u.shape[1] == 0:
        warnings.warn(
            f"x and z are uncorrelated to rounding over {m.n:g} samples (largest canonical correlation "
            f"{float(s.max()) if s.numel() else 0.0:.1e}): the eraser is the identity. "
            "If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=2,
        )
    left = std_x[:, None] * factor.times(u)
    right = factor.solve_transposed(u).T / std_x
    shift = m.mean_x if affine else torch.zeros_like(m.mean_x)
    return Eraser(left, right, shift)
