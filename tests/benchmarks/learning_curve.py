"""How many fitting prompts does it take? Guardedness on held-out prompts against the number of fitting pairs.

For each number of pairs: a sequential LEACE fit at all norm outputs, then on held-out content and wording the share of
the class-mean gap that is left and probes that are trained and tested on prompts the eraser never saw.

    python tests/benchmarks/learning_curve.py --pairs 50 200 900
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from repe_unlearn import Architecture, Contrast, apply, fit_sequential, gather, load
from repe_unlearn.audit import figures, probes
from repe_unlearn.audit.series import Series


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 200, 900])
    parser.add_argument("--concept", default="gender")
    parser.add_argument("--heldout", type=int, default=280, help="held-out pairs for the probes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="also draw the figure into this file")
    a = parser.parse_args()

    model, tokenizer, _ = load()
    fit, heldout = Contrast.builtin(a.concept, pairs=4 * max(a.pairs), seed=a.seed).split(0.25, seed=a.seed)
    heldout = heldout.sample(min(a.heldout, len(heldout) // 2), a.seed)
    sites = Architecture.of(model).sites("attn_in", "mlp_in")
    look = {"select": "mean", "progress": False}
    before = gather(model, tokenizer, heldout, sites, **look)
    labels = probes.Labels.of(before[sites[0]], heldout, a.seed)
    base = {s: probes.mean_gap(before[s], labels) for s in sites}
    untouched = [probes.accuracy(p, labels).value for p in probes.refit(before, labels).values()]
    print(
        f"{a.concept}: {len(heldout)} held-out prompts, {len(set(heldout.templates))} held-out frames, {len(sites)} sites"
    )
    print(f"untouched: linear probe {min(untouched):.3f} to {max(untouched):.3f}")
    print(
        f"{'pairs':>6} {'fit s':>6} | gap left median worst | refit linear median worst over-0.60 | refit MLP median worst"
    )
    rows = []
    for n in a.pairs:
        part = fit.sample(min(n, len(fit) // 2), a.seed)
        start = time.perf_counter()
        plan = fit_sequential(model, tokenizer, part, sites, **look)
        seconds = time.perf_counter() - start
        with apply(model, plan):
            after = gather(model, tokenizer, heldout, sites, **look)
        gaps = np.array([probes.mean_gap(after[s], labels) / base[s] for s in sites])
        linear = np.array([probes.accuracy(p, labels).value for p in probes.refit(after, labels).values()])
        network = np.array([probes.accuracy(p, labels).value for p in probes.mlp(after, labels).values()])
        rows.append((len(part) // 2, gaps, linear, network))
        print(
            f"{len(part) // 2:>6} {seconds:>6.0f} | {np.median(gaps):>8.3f} {gaps.max():>10.3f} | {np.median(linear):>12.3f} "
            f"{linear.max():>5.3f} {int((linear > 0.60).sum()):>9} | {np.median(network):>8.3f} {network.max():>5.3f}",
            flush=True,
        )
    if a.svg:
        a.svg.write_text(figures.to_svg(next(iter(figures.draw(_series(rows), titled=False).values()))))


def _series(rows: list) -> list[Series]:
    x = tuple(float(n) for n, *_ in rows)
    made = []
    for panel, column, label, chance in (
        ("class-mean gap left", 1, "share of the untouched gap", None),
        ("linear probe on unseen prompts", 2, "accuracy", 0.5),
        ("MLP probe on unseen prompts", 3, "accuracy", 0.5),
    ):
        y = [row[column] for row in rows]
        made.append(
            Series(
                "Learning curve",
                "after",
                x,
                tuple(float(np.median(v)) for v in y),
                tuple(float(v.min()) for v in y),
                tuple(float(v.max()) for v in y),
                x_label="fitting pairs",
                y_label=label,
                chance=chance,
                log_x=True,
                panel=panel,
                caption="Median over 60 sites; the band runs from the best to the worst site.",
            )
        )
    return made


if __name__ == "__main__":
    main()
