"""The scale-free linear algebra that the solvers share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypeAlias, overload

import torch
from torch import Tensor

from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, NumericalWarning
from repe_unlearn.moments import Moments
from repe_unlearn.shrinkage import Shrinkage, check_shrinkage, olse_weight, row_weight
from repe_unlearn.thin_moments import ThinMoments

__all__ = [
    "AnyMoments",
    "Factor",
    "Shrinkage",
    "ThinFactor",
    "check",
    "correlation_factor",
    "correlations",
    "independent_columns",
    "positive_definite",
    "scales",
    "shrink",
]

AnyMoments: TypeAlias = Moments | ThinMoments


def check(m: AnyMoments) -> None:
    """Refuse moments that no solver can use.

    Raises:
        NotEnoughDataError: fewer than two samples, or z is the same everywhere (one class).
        NonFiniteError: NaN or infinity.
    """
    second = "m_xx" if isinstance(m, Moments) else "var_x"
    for name in ("mean_x", "mean_z", second, "m_xz", "m_zz"):
        if not torch.isfinite(getattr(m, name)).all():
            raise NonFiniteError(
                f"{type(m).__name__}.{name} holds NaN or infinite values; check the activations it was made from."
            )
    if m.n < 2:
        raise NotEnoughDataError(
            f"got {m.n:g} samples; needed at least 2. Weights count rows: multiply weights that sum to 1 by the "
            "number of rows."
        )
    if bool(_constant(m.cov_zz.diagonal(), m.mean_z).all()):
        raise NotEnoughDataError(
            f"z is constant over all {m.n:g} samples (one class); needed at least two classes or values."
        )


def scales(m: AnyMoments) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of x [d] and of z [k]; 1 where a coordinate is constant to rounding."""
    return _safe_std(m.var_x, m.mean_x), _safe_std(m.cov_zz.diagonal(), m.mean_z)


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


@dataclass(frozen=True, slots=True)
class ThinFactor:
    """A square root F of a correlation matrix of few samples, without a d x d matrix.

    ``F = Q G Qᵀ + rest (I - Q Qᵀ)`` with Q a basis of the span of the samples. Without shrinkage ``rest`` is 0
    and the inverses are pseudo-inverses: nothing is read from directions that no sample showed.

    Attributes:
        basis: Q, ``[d, m]`` with orthonormal columns.
        inner: G, the square root of the correlation matrix within the span, ``[m, m]``.
        rest: square root of the eigenvalue of all other directions, the weight of the identity.
    """

    basis: Tensor
    inner: Factor
    rest: float

    def times(self, b: Tensor) -> Tensor:
        """Return ``F b``."""
        inside = self.basis.T @ b
        return self.basis @ self.inner.times(inside) + self.rest * (b - self.basis @ inside)

    def solve(self, b: Tensor) -> Tensor:
        """Return ``F⁻¹ b``."""
        inside = self.basis.T @ b
        return self._with_rest(b, inside, self.inner.solve(inside))

    def solve_transposed(self, b: Tensor) -> Tensor:
        """Return ``F⁻ᵀ b``."""
        inside = self.basis.T @ b
        return self._with_rest(b, inside, self.inner.solve_transposed(inside))

    def _with_rest(self, b: Tensor, inside: Tensor, solved: Tensor) -> Tensor:
        found = self.basis @ solved
        return found if self.rest == 0 else found + (b - self.basis @ inside) / self.rest


def concept_correlations(m: AnyMoments) -> tuple[Tensor, Tensor, float]:
    """Return the correlation matrix of z [k, k], the standard deviations of z [k], and a relative tolerance.

    Eigenvalues up to the tolerance are rounding. It grows with the root of the number of samples: one-hot columns sum
    to a constant, and a smaller tolerance takes that dependence for a direction when samples are many or a class is
    rare.
    """
    _, std_z = scales(m)
    corr = m.cov_zz / std_z[:, None] / std_z
    return (corr + corr.T) / 2, std_z, 10 * m.k * max(m.n, 1.0) ** 0.5 * torch.finfo(corr.dtype).eps


def independent_columns(b: Tensor) -> Tensor:
    """Return ``b [d, k]`` in an orthonormal basis of its columns ``[d, r]``, without those of rounding size.

    One-hot columns of z are linearly dependent. Their dependence must be found here, among plain
    correlations: after a solve with a nearly singular factor its rounding noise looks like one more direction
    of the concept.
    """
    u, s, _ = torch.linalg.svd(b, full_matrices=False)
    keep = s > 10 * max(b.shape) * torch.finfo(b.dtype).eps
    return u[:, keep] * s[keep]


def correlations(m: Moments, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the correlation matrix of x [d, d], and the number of coordinates that are not constant.

    Constant coordinates have variance 0 and covariance 0 with everything: they get a variance of 1.
    """
    corr = m.m_xx / (m.n * scale)[:, None]
    corr /= scale
    diagonal = corr.diagonal()
    moving = diagonal > 0.5
    diagonal.copy_(torch.where(moving, diagonal, 1.0))
    return corr, moving.sum()


@overload
def correlation_factor(m: Moments, scale: Tensor, shrinkage: Shrinkage) -> Factor: ...
@overload
def correlation_factor(m: AnyMoments, scale: Tensor, shrinkage: Shrinkage) -> Factor | ThinFactor: ...
def correlation_factor(m: AnyMoments, scale: Tensor, shrinkage: Shrinkage) -> Factor | ThinFactor:
    """Return the square root F of the (shrunk) correlation matrix of x.

    Equilibration comes before everything else, so one coordinate that is 1e6 times the others neither hides
    them nor takes part in a tolerance. F is the Cholesky factor; where the matrix is not numerically positive
    definite it comes from the eigendecomposition, with eigenvalues floored relative to the largest (and a
    warning). Fewer samples than coordinates in ``ThinMoments`` give the same F (up to a rotation, which no
    projection depends on) in O(n² d) instead of O(d³).
    """
    if isinstance(m, Moments):
        corr, moving = correlations(m, scale)
        factor = _root(shrink(corr, m.n, shrinkage, moving=moving), m.d)
    else:
        check_shrinkage(shrinkage)
        y = m.standardised(scale)
        moving = m.var_x > 0.5 * scale.square()
        weight = row_weight(y[:, moving] if not moving.all() else y, m.weight, m.n, shrinkage)
        if y.shape[0] < m.d:
            basis, r = torch.linalg.qr(y.T)
            inner = (1 - weight) * (r @ r.T)
            inner.diagonal().add_(weight)
            factor = ThinFactor(basis, _root(inner, m.d), weight**0.5)
        else:
            corr = (1 - weight) * (y.T @ y)
            corr.diagonal().add_((~moving).to(corr.dtype) * (1 - weight) + weight)
            factor = _root(corr, m.d)
    root = factor.inner if isinstance(factor, ThinFactor) else factor
    if root.floored is not None:
        empty = int(root.floored.sum()) + m.d - len(root.floored)
        warnings.warn(
            f"the covariance of x ({m.n:g} samples, d={m.d}) is singular to rounding: "
            f"{empty} directions hold no variance. The eraser is exact on this sample; "
            "use shrinkage='olse' or more prompts for a stable one.",
            NumericalWarning,
            stacklevel=3,
        )
    return factor


def positive_definite(lower: Tensor, info: Tensor, d: int) -> Tensor:
    """Return True [...] where a Cholesky factor ``[..., d, d]`` of a correlation matrix can be trusted."""
    smallest = lower.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    return (info == 0) & (smallest > d * torch.finfo(lower.dtype).eps)


def _root(matrix: Tensor, d: int) -> Factor:
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(positive_definite(lower, info, d)):
        return Factor(lower=lower)
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1] * d * torch.finfo(matrix.dtype).eps
    return Factor(vectors=vectors, roots=values.clamp_min(floor).sqrt(), floored=values <= floor)


def shrink(corr: Tensor, n: float, shrinkage: Shrinkage, *, moving: Tensor | None = None) -> Tensor:
    """Return the correlation matrix shrunk towards the identity.

    Args:
        corr: ``[..., d, d]`` with a diagonal of ones.
        n: number of samples.
        shrinkage: ``"olse"`` (the optimal linear estimate of Bodnar, Gupta & Parolya 2014, arXiv 1308.2608), a
            weight in [0, 1] for the identity, or None. See ``repe_unlearn.shrinkage``.
        moving: ``[...]`` number of coordinates that are not constant; default d.

    Raises:
        InputError: another value; ``"ledoit_wolf"``, which cannot be had from second moments.
    """
    check_shrinkage(shrinkage)
    if shrinkage is None:
        return corr
    if shrinkage == "ledoit_wolf":
        raise InputError(
            "got shrinkage='ledoit_wolf' with Moments; it needs the fourth moments of the rows, which Moments "
            "do not hold. Pass ThinMoments.of(x, z), or use 'olse'."
        )
    if shrinkage == "olse":
        off = corr.clone()
        off.diagonal(dim1=-2, dim2=-1).zero_()
        trace = corr.new_tensor(corr.shape[-1]) if moving is None else moving.to(corr.dtype)
        weight = olse_weight(off.square_().sum((-2, -1)), trace, n)[..., None]
    else:
        weight = corr.new_full((*corr.shape[:-2], 1), float(shrinkage))
    shrunk = (1 - weight)[..., None] * corr
    shrunk.diagonal(dim1=-2, dim2=-1).add_(weight)
    return shrunk
