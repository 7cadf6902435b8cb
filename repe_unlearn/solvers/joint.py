"""Joint erasers: several concepts at one place, or one concept at several places, guarded by one map."""

from __future__ import annotations

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, ShapeError
from repe_unlearn.moments import Moments

from .agreement import require_same_x
from .leace import leace
from .linalg import Shrinkage, check


def joint(
    *moments: Moments, affine: bool = True, shrinkage: Shrinkage = "olse", rtol: float | None = None
) -> Eraser:
    """Return one eraser that leaves x without covariance with each of several concepts.

    Exact for the sample, and of least mean-square change among affine maps that do so, under the conditions
    of ``leace``: it is ``leace`` on the stacked columns of all z. Applying the erasers of single concepts in
    turn is not the same: the second was fit on x as it was, so after the first it no longer fits.

    Args:
        moments: of the *same* x [d] and one concept each; one value with many columns of z is fine as well.
        affine: keep the mean of x.
        shrinkage: as ``leace``.
        rtol: as ``leace``.

    Returns:
        Eraser whose rank is that of all Σxz side by side.

    Raises:
        InputError: no moments, or moments taken over different activations.
        ShapeError: the widths differ.
        NotEnoughDataError, NonFiniteError: as ``leace``, for every concept.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819, Theorem 4.3 (for z of any number of columns).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, a, b = torch.randn(200, 8), torch.arange(200) % 2, torch.arange(200) // 2 % 3
        >>> e = joint(Moments.of(x, a), Moments.of(x, b))
        >>> e.rank, bool(Moments.of(e(x), b).cov_xz.abs().max() < 1e-6)
        (3, True)
    """
    first = _first(moments)
    for number, other in enumerate(moments[1:], start=2):
        require_same_x(first, other, f"concept {number}")
    return leace(_stacked(first, moments), affine=affine, shrinkage=shrinkage, rtol=rtol)


def shared(
    *moments: Moments, affine: bool = True, shrinkage: Shrinkage = "olse", rtol: float | None = None
) -> Eraser:
    """Return one eraser to use at several sites (layers), which guards the concept at each of them.

    Exact at every site for its own sample, not merely for the pool: the range of every site's Σxz is removed.
    Among affine maps that do so it has the least mean-square change summed over all samples of all sites,
    under the conditions of ``leace``. Merging the moments (``a + b``) and solving once guards only the pool:
    traces of opposite sign at two sites cancel there. The mean that is kept is that of the pool.

    A map shared by the whole residual stream is what can be baked into its writers.

    Args:
        moments: of x [d] and the concept, one value per site; the columns of z may differ between sites.
        affine: keep the mean of the pooled x.
        shrinkage: as ``leace``, on the pooled correlation matrix.
        rtol: as ``leace``.

    Returns:
        Eraser whose rank is that of all Σxz side by side: up to the number of sites times k - 1.

    Raises:
        InputError: no moments.
        ShapeError: the widths differ.
        NotEnoughDataError, NonFiniteError: as ``leace``, for every site.

    Reference:
        Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman: LEACE: Perfect linear concept erasure
        in closed form, NeurIPS 2023, arXiv 2306.03819, Theorem 4.3, applied to the pooled covariance.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z, low, high = torch.arange(200) % 2, torch.randn(200, 8), torch.randn(200, 8)
        >>> e = shared(Moments.of(low, z), Moments.of(high, z))
        >>> e.rank, bool(Moments.of(e(high), z).cov_xz.abs().max() < 1e-6)
        (2, True)
    """
    pool = _without_z(_first(moments))
    for number, other in enumerate(moments[1:], start=2):
        if other.d != pool.d:
            raise ShapeError(
                f"got moments of width d={pool.d} and, at place {number}, d={other.d}; one eraser needs one width."
            )
        pool = pool + _without_z(other)
    return leace(_stacked(pool, moments), affine=affine, shrinkage=shrinkage, rtol=rtol)


def _first(moments: tuple[Moments, ...]) -> Moments:
    if not moments:
        raise InputError(
            "got no moments; needed at least one, e.g. joint(Moments.of(x, a), Moments.of(x, b))."
        )
    for m in moments:
        check(m)
    return moments[0]


def _without_z(m: Moments) -> Moments:
    nothing = m.mean_z[:0]
    return Moments(m.n, m.mean_x, nothing, m.m_xx, m.m_xz[:, :0], m.m_zz[:0, :0])


def _stacked(x: Moments, concepts: tuple[Moments, ...]) -> Moments:
    """Return the x of one value with all columns of z side by side, as ``leace`` needs them.

    How the concepts vary together is not known here, and not used: ``leace`` reads only the variance of each
    column. So this is no sample's moments, and it stays inside this file.
    """

    def columns(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)

    return Moments(
        x.n,
        x.mean_x,
        columns([m.mean_z for m in concepts]),
        x.m_xx,
        x.n * columns([m.cov_xz for m in concepts]),
        x.n * torch.block_diag(*(m.cov_zz for m in concepts)),
    )
