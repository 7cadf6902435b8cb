"""PCA reading vectors: the directions along which examples of different classes differ most."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NumericalWarning, ShapeError
from repe_unlearn.moments import Moments

from .linalg import check
from .subspace import check_x


def pca(m: Moments, *, rank: int = 1, differences: Moments | None = None, affine: bool = True) -> Eraser:
    """Return the orthogonal projection away from the ``rank`` top principal directions of differences.

    These are the reading vectors of representation engineering. What is guaranteed: among orthogonal
    projections of that rank, this one leaves the least of ``E ‖δ‖²``, where δ is the difference between two
    examples of different classes. What is **not** guaranteed: that z becomes unpredictable. Differences hold
    everything that varies between examples, so the top directions need not be those of the concept, and some
    covariance with z remains in general. Use ``leace`` or ``mean_difference`` to guard a concept. The result
    depends on the units of the coordinates of x: one outlier coordinate is a principal direction.

    With ``differences`` the second moment ``E δδᵀ`` is that of the given pairs, uncentred, so the order
    within each pair does not matter. Without it, δ is the difference of two independent examples of
    different classes: ``E δδᵀ = 2 (Σw + Σb / q)``, with the covariance within classes Σw, the covariance of
    the class means Σb, and the probability q that two examples differ in class; exact when all classes have
    the same covariance.

    Args:
        m: moments of x [d] and one-hot z; with ``differences`` only its mean of x and width are used.
        rank: number of directions, from 0 to the rank of ``E δδᵀ``.
        differences: moments of ``x₊ - x₋`` [d] over contrast pairs; its z is not used.
        affine: keep the mean of x.

    Returns:
        Orthogonal eraser of the given rank. A NumericalWarning says so when the last direction is not
        determined, because the next one is just as large.

    Raises:
        InputError: rank outside its range, or z is not one-hot and no differences are given.
        ShapeError: ``differences`` has another width.
        NotEnoughDataError, NonFiniteError: as ``leace``.

    Reference:
        Zou, Phan, Chen, Campbell, Guo, Ren, Pan, Yin, Mazeika, Dombrowski, Goel, Li, Byun, Wang, Mallen,
        Basart, Koyejo, Song, Fredrikson, Kolter, Hendrycks: Representation engineering: a top-down approach
        to AI transparency, 2023, arXiv 2310.01405.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, z = torch.randn(100, 4), torch.arange(100) % 2
        >>> x[:, 2] += 9 * z
        >>> e = pca(Moments.of(x, z), differences=Moments.of(x[1::2] - x[::2], torch.ones(50)))
        >>> e.rank, int(e.right.abs().argmax())
        (1, 2)
    """
    if differences is None:
        check(m)
        second = _between_classes(m)
    else:
        check_x(m)
        check_x(differences)
        if differences.d != m.d:
            raise ShapeError(f"got differences of width {differences.d}; needed d={m.d}, as the activations.")
        second = differences.cov_xx + torch.outer(differences.mean_x, differences.mean_x)
    values, vectors = torch.linalg.eigh((second + second.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    rounding = m.d * torch.finfo(values.dtype).eps * values[0]
    most = int((values > rounding).sum())
    if not 0 <= rank <= most:
        raise InputError(f"got rank={rank}; needed 0 <= rank <= {most}, the number of directions that vary.")
    if 0 < rank < m.d and values[rank - 1] - values[rank] <= rounding:
        warnings.warn(
            f"principal directions {rank} and {rank + 1} have equal variance to rounding, so which one is "
            "removed is arbitrary; choose another rank.",
            NumericalWarning,
            stacklevel=2,
        )
    basis = vectors[:, :rank]
    return Eraser(basis, basis.T, m.mean_x if affine else torch.zeros_like(m.mean_x))


def _between_classes(m: Moments) -> Tensor:
    """Return ``E δδᵀ / 2`` over two independent examples of different classes, all of one covariance."""
    share = m.mean_z
    # One-hot columns are 0 or 1, never together, and one of them always is 1. Shares have no unit.
    second_z = m.cov_zz + torch.outer(share, share)
    if (second_z - torch.diag(share)).abs().max() > 1e-8 or abs(float(share.sum()) - 1) > 1e-8:
        raise InputError(
            f"got moments whose z ({m.k} columns) is not one-hot; needed class ids, or differences= with the "
            "moments of paired differences of x."
        )
    seen = share > 0
    between = m.cov_xz[:, seen] / share[seen] @ m.cov_xz[:, seen].T
    different = 1 - float(share.square().sum())
    return m.cov_xx - between + between / different
