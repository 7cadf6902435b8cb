"""The linear adversary of the solvers on rows: ridge logistic regression by Newton's method, in torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.errors import InputError

_NEWTON_STEPS = 60
_CG_STEPS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Logistic:
    """A softmax probe on k classes: ``logits = x @ weights + intercepts``; the columns of weights sum to zero.

    Attributes:
        weights: ``[d, k]``, orthogonal to the basis that was projected away.
        intercepts: ``[k]``.
        loss: the minimum of the penalised cross-entropy, in nats.
        pull: ``[d, k]`` gradient ``xᵀ (p - y)`` of the mean cross-entropy by the weights, before projection.
        gradient: norm of the gradient at the solution, in the preconditioned coordinates (a number without unit).
    """

    weights: Tensor
    intercepts: Tensor
    loss: float
    pull: Tensor
    gradient: float


def fit_logistic(
    x: Tensor,
    z: Tensor,
    cov: Tensor,
    *,
    ridge: float,
    basis: Tensor | None = None,
    weight: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-9,
) -> Logistic:
    """Return the best softmax probe on ``x (I - U Uᵀ)``: the minimum is unique, and is found to rounding.

    Minimises ``Σ w CE(x W + b, z) + ridge/2 · (tr cov / d) · ‖W‖²`` over W with ``Uᵀ W = 0``, so that the rows
    themselves never need to be projected. The softmax is parametrised by k - 1 contrasts (no redundant column).
    The curvature is bounded by ``(I - UUᵀ) cov (I - UUᵀ) / 2`` (Böhning 1992); its Cholesky factor preconditions
    truncated Newton steps (conjugate gradients inside, Armijo outside), after which tolerances have no unit.

    Args:
        x: ``[n, d]`` float64, centred near its mean (for conditioning only: there is an intercept).
        z: ``[n]`` ids 0..k-1.
        cov: ``[d, d]`` covariance of x, weighted like the rows or nearly so.
        ridge: positive share of the mean variance.
        basis: ``[d, r]`` orthonormal U; default none.
        weight: ``[n]`` positive; default equal. Only proportions matter.
        start: ``[d, k]`` weights to start from.
        tolerance: of the gradient in the preconditioned coordinates, where its size is at most about 1. The loss
            is then exact to about its square.

    Raises:
        InputError: ridge is not positive and finite.

    Reference:
        Böhning: Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44, 1992.
    """
    if not (math.isfinite(ridge) and ridge > 0):
        raise InputError(f"got ridge={ridge!r}; needed a positive number, for example 1e-3.")
    problem = _Problem.of(x, z, cov, ridge, basis, weight)
    theta = problem.origin(start)
    loss, p = problem.loss(theta)
    gradient = problem.gradient(theta, p)
    for _ in range(_NEWTON_STEPS):
        size = float(gradient.norm())
        if size <= tolerance:
            break
        step = _conjugate_gradients(
            lambda s, p=p: problem.curvature(s, p), -gradient, min(0.1, math.sqrt(size))
        )
        slope = float((step * gradient).sum())
        t, moved = 1.0, False
        for _ in range(30):
            new_loss, new_p = problem.loss(theta + t * step)
            # At rounding level the loss cannot show progress any more; the gradient still can.
            if new_loss <= loss + 1e-4 * t * slope + 4 * torch.finfo(x.dtype).eps * abs(loss):
                theta, loss, p, moved = theta + t * step, new_loss, new_p, True
                break
            t /= 2
        if not moved:
            break
        gradient = problem.gradient(theta, p)
    weights, intercepts = problem.read(theta)
    pull = x.T @ (problem.share[:, None] * (p - problem.target))
    return Logistic(weights, intercepts, loss, pull, float(gradient.norm()))


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The penalised loss in coordinates theta [d + 1, k - 1], whitened by the bound on its curvature."""

    x: Tensor
    z: Tensor
    target: Tensor  # [n, k] one-hot
    share: Tensor  # [n] weights that sum to 1
    contrasts: Tensor  # [k - 1, k] orthonormal, each sums to 0
    basis: Tensor  # [d, r]
    penalty: float
    lower: Tensor  # [d, d] Cholesky factor of the bound

    @classmethod
    def of(
        cls, x: Tensor, z: Tensor, cov: Tensor, ridge: float, basis: Tensor | None, weight: Tensor | None
    ) -> _Problem:
        n, d = x.shape
        target = torch.nn.functional.one_hot(z).to(x)
        k = target.shape[1]
        share = x.new_full((n,), 1 / n) if weight is None else weight / weight.sum()
        centring = torch.eye(k).to(x) - 1 / k
        contrasts = torch.linalg.svd(centring).Vh[: k - 1]
        basis = x.new_zeros(d, 0) if basis is None else basis
        penalty = ridge * (float(cov.trace()) / d or 1.0)
        half = cov - basis @ (basis.T @ cov)
        bound = (half - (half @ basis) @ basis.T) / 2
        bound = (bound + bound.T) / 2
        bound.diagonal().add_(penalty)
        return cls(x, z, target, share, contrasts, basis, penalty, torch.linalg.cholesky(bound))

    def keep(self, w: Tensor) -> Tensor:
        return w - self.basis @ (self.basis.T @ w)

    def origin(self, start: Tensor | None) -> Tensor:
        theta = self.x.new_zeros(self.x.shape[1] + 1, len(self.contrasts))
        if start is not None:
            theta[:-1] = self.lower.T @ (self.keep(start) @ self.contrasts.T)
        return theta

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [d, k - 1] and intercepts [k - 1] of the contrasts."""
        w = torch.linalg.solve_triangular(self.lower.T, theta[:-1], upper=True)
        return self.keep(w), math.sqrt(2) * theta[-1]

    def read(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        w, b = self.split(theta)
        return w @ self.contrasts, b @ self.contrasts

    def logits(self, w: Tensor, b: Tensor) -> Tensor:
        return (self.x @ w + b) @ self.contrasts

    def loss(self, theta: Tensor) -> tuple[float, Tensor]:
        w, b = self.split(theta)
        log_p = torch.log_softmax(self.logits(w, b), dim=1)
        fit = -(self.share * log_p.gather(1, self.z[:, None])[:, 0]).sum()
        return float(fit + self.penalty / 2 * w.square().sum()), log_p.exp()

    def back(self, w: Tensor, error: Tensor) -> Tensor:
        """Pull a derivative by the logits [n, k], and that of the penalty, back to theta."""
        error = self.share[:, None] * error @ self.contrasts.T
        inner = self.keep((error.T @ self.x).T) + self.penalty * w
        inner = torch.linalg.solve_triangular(self.lower, inner, upper=False)
        return torch.cat([inner, math.sqrt(2) * error.sum(0, keepdim=True)])

    def gradient(self, theta: Tensor, p: Tensor) -> Tensor:
        return self.back(self.split(theta)[0], p - self.target)

    def curvature(self, step: Tensor, p: Tensor) -> Tensor:
        w, b = self.split(step)
        change = self.logits(w, b)
        return self.back(w, p * (change - (p * change).sum(1, keepdim=True)))


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, rtol: float) -> Tensor:
    """Return s with ``‖apply(s) - b‖ <= rtol ‖b‖``, or the best after a fixed number of steps."""
    s, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), float(b.square().sum())
    goal = rtol * rtol * size
    for _ in range(_CG_STEPS):
        if size <= goal:
            break
        image = apply(direction)
        bend = float((direction * image).sum())
        if bend <= 0:  # rounding only: the curvature is positive
            break
        t = size / bend
        s, residual = s + t * direction, residual - t * image
        new = float(residual.square().sum())
        direction, size = residual + new / size * direction, new
    return s
