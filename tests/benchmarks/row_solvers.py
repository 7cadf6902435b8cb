"""How long do the solvers on rows take, and what do they leave, next to LEACE on the same rows?

The leakage is the balanced accuracy of a fresh linear and of an RBF probe, trained on half of the held-out rows and
tested on the other half. The classes differ in means and, along four directions, in covariance.

A second table sets ``inlp`` and ``rlace`` beside the loops that were published with these methods, written anew here as
lists of operations: INLP (Ravfogel et al. 2020) for as many rounds as ours took, R-LACE (Ravfogel et al. 2022) for a few
iterations, whose time is scaled to the published 75,000. The scaled loop is not run to its end, so its leakage is unknown.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from _side_by_side import machine
from torch import Tensor

from repe_unlearn import Moments
from repe_unlearn.eraser import Eraser
from repe_unlearn.solvers import inlp, leace, rlace, second_order

PUBLISHED_ITERATIONS = 75_000

Solver = Callable[[Tensor, Tensor], Eraser]
T = TypeVar("T")


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


def published_inlp(x: Tensor, z: Tensor, rounds: int) -> Tensor:
    """Return the projection [d, d]: every round a support vector machine, a null space, and all rows projected anew."""
    from sklearn.svm import LinearSVC

    eye = torch.eye(x.shape[1]).to(x)
    removed, projection, rows = torch.zeros_like(eye), eye, x
    for _ in range(rounds):
        w = torch.from_numpy(LinearSVC(dual="auto").fit(rows.numpy(), z.numpy()).coef_).to(x)
        _, s, vh = torch.linalg.svd(w, full_matrices=False)
        v = vh[s > 1e-8 * s.max()].T
        removed += v @ v.T
        u, s, _ = torch.linalg.svd(
            removed
        )  # the null space of the sum is the common null space of all rounds
        u = u[:, s > 1e-8 * s.max()]
        projection = eye - u @ u.T
        rows = x @ projection
    return projection


def published_rlace(x: Tensor, z: Tensor, rank: int, iterations: int) -> None:
    """Run gradient steps of the adversary and of P in turn, with P projected onto the Fantope after each."""
    g = torch.Generator().manual_seed(0)
    x, (n, d), k = x.float(), x.shape, int(z.max()) + 1
    p = (rank / d * torch.eye(d)).requires_grad_()
    probe = torch.nn.Linear(d, k)
    steps = [torch.optim.SGD(ps, lr=0.005, weight_decay=1e-4) for ps in (probe.parameters(), [p])]
    for _ in range(iterations):
        for step, sign in zip(steps, (1, -1), strict=True):
            batch = torch.randint(n, (128,), generator=g)
            loss = torch.nn.functional.cross_entropy(probe(x[batch] - x[batch] @ p), z[batch])
            step.zero_grad()
            (sign * loss).backward()
            step.step()
        with torch.no_grad():
            p.copy_(fantope((p + p.T) / 2, rank))


def fantope(p: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix with eigenvalues in [0, 1] that sum to the rank."""
    values, vectors = torch.linalg.eigh(p)
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values - middle).clamp(0, 1).sum()) > rank else (low, middle)
    return vectors * (values - low).clamp(0, 1) @ vectors.T


def beside_the_published(x: Tensor, z: Tensor, y: Tensor, z_y: Tensor, *, rank: int, iterations: int) -> None:
    """Print the second table; x, z to fit on, y, z_y to measure on."""
    print("\n| method | loop | work | seconds | linear probe | RBF probe |\n|---|---|---|---|---|---|")

    def line(
        method: str, loop: str, work: str, seconds: float, apply: Callable[[Tensor], Tensor] | None
    ) -> None:
        read = (
            "not run to its end | -" if apply is None else "{:.3f} | {:.3f}".format(*leakage(apply, y, z_y))
        )
        print(f"| {method} | {loop} | {work} | {seconds:.2f} | {read} |", flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unfinished loop shows in its probe
        ours, seconds = timed(lambda: inlp(x, z))
        rounds = -(-ours.rank // int(z.max()))
        line("inlp", "ours", f"{rounds} rounds", seconds, ours)
        projection, seconds = timed(lambda: published_inlp(x, z, rounds))
        line("inlp", "published", f"{rounds} rounds", seconds, lambda rows: rows @ projection)
        ours, seconds = timed(lambda: rlace(x, z, rank=rank))
        line("rlace", "ours", f"rank {rank}", seconds, ours)
        published_rlace(x, z, rank, 2)
        _, seconds = timed(lambda: published_rlace(x, z, rank, iterations))
        work = f"rank {rank}, {iterations} iterations scaled to {PUBLISHED_ITERATIONS}"
        line("rlace", "published", work, seconds / iterations * PUBLISHED_ITERATIONS, None)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return what the function returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=int, default=768, help="width of x")
    parser.add_argument("--n", type=int, default=5000, help="rows to fit on, and as many to measure on")
    parser.add_argument("--k", type=int, default=4, help="classes; rlace at k - 2 directions needs 3 or more")
    parser.add_argument(
        "--iterations", type=int, default=50, help="of the published R-LACE loop, then scaled"
    )
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unfinished inlp shows in its probe
            e, seconds = timed(lambda solver=solver: solver(x, z))
        moved = float((e(x) - x).square().sum() / (x - x.mean(0)).square().sum())
        linear, rbf = leakage(e, y, z_y)
        print(f"| {name} | {e.rank} | {seconds:.2f} | {moved:.3f} | {linear:.3f} | {rbf:.3f} |", flush=True)
    beside_the_published(x, z, y, z_y, rank=max(1, args.k - 2), iterations=args.iterations)


if __name__ == "__main__":
    main()
