"""Subspace: remove directions that someone else has found."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments

from .linalg import Shrinkage, correlation_factor, independent_columns, scales

Metric = Literal["orthogonal", "whitened"]


def subspace(
    m: Moments,
    directions: Tensor,
    *,
    metric: Metric = "orthogonal",
    affine: bool = True,
    shrinkage: Shrinkage = "olse",
) -> Eraser:
    """Return the projection that maps the given directions to zero: a step of x along them changes nothing.

    ``"orthogonal"`` is the symmetric projection: afterwards also the inner product of x with every direction
    is constant. ``"whitened"`` is the affine map with ``P v = 0`` for every direction v that changes x least
    in mean square (exactly so for ``shrinkage=None``, a nonsingular covariance and ``affine=True``); the
    inner products are then *not* constant. Neither promises anything about a concept, unless the directions
    span its Σxz: with ``directions = m.m_xz.T`` the results are ``mean_difference(m)`` and ``leace(m)``.

    With an orthonormal basis U of the directions (``"whitened"``: of ``F⁻¹ D⁻¹ v``, where Σxx = D F Fᵀ D):
    ``left = U, right = Uᵀ`` (``"whitened"``: ``left = D F U, right = Uᵀ F⁻¹ D⁻¹``).

    Args:
        m: moments of x [d]; z is not used.
        directions: ``[k, d]``, or ``[d]`` for one, of any lengths. Repeated, dependent and zero rows add
            nothing; rows are compared at unit length, so a short direction counts as much as a long one.
        metric: ``"orthogonal"`` or ``"whitened"``.
        affine: keep the mean of x.
        shrinkage: as ``leace``; only used by ``"whitened"``.

    Returns:
        Eraser of rank ``rank(directions)``; rank 0 with a NoConceptWarning if every direction is zero.

    Raises:
        ShapeError: directions are not floating point or not of width d.
        NonFiniteError: NaN or infinity in the directions or in the moments of x.
        NotEnoughDataError: fewer than 2 samples.
        InputError: unknown metric.

    Example:
        >>> m = Moments.of(torch.randn(50, 3), torch.arange(50) % 2)
        >>> e = subspace(m, torch.tensor([[0.0, 2.0, 0.0], [0.0, 4.0, 0.0]]))
        >>> e.rank, float(e.matrix()[1, 1])
        (1, 0.0)
    """
    check_x(m)
    if metric not in ("orthogonal", "whitened"):
        raise InputError(f"got metric={metric!r}; needed 'orthogonal' or 'whitened'.")
    columns = _columns(directions, m)
    shift = m.mean_x if affine else torch.zeros_like(m.mean_x)
    if metric == "orthogonal":
        basis = _orthonormal(independent_columns(_unit(columns)))
        left, right = basis, basis.T
    else:
        std, _ = scales(m)
        factor = correlation_factor(m, std, shrinkage)
        basis = _orthonormal(factor.solve(independent_columns(_unit(columns / std[:, None]))))
        left, right = std[:, None] * factor.times(basis), factor.solve_transposed(basis).T / std
    if basis.shape[1] == 0:
        warnings.warn(
            f"all {columns.shape[1]} directions are zero: the eraser is the identity. "
            "If this is not expected, check where they come from.",
            NoConceptWarning,
            stacklevel=2,
        )
    return Eraser(left, right, shift)


def check_x(m: Moments) -> None:
    """Refuse moments whose x cannot be used; z may be anything.

    Raises:
        NonFiniteError: NaN or infinity in the mean or the covariance of x.
        NotEnoughDataError: fewer than 2 samples.

    Example:
        >>> check_x(Moments.of(torch.randn(50, 3), torch.zeros(50)))
    """
    for name in ("mean_x", "m_xx"):
        if not torch.isfinite(getattr(m, name)).all():
            raise NonFiniteError(
                f"Moments.{name} holds NaN or infinite values; check the activations it was made from."
            )
    if m.n < 2:
        raise NotEnoughDataError(f"got {m.n:g} samples; needed at least 2.")


def _columns(directions: Tensor, m: Moments) -> Tensor:
    """Check the directions and return them as float64 columns [d, k]."""
    rows = directions[None] if directions.ndim == 1 else directions
    if rows.ndim != 2 or rows.shape[1] != m.d or not rows.is_floating_point():
        raise ShapeError(
            f"got directions {directions.dtype} {tuple(directions.shape)}; needed floating-point [k, {m.d}] "
            f"or [{m.d}], one direction a row."
        )
    if not torch.isfinite(rows).all():
        raise NonFiniteError("directions hold NaN or infinite values; check where they come from.")
    return rows.detach().to(m.mean_x).T


def _unit(columns: Tensor) -> Tensor:
    """Return the columns at length 1; columns of zeros stay."""
    # Divide by the largest entry first, so that squares neither overflow nor vanish.
    peak = columns.abs().amax(0) if columns.numel() else columns.new_zeros(columns.shape[1])
    columns = columns / torch.where(peak > 0, peak, torch.ones_like(peak))
    length = columns.norm(dim=0)
    return columns / torch.where(length > 0, length, torch.ones_like(length))


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of independent columns."""
    return torch.linalg.qr(columns).Q
