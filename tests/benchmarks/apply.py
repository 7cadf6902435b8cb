"""How long does it take to erase a batch of activations next to concept-erasure, and next to the dense matrix?

The same projection everywhere: a LEACE eraser of concept-erasure and its conversion, in the dtype of the rows. ``hook``
is what runs inside a model (``hooks.fused``), ``eraser`` the plain call on a tensor.
"""

from __future__ import annotations

import argparse

import torch
from _side_by_side import machine, side_by_side
from concept_erasure import LeaceEraser

from repe_unlearn.eraser import Eraser
from repe_unlearn.hooks import fused


def compare(n: int, d: int, rank: int, rounds: int, device: str) -> str:
    """Return one line of the table."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, rank, generator=g))
    ours = Eraser(basis, basis.T.contiguous(), torch.randn(d, generator=g)).to(device)
    theirs = LeaceEraser(ours.left, ours.right, ours.shift)
    x = torch.randn(n, d, generator=g).to(device)
    hook, matrix = fused(ours), ours.matrix()

    def ready() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def run(function, *args) -> None:
        function(*args)
        ready()

    torch.testing.assert_close(hook(x), theirs(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        first = side_by_side(lambda: run(theirs, x), lambda: run(hook, x), rounds)
        plain = side_by_side(lambda: run(theirs, x), lambda: run(ours, x), rounds)
        dense = side_by_side(lambda: run(torch.matmul, x, matrix.T), lambda: run(hook, x), rounds)
    return (
        f"| {n} | {d} | {rank} | {first.a * 1e3:.2f} | {first.b * 1e3:.2f} | {first.ratio:.2f} | "
        f"{plain.ratio:.2f} | {dense.ratio:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(machine("concept-erasure"))
    print(f"\nfloat32, {args.device}, median of {args.rounds} rounds; ratios are peer / ours\n")
    print(
        "| rows | d | rank | concept-erasure, ms | hook, ms | ratio | ratio, plain call | dense matrix / hook |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n, d in ((512, 576), (4096, 576), (512, 4096), (4096, 4096)):
        for rank in (1, 17):
            print(compare(n, d, rank, args.rounds, args.device), flush=True)


if __name__ == "__main__":
    main()
