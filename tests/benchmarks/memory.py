"""How much memory do statistics plus one LEACE solve take at their peak, next to concept-erasure?

Every case runs in a process of its own. What counts is the peak of the resident memory above the level after imports, a
first tiny solve and the rows themselves (4096 of them, float32, in batches of 512).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from _side_by_side import machine

WORKER = """
import json, resource, sys
import torch
from concept_erasure import LeaceFitter
from repe_unlearn.moments import Accumulator
from repe_unlearn.solvers import leace

who, d, classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def fit(x, z):
    if who == "ours":
        sums = Accumulator(classes=classes)
        for a, b in zip(x.split(512), z.split(512)):
            sums.add(a, b)
        return leace(sums.moments())
    fitter = LeaceFitter(x.shape[1], classes, dtype=torch.float64)
    for a, b in zip(x.split(512), z.split(512)):
        fitter.update(a.double(), torch.nn.functional.one_hot(b, classes).double())
    return fitter.eraser

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

draw = lambda n, d: (torch.randn(n, d), torch.arange(n) % classes)
fit(*draw(4 * classes, 64))
x, z = draw(4096, d)
before = peak()
fit(x, z)
print(json.dumps(peak() - before))
"""


def measure(who: str, d: int, classes: int) -> float:
    """Return the peak in megabytes above the level before the fit."""
    command = [sys.executable, "-c", WORKER, who, str(d), str(classes)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2048, 4096], help="widths of x")
    args = parser.parse_args()
    print(machine("concept-erasure"))
    print("\n4096 float32 rows, 18 classes, float64 statistics; one float64 d x d matrix for comparison\n")
    print("| d | d x d, MB | concept-erasure, MB | repe_unlearn, MB | share |")
    print("|---|---|---|---|---|")
    for d in args.d:
        theirs, ours = measure("theirs", d, 18), measure("ours", d, 18)
        print(
            f"| {d} | {8 * d * d / 2**20:.0f} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
