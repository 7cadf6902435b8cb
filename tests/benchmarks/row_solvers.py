"""How long do the solvers on rows take, and what do they leave, next to LEACE on the same rows?

The leakage is the balanced accuracy of a fresh linear and of an RBF probe, trained on half of the held-out rows and
tested on the other half. The classes differ in means and, along four directions, in covariance.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from _side_by_side import machine
from torch import Tensor

from repe_unlearn import Moments
from repe_unlearn.eraser import Eraser
from repe_unlearn.solvers import inlp, leace, rlace, second_order

Solver = Callable[[Tensor, Tensor], Eraser]


def sample(n: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return correlated float64 activations [n, d] and the class of each row; ``seed`` draws the rows alone."""
    fixed, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    draw = lambda *shape, g=g: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    mix = torch.eye(d, dtype=torch.float64) + draw(d, d, g=fixed) / d**0.5
    z = torch.arange(n) % k
    y = draw(n, d)
    y[:, :4] *= torch.where(z == 0, 2.5, 0.5)[:, None]
    return y @ mix + 0.3 * draw(k, d, g=fixed)[z], z


def leakage(e: Callable[[Tensor], Tensor], x: Tensor, z: Tensor) -> tuple[float, float]:
    """Return held-out balanced accuracies of a linear and an RBF probe."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    rows, half = e(x).numpy(), len(x) // 2
    scores = []
    for probe in (LogisticRegression(C=0.01, max_iter=500), SVC()):
        fitted = make_pipeline(StandardScaler(), probe).fit(rows[:half], z[:half].numpy())
        scores.append(float(balanced_accuracy_score(z[half:].numpy(), fitted.predict(rows[half:]))))
    return scores[0], scores[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, default=768, help="width of x")
    parser.add_argument("--n", type=int, default=5000, help="rows to fit on, and as many to measure on")
    parser.add_argument("--k", type=int, default=4, help="classes; rlace at k - 2 directions needs 3 or more")
    args = parser.parse_args()
    x, z = sample(args.n, args.d, args.k, seed=1)
    y, z_y = sample(args.n, args.d, args.k, seed=2)
    solvers: dict[str, Solver] = {
        "leace": lambda x, z: leace(Moments.of(x, z)),
        "inlp": inlp,
        "rlace": rlace,
        "second_order": second_order,
    }
    if args.k > 2:
        solvers["rlace, k - 2 directions"] = lambda x, z: rlace(x, z, rank=args.k - 2)
    print(machine("scikit-learn"))
    print(f"\nn = {args.n}, d = {args.d}, k = {args.k}, one run each\n")
    print("| solver | rank | seconds | share of the variance moved | linear probe | RBF probe |")
    print("|---|---|---|---|---|---|")
    before = leakage(lambda x: x, y, z_y)
    print(f"| none | 0 | - | 0 | {before[0]:.3f} | {before[1]:.3f} |")
    for name, solver in solvers.items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unfinished inlp shows in its probe
            e = solver(x, z)
        seconds = time.perf_counter() - start
        moved = float((e(x) - x).square().sum() / (x - x.mean(0)).square().sum())
        linear, rbf = leakage(e, y, z_y)
        print(f"| {name} | {e.rank} | {seconds:.2f} | {moved:.3f} | {linear:.3f} | {rbf:.3f} |", flush=True)


if __name__ == "__main__":
    main()
