"""What is left of a concept when one coordinate is far larger than the rest? Residual canonical correlation.

The correlation is the largest one between the erased rows and the labels of the fitting sample, computed in float64
with every coordinate in its own unit. ``float32`` moments: products in float32 (ours), all statistics in float32
(concept-erasure, its default for float32 activations).
"""

from __future__ import annotations

import argparse
import warnings

import torch
from _side_by_side import machine
from concept_erasure import LeaceFitter
from torch import Tensor

from repe_unlearn.moments import Accumulator
from repe_unlearn.solvers import leace


def correlation(p: Tensor, x: Tensor, z: Tensor) -> float:
    """Return the first canonical correlation of ``x pᵀ`` and z over the part of z's span that x explains.

    The whitening is that of the rows *before* erasure: whitening the erased rows would divide rounding by rounding.
    """
    x = x - x.mean(0)
    std = x.std(0)
    x, p = x / std, p * std / std[:, None]
    labels = z.double() - z.double().mean()
    lower = torch.linalg.cholesky(x.T @ x)
    cross = p @ (x.T @ labels) / labels.norm()
    return float(torch.linalg.solve_triangular(lower, cross[:, None], upper=False).norm())


def ours(x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense projection of a fit on moments of one dtype."""
    sums = Accumulator(classes=2, product=dtype)
    for a, b in zip(x.split(512), z.split(512), strict=True):
        sums.add(a.to(dtype), b)
    return leace(sums.moments(), shrinkage=None).matrix()


def theirs(x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense projection of concept-erasure without shrinkage."""
    fitter = LeaceFitter(x.shape[1], 1, dtype=dtype, shrinkage=False)
    for a, b in zip(x.split(512), z.split(512), strict=True):
        fitter.update(a.to(dtype), b.to(dtype)[:, None])
    return fitter.eraser.P.double()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--n", type=int, default=8192)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("concept-erasure"))
    print(f"\nd = {args.d}, n = {args.n}, two classes, no shrinkage\n")
    print(
        "| outlier | before | ours, float64 | ours, float32 | concept-erasure, float64 | concept-erasure, float32 |"
    )
    print("|---|---|---|---|---|---|")
    g = torch.Generator().manual_seed(0)
    z = torch.arange(args.n) % 2
    base = torch.randn(args.n, args.d, generator=g, dtype=torch.float64)
    base = base + 0.1 * torch.randn(args.d, generator=g, dtype=torch.float64) * z[:, None]
    for scale in (1.0, 1e2, 1e3, 1e4, 1e6):
        x = base.clone()
        x[:, 0] *= scale
        eye = torch.eye(args.d, dtype=torch.float64)
        left = [correlation(eye, x, z)]
        left += [
            correlation(f(x, z, dtype), x, z)
            for f in (ours, theirs)
            for dtype in (torch.float64, torch.float32)
        ]
        print(f"| {scale:g} | {left[0]:.3f} | " + " | ".join(f"{v:.1e}" for v in left[1:]) + " |", flush=True)


if __name__ == "__main__":
    main()
