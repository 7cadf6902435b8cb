"""What do few samples of wide activations cost with ThinMoments, in time and memory, against the d x d way?

Every size runs in a process of its own, so that the peak of the resident memory is its own; what importing and a first
tiny solve take is subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from _side_by_side import machine

WORKER = """
import json, resource, sys, time
import torch
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace
from repe_unlearn.thin_moments import ThinMoments

kind, n, d = {"thin": ThinMoments, "dense": Moments}[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
leace(kind.of(torch.randn(8, 64), torch.arange(8) % 2))
x, z = torch.randn(n, d), torch.arange(n) % 2
before, start = peak(), time.perf_counter()
leace(kind.of(x, z))
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def measure(kind: str, n: int, d: int, rounds: int) -> tuple[float, float]:
    """Return the best seconds and the largest megabytes of statistics plus solve."""
    runs = []
    for _ in range(rounds):
        command = [sys.executable, "-c", WORKER, kind, str(n), str(d)]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return min(seconds for seconds, _ in runs), max(megabytes for _, megabytes in runs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 8192], help="widths of x")
    parser.add_argument("--n", type=int, default=512, help="samples")
    parser.add_argument("--dense-up-to", type=int, default=2048, help="skip the d x d way above this width")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    print(f"\n{args.n} samples, float32 rows, 2 classes, olse, best of {args.rounds}\n")
    print("| d | kind | s | MB |")
    print("|---|---|---|---|")
    for d in args.d:
        for kind in ("thin", "dense") if d <= args.dense_up_to else ("thin",):
            seconds, megabytes = measure(kind, args.n, d, args.rounds)
            print(f"| {d} | {kind} | {seconds:.3f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
