"""How long does one LEACE solve take next to concept-erasure, and how much covariance does either leave?

Both start from finished float64 statistics of the same samples and run with their default options. The residual is
max |P Σxz| / max |Σxz|, with P and Σxz in float64.
"""

from __future__ import annotations

import argparse
import copy

import torch
from _side_by_side import machine, side_by_side
from concept_erasure import LeaceFitter
from torch import Tensor

from repe_unlearn import Moments
from repe_unlearn.solvers import leace

CLASSES = 18


def sample(d: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return correlated float64 activations [rows, d] of uneven scale, and the class of each row."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z = torch.randint(CLASSES, (rows,), generator=generator)
    x = draw(rows, d) @ (torch.eye(d, dtype=torch.float64) + draw(d, d) / d**0.5)
    return (x + draw(CLASSES, d)[z]) * draw(d).exp(), z


def residual(p: Tensor, cov_xz: Tensor) -> float:
    """Return max |P Σxz| relative to max |Σxz|."""
    return float((p @ cov_xz).abs().max() / cov_xz.abs().max())


def compare(d: int, rounds: int) -> str:
    """Return one line of the table."""
    x, z = sample(d, rows=4 * d)
    m = Moments.of(x, z)
    one_hot = torch.nn.functional.one_hot(z, CLASSES).to(torch.float64)
    fitter = LeaceFitter.fit(x, one_hot)
    # A shallow copy has the statistics but not the cached result.
    t = side_by_side(lambda: copy.copy(fitter).eraser, lambda: leace(m), rounds)
    theirs, ours = residual(fitter.eraser.P, m.cov_xz), residual(leace(m).matrix(), m.cov_xz)
    return (
        f"| {d} | {CLASSES} | {t.a * 1e3:.1f} | {t.b * 1e3:.1f} | {t.ratio:.1f} | {theirs:.1e} | {ours:.1e} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[512, 2048], help="widths of x")
    parser.add_argument("--large", action="store_true", help="also d = 4096 (minutes)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per width")
    args = parser.parse_args()
    print(machine("concept-erasure"))
    print(f"\nk = {CLASSES} classes, 4 d samples, float64, median of {args.rounds} rounds\n")
    print("| d | k | concept-erasure, ms | repe_unlearn, ms | ratio | residual there | residual here |")
    print("|---|---|---|---|---|---|---|")
    for d in [*args.d, *([4096] if args.large else [])]:
        print(compare(d, args.rounds), flush=True)


if __name__ == "__main__":
    main()
