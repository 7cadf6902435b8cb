"""LEACE: least-squares concept erasure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NoConceptWarning, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.shrinkage import Shrinkage
from repe_unlearn.thin_moments import ThinMoments

from .linalg import (
    AnyMoments,
    check,
    correlation_factor,
    correlations,
    independent_columns,
    positive_definite,
    scales,
    shrink,
)


def leace(
    m: Moments | ThinMoments,
    *,
    affine: bool = True,
    shrinkage: Shrinkage = "olse",
    rtol: float | None = None,
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
        m: moments of x [d] and z [k]. With fewer samples than coordinates, ``ThinMoments`` give the same eraser
            in O(n² d) time and O(n d) memory.
        affine: keep the mean of x (needs a bias when baked).
        shrinkage: ``"olse"``, a weight in [0, 1] towards the identity of the *correlation* matrix, or None;
            with ``ThinMoments`` also ``"ledoit_wolf"``.
        rtol: canonical correlations up to this count as zero; default ``10 * max(d, k) * eps`` of float64.

    Returns:
        Eraser of rank ``rank(Σxz)`` (at most k - 1 for one-hot z); rank 0 with a NoConceptWarning if x and z
        are uncorrelated to rounding.

    Raises:
        NotEnoughDataError: one class, constant z, or fewer than 2 samples.
        NonFiniteError: NaN or infinity in the moments.
        InputError: an unknown shrinkage, or ``"ledoit_wolf"`` with ``Moments``.

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
    u = u[:, s > _tolerance(m, rtol)]
    if u.shape[1] == 0:
        _warn_identity(m.n, s)
    left = std_x[:, None] * factor.times(u)
    right = factor.solve_transposed(u).T / std_x
    return Eraser(left, right, _shift(m, affine))


def leace_many(
    moments: Sequence[Moments],
    *,
    affine: bool = True,
    shrinkage: Shrinkage = "olse",
    rtol: float | None = None,
) -> list[Eraser]:
    """Return ``[leace(m, ...) for m in moments]`` to rounding, solved as one batch: many sites, one width.

    One batched Cholesky factorization and batched triangular solves on ``[s, d, d]``, which pays on a GPU and for
    small d; beyond that memory is what counts, three times ``s * d²`` float64 numbers. Moments whose
    correlation matrix is not numerically positive definite are solved one by one, as ``leace`` does (with its
    warning).

    Args:
        moments: s moments of the same d and k, on one device.
        affine: keep the mean of x.
        shrinkage: as ``leace``.
        rtol: as ``leace``.

    Returns:
        Erasers in the order of the moments; their ranks may differ.

    Raises:
        ShapeError: the moments differ in d, k or device.
        NotEnoughDataError, NonFiniteError, InputError: as ``leace``, for the first that fails.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z = torch.arange(200) % 2
        >>> sites = [Moments.of(torch.randn(200, 8) + z[:, None], z) for _ in range(3)]
        >>> all(a.allclose(leace(m)) for a, m in zip(leace_many(sites), sites))
        True
    """
    kinds = {(m.d, m.k, m.mean_x.device) for m in moments}
    if not kinds:
        return []
    if len(kinds) > 1:
        found = ", ".join(f"(d={d}, k={k}, {device})" for d, k, device in sorted(kinds, key=str))
        raise ShapeError(
            f"got moments of {len(kinds)} kinds, {found}; needed one width, number of concept columns and device. "
            "Solve each group by itself."
        )
    for m in moments:
        check(m)
    corr, b, std = [], [], []
    for m in moments:
        std_x, std_z = scales(m)
        matrix, moving = correlations(m, std_x)
        corr.append(shrink(matrix, m.n, shrinkage, moving=moving))
        b.append(m.cov_xz / std_x[:, None] / std_z)
        std.append(std_x)
    lower, info = torch.linalg.cholesky_ex(torch.stack(corr))
    trusted = positive_definite(lower, info, moments[0].d).tolist()
    # The basis of the columns that ``independent_columns`` takes, with zeros in place of the dropped ones, so that
    # all have one shape; zeros come out of the solve as zero correlations.
    u, s, _ = torch.linalg.svd(torch.stack(b), full_matrices=False)
    keep = s > 10 * max(b[0].shape) * torch.finfo(s.dtype).eps
    white = torch.linalg.solve_triangular(lower, u * (s * keep)[:, None], upper=False)
    white[~torch.tensor(trusted, device=white.device)] = 0.0
    u, s, _ = torch.linalg.svd(white, full_matrices=False)
    left = lower @ u
    right = torch.linalg.solve_triangular(lower.mT, u, upper=True)
    erasers = []
    for i, m in enumerate(moments):
        if not trusted[i]:
            erasers.append(leace(m, affine=affine, shrinkage=shrinkage, rtol=rtol))
            continue
        chosen = s[i] > _tolerance(m, rtol)
        if not chosen.any():
            _warn_identity(m.n, s[i])
        scale = std[i][:, None]
        erasers.append(Eraser(scale * left[i][:, chosen], (right[i][:, chosen] / scale).T, _shift(m, affine)))
    return erasers


def _tolerance(m: AnyMoments, rtol: float | None) -> float:
    # For canonical correlations: numbers between 0 and 1 without a unit, so the bound is relative by nature.
    return 10 * max(m.d, m.k) * torch.finfo(torch.float64).eps if rtol is None else rtol


def _shift(m: AnyMoments, affine: bool) -> Tensor:
    return m.mean_x if affine else torch.zeros_like(m.mean_x)


def _warn_identity(n: float, correlations: Tensor) -> None:
    largest = float(correlations.max()) if correlations.numel() else 0.0
    warnings.warn(
        f"x and z are uncorrelated to rounding over {n:g} samples (largest canonical correlation "
        f"{largest:.1e}): the eraser is the identity. If this is not expected, check labels and tokens.",
        NoConceptWarning,
        stacklevel=3,
    )
