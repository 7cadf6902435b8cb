"""What does adding batches to the moments cost, next to concept-erasure and to the one matrix product that it must do?

The bare product is ``sums.addmm_(x.T, x)`` on batches that are float64 already. ``Accumulator`` gets the same batches in
the model's dtype: it checks, converts and centres them, and sums the labels too. So does concept-erasure's ``update``, with
float64 statistics; its rows are made float64 and its labels one-hot on the way, as its users must.
Batches of 512 rows are what the product is best at; the bare product always gets those, the two others also smaller ones.
"""

from __future__ import annotations

import argparse

import torch
from _side_by_side import machine, side_by_side
from concept_erasure import LeaceFitter
from torch import Tensor

from repe_unlearn.moments import Accumulator

ROWS, BLOCK = 4096, 512


def bare(blocks: list[Tensor], d: int) -> Tensor:
    """Return the sum of the products of all blocks."""
    sums = torch.zeros(d, d, dtype=torch.float64)
    for x in blocks:
        sums.addmm_(x.T, x)
    return sums


def accumulate(batches: list[tuple[Tensor, Tensor]], classes: int) -> Accumulator:
    """Return an accumulator that holds all batches; the row count is a multiple of its block, so none waits."""
    sums = Accumulator(classes=classes)
    for x, z in batches:
        sums.add(x, z)
    return sums


def reference(batches: list[tuple[Tensor, Tensor]], d: int, classes: int) -> LeaceFitter:
    """Return concept-erasure's statistics of all batches."""
    fitter = LeaceFitter(d, classes, dtype=torch.float64)
    for x, z in batches:
        fitter.update(x.double(), torch.nn.functional.one_hot(z, classes).double())
    return fitter


def compare(d: int, classes: int, rows_per_batch: int, dtype: torch.dtype, rounds: int) -> str:
    """Return one line of the table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, d, generator=generator).to(dtype)
    z = torch.randint(classes, (ROWS,), generator=generator)
    batches = list(zip(x.split(rows_per_batch), z.split(rows_per_batch), strict=True))
    blocks = list(x.to(torch.float64).split(BLOCK))
    t = side_by_side(lambda: accumulate(batches, classes), lambda: bare(blocks, d), rounds)
    peer = side_by_side(lambda: reference(batches, d, classes), lambda: accumulate(batches, classes), rounds)
    name = str(dtype).removeprefix("torch.")
    return f"| {d} | {rows_per_batch} | {name} | {t.b * 1e3:.1f} | {t.a * 1e3:.1f} | {t.ratio:.2f} | {peer.a * 1e3:.1f} | {peer.ratio:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[768, 2048, 4096], help="widths of x")
    parser.add_argument("--classes", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per line")
    args = parser.parse_args()
    print(machine())
    print(f"\n{ROWS} rows, {args.classes} classes, median of {args.rounds} rounds\n")
    print(
        "| d | rows per batch | dtype | bare product, ms | Accumulator, ms | ours / bare | concept-erasure, ms | theirs / ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for d in args.d:
        for rows_per_batch in (32, 512):
            for dtype in (torch.float32, torch.bfloat16):
                print(compare(d, args.classes, rows_per_batch, dtype, args.rounds), flush=True)


if __name__ == "__main__":
    main()
