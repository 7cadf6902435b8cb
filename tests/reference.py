"""Slow, plain versions of what the package computes, and data with a planted concept. Never imported by the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repe_unlearn.solvers.logistic import Logistic, Probing


@dataclass(frozen=True, slots=True)
class Statistics:
    """What ``two_pass`` returns; the fields of ``Moments`` as numpy arrays."""

    n: float
    mean_x: np.ndarray
    mean_z: np.ndarray
    m_xx: np.ndarray
    m_xz: np.ndarray
    m_zz: np.ndarray


def two_pass(x: Tensor, z: Tensor, weight: Tensor | None = None) -> Statistics:
    """Means first, then one outer product per row, in float64; x [n, d], z [n, k]."""
    xs, zs = x.double().numpy(), z.double().numpy()
    w = np.ones(len(xs)) if weight is None else weight.double().numpy()
    n = float(w.sum())
    mean_x = np.sum([wi * xi for wi, xi in zip(w, xs, strict=True)], axis=0) / n
    mean_z = np.sum([wi * zi for wi, zi in zip(w, zs, strict=True)], axis=0) / n
    pairs = [(wi, xi - mean_x, zi - mean_z) for wi, xi, zi in zip(w, xs, zs, strict=True)]
    return Statistics(
        n,
        mean_x,
        mean_z,
        np.sum([wi * np.outer(a, a) for wi, a, _ in pairs], axis=0),
        np.sum([wi * np.outer(a, b) for wi, a, b in pairs], axis=0),
        np.sum([wi * np.outer(b, b) for wi, _, b in pairs], axis=0),
    )


def covariances(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Σxx and Σxz of a sample, divided by n, in float64."""
    xc, zc = x.double() - x.double().mean(0), z.double() - z.double().mean(0)
    return xc.T @ xc / len(x), xc.T @ zc / len(x)


def textbook_leace(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """P and b of ``x -> P x + b``, with ZCA whitening by an eigendecomposition of Σxx (Theorem 4.3 of the paper)."""
    sigma, cross = covariances(x, z)
    whiten, colour = _whitening(sigma)
    u = _basis(whiten @ cross)
    change = colour @ u @ u.T @ whiten
    return torch.eye(len(sigma), dtype=torch.float64) - change, change @ x.double().mean(0)


def least_change(x: Tensor, z: Tensor) -> float:
    """The smallest E‖r(x) - x‖² of any affine r with Cov(r(x), z) = 0 on this sample.

    In whitened coordinates y the part of y inside the range of Cov(y, z) must go; this is what it costs in x.
    """
    sigma, cross = covariances(x, z)
    whiten, colour = _whitening(sigma)
    return float((colour @ _basis(whiten @ cross)).square().sum())


def _whitening(sigma: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * 1e-14
    vectors, roots = vectors[:, keep], values[keep].sqrt()
    return vectors / roots @ vectors.T, vectors * roots @ vectors.T


def _basis(a: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    return u[:, s > 1e-9 * s.max()]


def one_hot(z: Tensor) -> Tensor:
    """Class ids [n] as float64 columns [n, k]; reals [n] as one column; columns as they are."""
    if z.ndim == 1 and not z.is_floating_point():
        return torch.nn.functional.one_hot(z).double()
    return z.double().reshape(len(z), -1)


SHAPES = ("n>d", "n<d", "rank-deficient", "constant coordinate")


def planted(k: int, shape: str = "n>d", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated Gaussian x [n, d] in float64 with a mean far from 0 and a linear trace of a concept z.

    Args:
        k: 1 for a real z [n]; otherwise the number of classes of the ids z [n], of unequal sizes.
        shape: one of ``SHAPES``.
        seed: of the generator.
    """
    g = torch.Generator().manual_seed(seed)
    n, d = (20, 48) if shape == "n<d" else (400, 12)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + 3.0
    if k == 1:
        z = torch.randn(n, generator=g, dtype=torch.float64)
        trace = z[:, None] * torch.randn(d, generator=g, dtype=torch.float64)
    else:
        z = torch.cat([torch.arange(k), torch.arange(n - k) ** 2 % (2 * k - 1) % k])
        trace = torch.randn(k, d, generator=g, dtype=torch.float64)[z]
    x = x + 2 * trace
    if shape == "rank-deficient":
        x = x[:, : d - 3] @ torch.randn(d - 3, d, generator=g, dtype=torch.float64)
    if shape == "constant coordinate":
        x[:, 4] = 0.1
    return x, z


def fit_logistic(
    x: Tensor,
    z: Tensor,
    cov: Tensor,
    *,
    ridge: float,
    basis: Tensor | None = None,
    weight: Tensor | None = None,
    start: Logistic | None = None,
    tolerance: float = 1e-9,
) -> Logistic:
    """Fit one probe and share nothing."""
    probing = Probing.of(x, z, cov, ridge=ridge, weight=weight)
    return (probing if basis is None else probing.without(basis)).fit(start=start, tolerance=tolerance)
