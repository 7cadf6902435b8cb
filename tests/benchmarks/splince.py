"""How long does SPLINCE take next to the operations of the paper's published code?

The published code is no package, so its cost is that of its list of dense float64 operations on the same matrices: one
symmetric eigendecomposition, two pseudo-inverses of d x d matrices (the whitening and its inverse) and two complete QR
decompositions (d x d orthogonal complements). Ours starts from the same finished moments.
"""

from __future__ import annotations

import argparse

import torch
from _side_by_side import machine, side_by_side
from torch import Tensor

from repe_unlearn import Moments
from repe_unlearn.solvers import splince


def published(cov: Tensor, cross_z: Tensor, cross_y: Tensor) -> Tensor:
    """Return the oblique projection that removes ``cross_z`` and keeps ``cross_y``, from dense matrices."""
    values, vectors = torch.linalg.eigh(cov)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    white = torch.linalg.pinv(root)
    back = torch.linalg.pinv(white)
    rank_z, rank_y = cross_z.shape[1], cross_y.shape[1]
    q_z, _ = torch.linalg.qr(white @ cross_z, mode="complete")
    q_y, _ = torch.linalg.qr(white @ cross_y, mode="complete")
    u, others = q_z[:, :rank_z], q_y[:, rank_y:]
    v = others @ (others.T @ u)
    removed = back @ u @ torch.linalg.inv(v.T @ u) @ v.T @ white
    return torch.eye(len(cov), dtype=cov.dtype) - removed


def compare(d: int, rounds: int) -> str:
    """Return one line of the table."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    n = 4 * d
    y, z = draw(n, 2), draw(n, 2)
    x = draw(n, d) + y @ draw(2, d) + z @ draw(2, d)
    concept, keep = Moments.of(x, z), Moments.of(x, y)
    eraser = splince(concept, preserve=keep, shrinkage=None)
    p = published(concept.cov_xx, concept.cov_xz, keep.cov_xz)
    far = float((p - eraser.matrix()).abs().max())
    t = side_by_side(
        lambda: published(concept.cov_xx, concept.cov_xz, keep.cov_xz),
        lambda: splince(concept, preserve=keep, shrinkage=None),
        rounds,
        warmup=0,
    )
    return f"| {d} | {t.a * 1e3:.0f} | {t.b * 1e3:.1f} | {t.ratio:.0f} | {far:.1e} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[768, 2048], help="widths of x")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    print(f"\ntwo real columns to erase, two to keep, float64, median of {args.rounds} rounds\n")
    print(
        "| d | published operations, ms | repe_unlearn, ms | ratio | largest difference of the projections |"
    )
    print("|---|---|---|---|---|")
    for d in args.d:
        print(compare(d, args.rounds), flush=True)


if __name__ == "__main__":
    main()
