"""Second order: LEACE, and the directions along which the class covariances differ."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning

from .linalg import Factor, Shrinkage, correlation_factor, independent_columns, scales
from .rows import Rows


def second_order(
    x: Tensor,
    z: Tensor,
    *,
    extra: int | None = None,
    limit: int | None = None,
    draws: int = 19,
    affine: bool = True,
    shrinkage: Shrinkage = "olse",
    seed: int = 0,
) -> Eraser:
    """Return an eraser that makes the class means equal, exactly, and the class covariances as equal as it can.

    It removes what ``leace`` removes, then the ``extra`` directions along which the class covariances differ most.
    Always: cov(x, z) = 0 on the sample, as after ``leace``. If what stays of the covariance differences is zero
    too, then no quadratic function of the erased x has a class-dependent mean; and if x is Gaussian within each
    class, the erased x is independent of z, so no predictor of any kind beats a constant. Nothing is promised about
    third and higher moments of other data. It works on rows, not on Moments, which pool the classes.

    Why this one among the methods beyond LEACE: it is closed (one eigenproblem), stays affine and of low rank, so that
    hooks, baking and files work unchanged, and reduces to ``leace`` where only means differ. In the language of
    sufficient dimension reduction, LEACE removes the subspace of sliced inverse regression, and this removes that of
    sliced average variance estimation as well.

    With Σxx = D F Fᵀ D as in ``leace``, whitened rows ``y = F⁻¹ D⁻¹ (x - mean)``, U₁ the range of Cov(y, z),
    Δ_c = Cov(y | c) - Σ π_c Cov(y | c) compressed to the complement of U₁, and U₂ the leading eigenvectors of
    ``Σ π_c Δ_c²`` (the choice of ``extra`` directions that leaves the least ``Σ π_c ‖Δ_c (I - U₂U₂ᵀ)‖²``):
    ``left = D F [U₁ U₂]``, ``right = [U₁ U₂]ᵀ F⁻¹ D⁻¹``.

    How many directions: those whose eigenvalue exceeds, by three standard deviations, the mean of the largest that
    shuffled labels give on the rows with their class means taken out. Covariances of few rows differ by chance, and
    a direction must beat that.

    Args:
        x: ``[n, d]`` activations, any floating dtype; computed in float64.
        z: ``[n]`` integer class ids; classes with fewer than about 2 d rows say little about covariances.
        extra: number of directions beyond those of ``leace``, from 0 (then the result is ``leace``) to d; default
            by the shuffles.
        limit: with ``extra=None``, at most so many; default d. Every one takes variance out of x.
        draws: number of shuffles, at least 2. About 2 % of Gaussian samples without differences lose a direction.
        affine: keep the mean of x.
        shrinkage: as for ``leace``; moves the result away from least change and touches no guarantee.
        seed: of the shuffles.

    Returns:
        Eraser of rank ``rank(Σxz) + extra``, less where d is used up or no difference is left; rank 0 with a
        NoConceptWarning if neither means nor covariances differ.

    Raises:
        ShapeError: x or z of another shape, or real-valued z.
        InputError: extra, limit, draws or shrinkage out of range.
        NotEnoughDataError: one class, or a class with fewer than 2 rows.
        NonFiniteError: NaN or infinity in x.

    Reference:
        Cook, Weisberg: comment on "Sliced inverse regression for dimension reduction", JASA 86, 1991 (SAVE);
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure in
        closed form, NeurIPS 2023, arXiv 2306.03819.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(600, 5, generator=g), torch.arange(600) % 2
        >>> x[:, 0] += 3 * z
        >>> x[:, 1] *= 1 + 2 * z
        >>> e = second_order(x, z)
        >>> e.rank, [round(float(v), 1) for v in x[z == 1].std(0)[:2] / x[z == 0].std(0)[:2]]
        (2, [1.0, 3.1])
        >>> bool(((e(x)[z == 1].std(0) / e(x)[z == 0].std(0) - 1).abs() < 0.2).all())
        True
    """
    rows = Rows.of(x, z, least=2)
    m = rows.moments
    for name, value, low in (("extra", extra, 0), ("limit", limit, 0)):
        if value is not None and not low <= value <= m.d:
            raise InputError(f"got {name}={value}; needed {low} <= {name} <= d = {m.d}, or None.")
    if draws < 2:
        raise InputError(f"got draws={draws}; needed at least 2 shuffles of the labels.")
    std_x, std_z = scales(m)
    factor = correlation_factor(m, std_x, shrinkage)
    first = _mean_directions(rows, std_x, std_z, factor)
    spread = _Spread.of(rows, std_x, factor, first)
    values, vectors = torch.linalg.eigh(spread.differences(rows.z))
    if extra is None:
        floor = spread.chance(rows.z, draws, seed)
        extra = min(int((values > floor).sum()), m.d if limit is None else limit)
    # The values are squares of differences of whitened covariances, of size 1, and resolved to eps of the largest.
    rounding = 10 * m.d * torch.finfo(torch.float64).eps
    extra = min(extra, int((values > rounding * values.clamp_min(1.0)[-1:]).sum()))
    second = spread.complement @ vectors.flip(1)[:, :extra]
    u = torch.cat([first, second], dim=1)
    if u.shape[1] == 0:
        warnings.warn(
            f"over {m.n:g} samples neither the means nor the covariances of the {rows.k} classes differ (beyond "
            "chance): the eraser is the identity. If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=2,
        )
    left = std_x[:, None] * factor.times(u)
    right = factor.solve_transposed(u).T / std_x
    return Eraser(left, right, m.mean_x if affine else torch.zeros_like(m.mean_x))


def _mean_directions(rows: Rows, std_x: Tensor, std_z: Tensor, factor: Factor) -> Tensor:
    """Orthonormal basis [d, rank(Σxz)] of the range of Cov(y, z): what ``leace`` removes from whitened y."""
    m = rows.moments
    white = factor.solve(independent_columns(m.cov_xz / std_x[:, None] / std_z))
    u, s, _ = torch.linalg.svd(white, full_matrices=False)
    return u[:, s > 10 * max(m.d, m.k) * torch.finfo(torch.float64).eps]


@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """Whitened rows without what LEACE removes and without their class means.

    Attributes:
        y: ``[n, d - r]`` coordinates in the complement.
        complement: ``[d, d - r]`` orthonormal.
        share: ``[k]`` of the rows in each class.
        pooled: ``[d - r, d - r]`` covariance of y within classes.
    """

    y: Tensor
    complement: Tensor
    share: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, rows: Rows, std_x: Tensor, factor: Factor, first: Tensor) -> _Spread:
        complement = torch.linalg.qr(first, mode="complete").Q[:, first.shape[1] :]
        white = factor.solve(((rows.x - rows.moments.mean_x) / std_x).T).T
        y = white @ complement
        # The class means agree here to rounding; where a canonical correlation fell under the tolerance, exactly now.
        sums = y.new_zeros(rows.k, y.shape[1]).index_add_(0, rows.z, y)
        y = y - (sums / rows.counts[:, None])[rows.z]
        return cls(y, complement, rows.share, y.T @ y / len(y))

    def differences(self, z: Tensor) -> Tensor:
        """Return ``Σ π_c Δ_c²`` for labels z with the same class sizes."""
        total = torch.zeros_like(self.pooled)
        last = self.pooled.clone()  # the class covariances average to the pooled one, which saves a product
        for c, share in enumerate(self.share.tolist()):
            if c < len(self.share) - 1:
                part = self.y[z == c]
                cov = part.T @ part / len(part)
                last -= share * cov
            else:
                cov = last / share
            total += share * (cov - self.pooled) @ (cov - self.pooled)
        return (total + total.T) / 2

    def chance(self, z: Tensor, draws: int, seed: int) -> float:
        """Return the mean plus three standard deviations of the largest eigenvalue under shuffled labels."""
        if self.y.shape[1] == 0:
            return 0.0
        generator = torch.Generator().manual_seed(seed)
        orders = [
            torch.randperm(len(z), generator=generator, device="cpu").to(z.device) for _ in range(draws)
        ]
        largest = torch.stack([torch.linalg.eigvalsh(self.differences(z[o]))[-1] for o in orders])
        return float(largest.mean() + 3 * largest.std())
