"""Is one batched LEACE solve for many sites of one width faster than one solve after the other?

Both get the same moments; the erasers agree to rounding, which is checked before anything is timed.
"""

from __future__ import annotations

import argparse

import torch
from _side_by_side import machine, side_by_side

from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, leace_many


def sites(count: int, d: int, device: str) -> list[Moments]:
    """Return moments of ``count`` sites, two classes."""
    g = torch.Generator().manual_seed(0)
    z = torch.arange(2 * d) % 2
    mix = torch.randn(d, generator=g)
    return [
        Moments.of(torch.randn(2 * d, d, generator=g) + z[:, None] * mix, z).to(device) for _ in range(count)
    ]


def compare(count: int, d: int, device: str, rounds: int) -> str:
    """Return one line of the table."""
    moments = sites(count, d, device)
    for a, b in zip(leace_many(moments), map(leace, moments), strict=True):
        assert a.allclose(b)

    def wait(erasers: list) -> None:
        erasers[-1].left.sum().item()  # a GPU computes behind the program's back

    t = side_by_side(
        lambda: wait(leace_many(moments)), lambda: wait([leace(m) for m in moments]), rounds, warmup=2
    )
    return f"| {count} | {d} | {t.b * 1e3:.1f} | {t.a * 1e3:.1f} | {1 / t.ratio:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[64], help="widths of x")
    parser.add_argument("--sites", type=int, nargs="+", default=[8, 60], help="numbers of sites")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(machine())
    print(f"\n{args.device}, 2 classes, float64, olse, median of {args.rounds} rounds\n")
    print("| sites | d | one by one, ms | batched, ms | times faster |")
    print("|---|---|---|---|---|")
    for d in args.d:
        for count in args.sites:
            print(compare(count, d, args.device, args.rounds), flush=True)


if __name__ == "__main__":
    main()
