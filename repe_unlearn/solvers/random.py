"""Random subspace: the control that any claim of removal has to beat."""

from __future__ import annotations

import torch

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError
from repe_unlearn.moments import Moments
from repe_unlearn.thin_moments import ThinMoments

from .linalg import check, concept_correlations


def random(
    m: Moments | ThinMoments, *, rank: int | None = None, seed: int = 0, affine: bool = True
) -> Eraser:
    """Return the orthogonal projection away from a random subspace: variance goes, the concept stays.

    Args:
        m: moments of x [d] and z [k]; only the mean, the widths and the rank of Σxz are used.
        rank: dimension of the subspace, 0 to d; default the rank that ``mean_difference`` would remove.
        seed: of the generator; the same seed gives the same eraser.
        affine: keep the mean of x.

    Returns:
        Orthogonal eraser of the given rank.

    Raises:
        InputError: rank outside 0..d.
        NotEnoughDataError, NonFiniteError: as ``leace``.

    Example:
        >>> m = Moments.of(torch.randn(50, 6), torch.arange(50) % 2)
        >>> random(m, rank=2).rank
        2
    """
    check(m)
    if rank is None:
        corr, _, tolerance = concept_correlations(m)  # columns of z in different units count alike
        rank = min(int(torch.linalg.matrix_rank(corr, hermitian=True, rtol=tolerance)), m.d)
    if not 0 <= rank <= m.d:
        raise InputError(f"got rank={rank}; needed 0 <= rank <= d = {m.d}.")
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(m.d, rank, generator=generator, dtype=torch.float64, device="cpu"))
    basis = basis.to(m.mean_x.device)
    return Eraser(basis, basis.T, m.mean_x if affine else torch.zeros_like(m.mean_x))
