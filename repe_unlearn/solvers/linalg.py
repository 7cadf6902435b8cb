"""The scale-free linear algebra that the solvers share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from concept_erasure import optimal_linear_shrinkage
from torch import Tensor

from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, NumericalWarning
from repe_unlearn.moments import Moments

Shrinkage = Literal["olse"] | float | None


def check(m: Moments) -> None:
    """Refuse moments that no solver can use.

    Raises:
        NotEnoughDataError: fewer than two samples, or z is the same everywhere (one class).
        NonFiniteError: NaN or infinity.
    """
    for name in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz"):
        if not torch.isfinite(getattr(m, name)).all():
            raise NonFiniteError(
                f"Moments.{name} holds NaN or infinite values; check the activations it was made from."
            )
    if m.n < 2:
        raise NotEnoughDataError(f"got {m.n:g} samples; needed at least 2.")
    if bool(_constant(m.cov_zz.diagonal(), m.mean_z).all()):
        raise NotEnoughDataError(
            f"z is constant over all {m.n:g} samples (one class); needed at least two classes or values."
        )


def scales(m: Moments) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of x [d] and of z [k]; 1 where a coordinate is constant to rounding."""
    return _safe_std(m.cov_xx.diagonal(), m.mean_x), _safe_std(m.cov_zz.diagonal(), m.mean_z)


def _constant(variance: Tensor, mean: Tensor) -> Tensor:
    # A constant coordinate has a computed variance of about (eps * mean)^2, which must not be blown up to 1.
    return variance <= (64 * torch.finfo(variance.dtype).eps * mean).square()


def _safe_std(variance: Tensor, mean: Tensor) -> Tensor:
    return torch.where(_constant(variance, mean), torch.ones_like(variance), variance.clamp_min(0).sqrt())


@dataclass(frozen=True, slots=True)
class Factor:
    """A square root F of a correlation matrix, with what is needed to multiply by it and to solve with it.

    Attributes:
        lower: ``[d, d]`` Cholesky factor (then F is ``lower``), or None.
        vectors: ``[d, d]`` eigenvectors (then F is ``vectors * roots``), or None.
        roots: ``[d]`` square roots of the eigenvalues, floored away from zero.
        floored: ``[d]`` True where the eigenvalue was raised to the floor: a direction without variance.
    """

    lower: Tensor | None = None
    vectors: Tensor | None = None
    roots: Tensor | None = None
    floored: Tensor | None = None

    def times(self, b: Tensor) -> Tensor:
        """Return ``F b``."""
        if self.lower is not None:
            return self.lower @ b
        vectors, roots, _ = self._eigen()
        return vectors @ (roots[:, None] * b)

    def solve(self, b: Tensor) -> Tensor:
        """Return ``F⁻¹ b``; correlations of rounding size with a direction without variance count as zero."""
        if self.lower is not None:
            return torch.linalg.solve_triangular(self.lower, b, upper=False)
        vectors, roots, floored = self._eigen()
        inside = vectors.T @ b
        # Rounding noise divided by the floor would make the eraser read directions the sample never showed.
        noise = 10 * b.shape[0] * torch.finfo(b.dtype).eps
        inside[floored & (inside.norm(dim=1) <= noise)] = 0.0
        return inside / roots[:, None]

    def solve_transposed(self, b: Tensor) -> Tensor:
        """Return ``F⁻ᵀ b``."""
        if self.lower is not None:
            return torch.linalg.solve_triangular(self.lower.T, b, upper=True)
        vectors, roots, _ = self._eigen()
        return vectors @ (b / roots[:, None])

    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.vectors is not None
        assert self.roots is not None
        assert self.floored is not None
        return self.vectors, self.roots, self.floored


def independent_columns(b: Tensor) -> Tensor:
    """Return ``b [d, k]`` in an orthonormal basis of its columns ``[d, r]``, without those of rounding size.

    One-hot columns of z are linearly dependent. Their dependence must be found here, among plain
    correlations: after a solve with a nearly singular factor its rounding noise looks like one more direction
    of the concept.
    """
    u, s, _ = torch.linalg.svd(b, full_matrices=False)
    keep = s > 10 * max(b.shape) * torch.finfo(b.dtype).eps
    return u[:, keep] * s[keep]


def correlation_factor(m: Moments, scale: Tensor, shrinkage: Shrinkage) -> Factor:
    """Return the square root F of the (shrunk) correlation matrix of x.

    Equilibration comes before everything else, so one coordinate that is 1e6 times the others neither hides
    them nor takes part in a tolerance. F is the Cholesky factor; where the matrix is not numerically positive
    definite it comes from the eigendecomposition, with eigenvalues floored relative to the largest (and a
    warning).
    """
    corr = m.cov_xx / scale[:, None] / scale
    diagonal = corr.diagonal()
    # Constant coordinates have variance 0 and covariance 0 with everything: give them a variance of 1.
    missing = torch.where(diagonal <= 0.5, 1.0 - diagonal, torch.zeros_like(diagonal))
    corr = corr + torch.diag_embed(missing)
    corr = shrink(corr, m.n, shrinkage)
    factor, info = torch.linalg.cholesky_ex(corr)
    eps = torch.finfo(corr.dtype).eps
    if int(info) == 0 and float(factor.diagonal().min()) ** 2 > corr.shape[0] * eps:
        return Factor(lower=factor)
    values, vectors = torch.linalg.eigh(corr)
    floor = float(values[-1]) * corr.shape[0] * eps
    warnings.warn(
        f"the covariance of x ({m.n:g} samples, d={m.d}) is singular to rounding: "
        f"{int((values <= floor).sum())} directions hold no variance. The eraser is exact on this sample; "
        "use shrinkage='olse' or more prompts for a stable one.",
        NumericalWarning,
        stacklevel=3,
    )
    return Factor(vectors=vectors, roots=values.clamp_min(floor).sqrt(), floored=values <= floor)


def shrink(corr: Tensor, n: float, shrinkage: Shrinkage) -> Tensor:
    """Return the correlation matrix shrunk towards the identity.

    Args:
        corr: ``[d, d]``.
        n: number of samples.
        shrinkage: ``"olse"`` (the optimal linear estimate of Bodnar, Gupta & Parolya 2014, arXiv 1308.2608,
            as implemented by concept-erasure), a weight in [0, 1] for the identity, or None.

    Raises:
        InputError: another value.
    """
    if shrinkage is None:
        return corr
    if shrinkage == "olse":
        isotropic = corr.diagonal().mean() * torch.eye(corr.shape[0], dtype=corr.dtype, device=corr.device)
        if torch.equal(corr, isotropic):
            return corr  # already at the target, where the estimate is 0 / 0
        off = corr - isotropic
        estimate = optimal_linear_shrinkage(corr, max(int(n), 2)) - isotropic
        # Unbounded for nearly uncorrelated features; with a weight outside 0..1 it need not be a covariance.
        weight = ((estimate * off).sum() / off.square().sum()).clamp(0.0, 1.0)
        return isotropic + weight * off
    if isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1:
        return (1 - shrinkage) * corr + shrinkage * torch.eye(
            corr.shape[0], dtype=corr.dtype, device=corr.device
        )
    raise InputError(f"got shrinkage={shrinkage!r}; needed 'olse', a number from 0 to 1, or None.")
