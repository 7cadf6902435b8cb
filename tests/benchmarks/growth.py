"""How do statistics and solve grow with width d, samples n and concept columns k? One figure, one table.

One quantity varies at a time around d = 512, n = 4096, k = 8. Statistics are updates in batches of 512 float32 rows with
float64 sums; the solve starts from finished statistics.

    python tests/benchmarks/growth.py --svg docs/figures/growth.svg
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from _side_by_side import Timing, machine, side_by_side
from concept_erasure import LeaceFitter
from torch.nn.functional import one_hot

from repe_unlearn.moments import Accumulator
from repe_unlearn.solvers import leace

CENTRE = {"d": 512, "n": 4096, "k": 8}
RANGES = {"d": (64, 128, 256, 512, 1024, 2048), "n": (1024, 4096, 16384, 65536), "k": (2, 8, 32, 128)}


def measure(d: int, n: int, k: int, rounds: int) -> tuple[Timing, Timing]:
    """Return the timings of statistics and of the solve; a is concept-erasure, b is this library."""
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(n, d, generator=g), torch.randint(k, (n,), generator=g)
    x[:, :k] += one_hot(z, k)[:, :d]
    batches = list(zip(x.split(512), z.split(512), strict=True))

    def ours() -> Accumulator:
        sums = Accumulator(classes=k)
        for a, b in batches:
            sums.add(a, b)
        return sums

    def theirs() -> LeaceFitter:
        fitter = LeaceFitter(d, k, dtype=torch.float64)
        for a, b in batches:
            fitter.update(a.double(), one_hot(b, k).double())
        return fitter

    moments, fitter = ours().moments(), theirs()
    return (
        side_by_side(theirs, ours, rounds),
        side_by_side(lambda: copy.copy(fitter).eraser, lambda: leace(moments), rounds),
    )


def main() -> None:
    """Print the table; draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--svg", type=Path, help="draw the figure into this file")
    args = parser.parse_args()
    print(machine("concept-erasure"))
    print(f"\nmedian of {args.rounds} rounds, ms: concept-erasure / repe_unlearn\n")
    print("| varies | d | n | k | statistics | solve |")
    print("|---|---|---|---|---|---|")
    mpl.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (name, values) in zip(axes, RANGES.items(), strict=True):
        rows = []
        for value in values:
            at = {**CENTRE, name: value}
            update, solved = measure(**at, rounds=args.rounds)
            rows.append((update, solved))
            print(
                f"| {name} | {at['d']} | {at['n']} | {at['k']} | {update.a * 1e3:.1f} / {update.b * 1e3:.1f} | "
                f"{solved.a * 1e3:.1f} / {solved.b * 1e3:.1f} |",
                flush=True,
            )
        for i, (what, style) in enumerate((("statistics", "--"), ("solve", "-"))):
            axis.loglog(
                values,
                [r[i].a * 1e3 for r in rows],
                "o" + style,
                c="tab:gray",
                label=f"concept-erasure, {what}",
            )
            axis.loglog(
                values, [r[i].b * 1e3 for r in rows], "o" + style, c="tab:blue", label=f"repe_unlearn, {what}"
            )
        fixed = ", ".join(f"{other} = {v}" for other, v in CENTRE.items() if other != name)
        axis.set(xlabel=name, title=fixed)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=7)
    if args.svg:
        figure.savefig(args.svg)


if __name__ == "__main__":
    main()
