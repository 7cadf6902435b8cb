"""Which interval of a leak covers, how often are absence and presence claimed wrongly, and is power as printed?

The percentile interval, the library's (percentile with tails widened for few facts) and BCa share their resamples;
"by prompt" is the library's with prompts taken for facts. Every line is a simulation with a known true leak.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
from _side_by_side import machine
from scipy import stats

from repe_unlearn.audit import leak as leak_module
from repe_unlearn.audit.leak import Comparison, leaks
from repe_unlearn.audit.statistics import presence, resample

sys.path.insert(0, str(Path(__file__).parents[1]))
from simkit import KINDS, audit, many


def ratio(e: np.ndarray, o: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (e - c) / np.maximum(o - c, 1e-9)


def rivals(scores: Comparison, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the 95 % percentile and BCa intervals of a paired leak."""
    models = (scores.edited, scores.original, scores.control)
    draws = ratio(*(weights @ x for x in models))
    value = ratio(*(x.mean() for x in models))
    n = len(scores.edited)
    without = ratio(*((x.sum() - x) / (n - 1) for x in models))
    pull = without.mean() - without
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    bias = stats.norm.ppf(np.mean(draws < value))
    z = bias + stats.norm.ppf([0.025, 0.975])
    return {
        "percentile": np.quantile(draws, [0.025, 0.975]),
        "BCa": np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z))),
    }


def coverage(kind: str, n: int, true: float, repeats: int) -> dict[str, float]:
    """Return for every interval the share of audits in which it holds the true leak."""
    battery = many(kind, true, repeats, n=n, seed=n)
    weights = resample(n, np.random.default_rng(0))
    hits = {"percentile": 0.0, "BCa": 0.0}
    for scores in battery:
        for name, (low, high) in rivals(scores, weights).items():
            hits[name] += (low <= true <= high) / repeats
    hits["library"] = float(np.mean([x.low <= true <= x.high for x in leaks(battery)]))
    rng = np.random.default_rng(n)
    flat = [
        Comparison(str(i), *(x.ravel() for x in audit(kind, true, rng, n=n)), paired=True)
        for i in range(repeats // 4)
    ]
    hits["by prompt"] = float(np.mean([x.low <= true <= x.high for x in leaks(flat)]))
    return hits


def false_presence(kind: str, n: int, repeats: int, *, paired: bool) -> float:
    rng, alarms = np.random.default_rng(n), 0
    for _ in range(repeats):
        edited, _, control = audit(kind, 0.0, rng, n=n)
        alarms += presence(edited, control if paired else control[: n // 2], paired=paired) <= 0.05
    return alarms / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    repeats = parser.parse_args().repeats
    print(machine("scipy"), f"{repeats} audits a line", sep="; ")

    with patch.object(leak_module, "presence", lambda *_, **__: 1.0):
        print("\ncoverage of 95 % intervals, %")
        print("scores    facts  leak  percentile   BCa  library  by prompt")
        for kind in KINDS:
            for n in (16, 64, 200):
                for true in (0.1, 0.4):
                    hits = coverage(kind, n, true, repeats)
                    row = "{percentile:10.1%}  {BCa:5.1%}  {library:6.1%}  {by prompt:8.1%}".format(**hits)
                    print(f"{kind:9} {n:5}  {true:4}  {row}", flush=True)

        print(
            "\nabsence (margin 0.10): claimed at a true leak of 0.10 (must be <= 5 %), and of 0 against printed power"
        )
        print("scores    facts  at 0.10   at 0  printed")
        for kind in KINDS:
            for n in (32, 64, 200):
                wrong = np.mean([x.absent() for x in leaks(many(kind, 0.1, repeats, n=n))])
                none = leaks(many(kind, 0.0, repeats, n=n))
                right, printed = np.mean([x.absent() for x in none]), np.mean([x.power() for x in none])
                print(f"{kind:9} {n:5}  {wrong:7.1%}  {right:5.1%}  {printed:6.1%}", flush=True)

    print("\npresence: claimed at 5 % without any leak (paired; unpaired against half as many control facts)")
    print("scores    facts  paired  unpaired")
    for kind in KINDS[:3]:
        for n in (16, 64):
            shares = [false_presence(kind, n, repeats // 4, paired=paired) for paired in (True, False)]
            print(f"{kind:9} {n:5}  {shares[0]:6.1%}  {shares[1]:7.1%}", flush=True)


if __name__ == "__main__":
    main()
