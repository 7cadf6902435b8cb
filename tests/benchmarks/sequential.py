"""What does a sequential fit of all layers cost next to one forward pass of the same prompts, and next to the loop?

The forward passes stop at the deepest site and reduce nothing (bare) or to moments at all sites (capture). The loop is
what one does without pausing: for every site in order, run all prompts up to it with the erasers known so far, and solve.
Its time is that of --loop-sites sites spread over the depth, scaled to all of them.

    python tests/benchmarks/sequential.py
    python tests/benchmarks/sequential.py --shape 8b --device cuda --dtype bfloat16 --batch-tokens 16384
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _side_by_side import machine
from _subject import mixed, parser, seconds, subject, waited
from capture import bare

from repe_unlearn import (
    Architecture,
    Contrast,
    ErasurePlan,
    Site,
    apply,
    capture,
    fingerprint,
    fit_sequential,
    solvers,
)
from repe_unlearn.eraser import Eraser

WORKER = """
import json, resource, sys
from _subject import mixed, parser, subject
from repe_unlearn import Architecture, fit_sequential

args = parser("").parse_args(sys.argv[3:])
model, tokenizer = subject(args)
sites = Architecture.of(model).sites("attn_in", "mlp_in", layers=range(2))
options = dict(select="mean", batch_tokens=args.batch_tokens, progress=False)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
fit_sequential(model, tokenizer, mixed(50), sites, **options)
before = peak()
memory = None if sys.argv[1] == "none" else sys.argv[1]
fit_sequential(model, tokenizer, mixed(args.prompts), sites, memory=memory, scratch=sys.argv[2], **options)
print(json.dumps(peak() - before))
"""


def loop(
    model: Any,
    tokenizer: Any,
    contrast: Contrast,
    sites: tuple[Site, ...],
    chosen: list[int],
    options: dict,
) -> float:
    """Return the seconds of the loop over all sites, from those of the chosen ones (numbers of sites)."""
    d = model.config.hidden_size
    known = Eraser(torch.eye(d)[:, :1], torch.eye(d)[:1], torch.zeros(d))  # any one costs the same
    took = []
    for i in chosen:
        start = time.perf_counter()
        plan = ErasurePlan(dict.fromkeys(sites[:i], known) or {sites[0]: known}, fingerprint(model))
        with apply(model, plan):
            moments = capture(model, tokenizer, contrast, [sites[i]], **options)
        solvers.leace(moments[sites[i]])
        took.append(time.perf_counter() - start)
    return sum(took) / len(took) * len(sites)


def main() -> None:
    """Print the tables."""
    options = parser(__doc__)
    options.add_argument("--limit", default="1MB", help="memory= of the fit that waits in files")
    options.add_argument("--scratch", default=tempfile.gettempdir())
    options.add_argument("--loop-sites", type=int, default=4)
    args = options.parse_args()
    model, tokenizer = subject(args)
    contrast = mixed(args.prompts)
    sites = Architecture.of(model).sites("attn_in", "mlp_in")
    shared: dict[str, Any] = {"select": "mean", "batch_tokens": args.batch_tokens, "progress": False}
    moments = capture(model, tokenizer, contrast, sites[:1], **shared)[sites[0]]
    solve = seconds(lambda: solvers.leace(moments), 3) * len(sites)

    def fit(memory: str | None) -> Callable[[], object]:
        return lambda: fit_sequential(
            model, tokenizer, contrast, sites, memory=memory, scratch=args.scratch, **shared
        )

    print(machine("transformers"), f"| {args.shape}, {args.device}, {args.dtype}")
    print(f"\n{len(contrast)} prompts, {len(sites)} sites; the solves alone: {solve:.2f} s\n")
    forward = seconds(
        waited(bare(model, tokenizer, contrast, sites[-1], args.batch_tokens), args.device), args.rounds
    )
    rows = {
        "bare forward": forward,
        "capture at all sites": seconds(
            lambda: capture(model, tokenizer, contrast, sites, **shared), args.rounds
        ),
        "fit_sequential, all in flight": seconds(fit(None), args.rounds),
        f"fit_sequential, memory={args.limit}": seconds(fit(args.limit), args.rounds),
    }
    step = max(1, len(sites) // args.loop_sites)
    rows["loop over the sites (scaled)"] = loop(
        model, tokenizer, contrast, sites, list(range(step // 2, len(sites), step)), shared
    )
    print("| what | s | forwards | without the solves |")
    print("|---|---|---|---|")
    for name, took in rows.items():
        without = took - solve if name.startswith(("fit", "loop")) else took
        print(f"| {name} | {took:.2f} | {took / forward:.2f} | {without / forward:.2f} |")
    print("\npeak resident memory above that of a fit of 50 prompts, 4 sites\n\n| memory= | MB |\n|---|---|")
    flags = [
        "--shape",
        args.shape,
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--prompts",
        str(args.prompts),
    ]
    for memory in ("none", args.limit):
        command = [
            sys.executable,
            "-c",
            WORKER,
            memory,
            args.scratch,
            *flags,
            "--batch-tokens",
            str(args.batch_tokens),
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        print(f"| {memory} | {json.loads(out.stdout.splitlines()[-1]):.0f} |", flush=True)


if __name__ == "__main__":
    main()
