"""Made-up audits whose true leak is known: facts with several prompts each, of four kinds."""

from __future__ import annotations

import numpy as np

from repe_unlearn.audit.leak import Comparison

KINDS = ("normal", "binary", "skewed", "mixture")


def audit(
    kind: str, true: float, rng: np.random.Generator, *, n: int = 64, prompts: int = 4, paired: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores [facts, prompts] of the edited model, the original and the control.

    Prompts of one fact share most of their variance. In a ``mixture`` a share ``true`` of the facts leaks fully and
    the others not at all; in the other kinds every fact leaks a little.
    """

    def spread(scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal((n, 1))

    def noise() -> np.ndarray:
        return rng.standard_normal((n, prompts))

    def answers(share: float) -> np.ndarray:
        return (rng.random((n, prompts)) < rng.beta(2 * share, 2 * (1 - share), (n, 1))).astype(float)

    def gamma() -> np.ndarray:
        return 2 * (rng.gamma(1.0, 1.0, (n, 1)) - 1)

    hard = spread(0.8)
    if kind == "binary":
        return answers(0.25 + 0.65 * true), answers(0.9), answers(0.25)
    if kind == "skewed":
        return 6 * true + gamma() + noise(), 6 + gamma() + noise(), gamma() + noise()
    shared = hard if paired else spread(0.8)
    original = 6 + hard + spread() + noise()
    control = shared + spread() + noise()
    if kind == "mixture":
        leaks = rng.random((n, 1)) < true
        return np.where(leaks, 6 + hard + spread(), hard + spread()) + noise(), original, control
    return 6 * true + hard + spread() + noise(), original, control


def many(
    kind: str, true: float, repeats: int, *, n: int = 64, paired: bool = True, seed: int = 0
) -> list[Comparison]:
    """Return that many independent audits; as one battery they share their resampling weights, which is fast."""
    rng = np.random.default_rng(seed)
    return [
        Comparison(str(i), *audit(kind, true, rng, n=n, paired=paired), paired=paired) for i in range(repeats)
    ]
