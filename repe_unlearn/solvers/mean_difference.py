"""Mean difference: the orthogonal projection away from the differences of the class means."""

from __future__ import annotations

import warnings

import torch

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NoConceptWarning
from repe_unlearn.moments import Moments
from repe_unlearn.thin_moments import ThinMoments

from .linalg import check, scales


def mean_difference(m: Moments | ThinMoments, *, affine: bool = True, rtol: float | None = None) -> Eraser:
    """Return the orthogonal projection after which all class means coincide (zero covariance of x and z).

    Known as SAL at full rank, as mean projection, and for two classes as ablation of the difference in means.
    It gives the same linear guardedness as ``leace`` on the sample behind ``m`` but ignores the covariance of
    x, so it changes x more wherever the mean difference points into directions of large variance. ``left =
    rightᵀ`` = an orthonormal basis of the range of Σxz.

    Args:
        m: moments of x [d] and z [k].
        affine: keep the mean of x; otherwise the projection goes through the origin.
        rtol: singular values up to this share of the largest count as zero; default ``10 * max(d, k) * eps``.

    Returns:
        Orthogonal eraser of rank ``rank(Σxz)``; rank 0 with a NoConceptWarning if Σxz is zero to rounding.

    Raises:
        NotEnoughDataError: one class, constant z, or fewer than 2 samples.
        NonFiniteError: NaN or infinity in the moments.

    Reference:
        Shao, Ziser, Cohen: Gold doesn't always glitter: spectral removal of linear and nonlinear guarded
        attribute information, EACL 2023, arXiv 2203.07893; Haghighatkhah, Fokkens, Sommerauer, Speckmann,
        Verbeek: Better hit the nail on the head than beat around the bush, EMNLP 2022, arXiv 2212.04273.

    Example:
        >>> x, z = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 1.0], [2.0, 3.0]]), torch.tensor([0, 0, 1, 1])
        >>> mean_difference(Moments.of(x, z))(x)[:, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    check(m)
    std_x, std_z = scales(m)
    eps = torch.finfo(torch.float64).eps
    tolerance = 10 * max(m.d, m.k) * eps if rtol is None else rtol
    u, s, _ = torch.linalg.svd(m.cov_xz / std_z, full_matrices=False)
    # Nothing to erase when the whole cross-covariance is rounding noise of correlations.
    noise = float((m.cov_xz / std_x[:, None] / std_z).norm()) <= tolerance
    u = u[:, s > tolerance * s.max()] if s.numel() and not noise else u[:, :0]
    if u.shape[1] == 0:
        warnings.warn(
            f"x and z are uncorrelated to rounding over {m.n:g} samples: the eraser is the identity. "
            "If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=2,
        )
    return Eraser(u, u.T, m.mean_x if affine else torch.zeros_like(m.mean_x))
