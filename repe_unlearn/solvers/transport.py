"""The Wasserstein barycenter of covariances, computed with factors so that condition numbers are not squared."""

from __future__ import annotations

import torch
from torch import Tensor


def barycenter(
    start: Tensor, factors: Tensor, weights: Tensor, rtol: float, max_iterations: int
) -> tuple[Tensor, Tensor, float]:
    """Return the Wasserstein barycenter of the covariances ``F Fᵀ``, as a factor, and how to reach it.

    The step is that of the fixed-point iteration, ``K -> T K T`` with the mean T of the optimal transport maps
    from K to the given covariances, written for a factor C of K: the map to ``F Fᵀ`` takes C to ``F Q``, with
    the orthogonal Q that brings ``F Q`` closest to C. No root of a product of covariances is taken. At any C,
    converged or not, ``C Qᵀ F⁻¹`` is the optimal transport map from ``F Fᵀ`` to ``C Cᵀ``.

    Args:
        start: ``[d, r]`` factor to begin with, of full column rank.
        factors: ``[k, d, r]``, with the same range as ``start``.
        weights: ``[k]``, positive, of sum 1.
        rtol: residual at which the iteration stops.
        max_iterations: limit of the iteration, 0 or more.

    Returns:
        The factor C [d, r], the orthogonal Q [k, r, r], and the residual: the size of the next step relative
        to that of C.

    Reference:
        Álvarez-Esteban, del Barrio, Cuesta-Albertos, Matrán: A fixed-point approach to barycenters in
        Wasserstein space, 2016, arXiv 1511.05355, equation 7.

    Example:
        >>> factors = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)  # standard deviations 1 and 3
        >>> c, _, residual = barycenter(factors[0], factors, torch.tensor([0.5, 0.5]).double(), 1e-9, 10)
        >>> c.item(), residual
        (2.0, 0.0)
    """
    centre = start
    turns, moved = _aligned(centre, factors, weights)
    residual = float((moved - centre).norm() / centre.norm())
    for _ in range(max_iterations):
        if residual <= rtol:
            break
        centre = moved
        turns, moved = _aligned(centre, factors, weights)
        residual = float((moved - centre).norm() / centre.norm())
    return centre, turns, residual


def _aligned(centre: Tensor, factors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal matrices that turn every factor towards the centre, and the mean of the results."""
    u, _, vt = torch.linalg.svd(factors.mT @ centre)
    turns = u @ vt
    return turns, (weights[:, None, None] * (factors @ turns)).sum(0)
