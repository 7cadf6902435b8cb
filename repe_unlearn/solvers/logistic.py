"""The linear adversary of the solvers on rows: ridge logistic regression by Newton's method, in torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repe_unlearn.errors import InputError

_NEWTON_STEPS = 60
_CG_STEPS = 200
_INTERCEPT = math.sqrt(2)  # their curvature is at most 1/2, that of the other coordinates at most 1


@dataclass(frozen=True, slots=True, eq=False)
class Logistic:
    """A softmax probe on k classes: ``logits = x @ weights + intercepts``; the columns of weights sum to zero.

    Attributes:
        weights: ``[d, k]``, orthogonal to the directions that were taken away.
        intercepts: ``[k]``.
        loss: the minimum of the penalised cross-entropy, in nats.
        pull: ``[d, k]`` gradient ``xᵀ (p - y)`` of the mean cross-entropy by the weights, on all of x.
        gradient: norm of the gradient at the solution, in the preconditioned coordinates (a number without unit).
    """

    weights: Tensor
    intercepts: Tensor
    loss: float
    pull: Tensor
    gradient: float


@dataclass(frozen=True, slots=True, eq=False)
class Probing:
    """Rows on which softmax probes are to be fit, in coordinates ``W = L⁻ᵀ N θ`` whose curvature is at most 1.

    The loss is ``Σ w CE(x W + b, z) + ridge/2 · (tr cov / d) · ‖W‖²``. The softmax is parametrised by k - 1 contrasts
    (no redundant column). Its curvature is bounded by ``cov / 2`` (Böhning 1992); L is the Cholesky factor of that bound
    with the penalty, so that tolerances have no unit. N is an orthonormal basis of what is still allowed: directions
    are taken away by reflecting them into the last coordinates of ``rows`` and dropping those, which costs two thin
    products instead of a new factorization, and leaves smaller rows.

    Attributes:
        x: ``[n, d]`` the rows as they came.
        z: ``[n]`` ids 0..k-1.
        share: ``[n]`` weights that sum to 1.
        contrasts: ``[k - 1, k]`` orthonormal, each sums to 0.
        lower: ``[d, d]`` L.
        allowed: ``[d, m]`` N.
        rows: ``[m, n]`` the rows in those coordinates, ``Nᵀ L⁻¹ xᵀ``.
        penalty: ``[m, m]`` the curvature of the penalty in them.

    Reference:
        Böhning: Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44, 1992.
    """

    x: Tensor
    z: Tensor
    share: Tensor
    contrasts: Tensor
    lower: Tensor
    allowed: Tensor
    rows: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, x: Tensor, z: Tensor, cov: Tensor, *, ridge: float, weight: Tensor | None = None) -> Probing:
        """Prepare the rows: one factorization, and one solve for all of them.

        Args:
            x: ``[n, d]`` float64, centred near its mean (for conditioning only: there is an intercept).
            z: ``[n]`` ids 0..k-1.
            cov: ``[d, d]`` covariance of x, weighted like the rows or nearly so.
            ridge: positive share of the mean variance.
            weight: ``[n]`` positive; default equal. Only proportions matter.

        Raises:
            InputError: ridge is not positive and finite, or too small to make the covariance regular.
        """
        if not (math.isfinite(ridge) and ridge > 0):
            raise InputError(f"got ridge={ridge!r}; needed a positive number, for example 1e-3.")
        (n, d), k = x.shape, int(z.max()) + 1
        share = x.new_full((n,), 1 / n) if weight is None else weight / weight.sum()
        contrasts = torch.linalg.svd(torch.eye(k, dtype=x.dtype, device=x.device) - 1 / k).Vh[: k - 1]
        penalty = ridge * (float(cov.trace()) / d or 1.0)
        bound = (cov + cov.T) / 4
        bound.diagonal().add_(penalty)
        lower, info = torch.linalg.cholesky_ex(bound)
        if int(info):
            raise InputError(
                f"got ridge={ridge!r}, which vanishes beside the rounding of the covariance of x ({n} rows, d={d}); "
                "needed more, for example 1e-6."
            )
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        rows = torch.linalg.solve_triangular(lower, x.T, upper=False)
        return cls(x, z, share, contrasts, lower, eye, rows, penalty * inverse @ inverse.T)

    def without(self, directions: Tensor) -> Probing:
        """Return the same rows for probes that are orthogonal to independent directions ``[d, r]``."""
        seen = self.allowed.T @ torch.linalg.solve_triangular(self.lower, directions, upper=False)
        reflectors, tau = torch.geqrf(seen)
        r = directions.shape[1]

        def rest(a: Tensor) -> Tensor:  # the reflected coordinates, without those that hold the directions
            return torch.ormqr(reflectors, tau, a, left=True, transpose=True)[r:]

        penalty = rest(rest(self.penalty).T)
        return replace(self, allowed=rest(self.allowed.T).T, rows=rest(self.rows), penalty=penalty)

    def fit(self, *, start: Logistic | None = None, tolerance: float = 1e-9) -> Logistic:
        """Return the best probe, by truncated Newton steps: conjugate gradients inside, Armijo outside.

        The curvature is applied in float32: it only shapes the steps. Loss and gradient, which decide where they end,
        are float64.

        Args:
            start: a probe to start from; what is not allowed in its weights is dropped.
            tolerance: of the gradient in the preconditioned coordinates, where its size is at most about 1. The loss
                is then exact to about its square.
        """
        curvature = _Curvature.of(self)
        theta = self.origin(start)
        loss, p = self.loss(theta)
        gradient = self.gradient(theta, p)
        for _ in range(_NEWTON_STEPS):
            size = float(gradient.norm())
            if size <= tolerance:
                break
            step = size * curvature.solve(p, -gradient / size, min(0.1, math.sqrt(size)))
            slope = float((step * gradient).sum())
            t, moved = 1.0, False
            for _ in range(30):
                new_loss, new_p = self.loss(theta + t * step)
                # At rounding level the loss cannot show progress any more; the gradient still can.
                if new_loss <= loss + 1e-4 * t * slope + 4 * torch.finfo(theta.dtype).eps * abs(loss):
                    theta, loss, p, moved = theta + t * step, new_loss, new_p, True
                    break
                t /= 2
            if not moved:
                break
            gradient = self.gradient(theta, p)
        weights = torch.linalg.solve_triangular(self.lower.T, self.allowed @ theta[:, :-1].T, upper=True)
        return Logistic(
            weights @ self.contrasts,
            _INTERCEPT * theta[:, -1] @ self.contrasts,
            loss,
            (self.error(p) @ self.x).T,
            float(gradient.norm()),
        )

    def origin(self, start: Logistic | None) -> Tensor:
        """Return theta ``[k - 1, m + 1]`` of the start: weights of the contrasts, then their scaled intercepts."""
        theta = self.rows.new_zeros(len(self.contrasts), len(self.rows) + 1)
        if start is not None:
            theta[:, :-1] = self.contrasts @ (start.weights.T @ self.lower @ self.allowed)
            theta[:, -1] = self.contrasts @ start.intercepts / _INTERCEPT
        return theta

    def loss(self, theta: Tensor) -> tuple[float, Tensor]:
        """Return the penalised loss and the probabilities ``[k, n]``."""
        log_p = torch.log_softmax(self.contrasts.T @ _logits(self.rows, theta), dim=0)
        fit = -(self.share * log_p.gather(0, self.z[None])[0]).sum()
        w = theta[:, :-1]
        return float(fit + (w * (w @ self.penalty)).sum() / 2), log_p.exp()

    def error(self, p: Tensor) -> Tensor:
        """Return the derivative ``[k, n]`` of the cross-entropy by the logits."""
        error = p * self.share
        error[self.z, torch.arange(len(self.z), device=error.device)] -= self.share
        return error

    def gradient(self, theta: Tensor, p: Tensor) -> Tensor:
        """Return the derivative ``[k - 1, m + 1]`` of the loss by theta."""
        return _back(self.rows, self.penalty, theta, self.contrasts @ self.error(p))


@dataclass(frozen=True, slots=True, eq=False)
class _Curvature:
    """The second derivative of the loss, in float32: it shapes the steps, but does not decide where they end."""

    rows: Tensor
    penalty: Tensor
    contrasts: Tensor
    share: Tensor

    @classmethod
    def of(cls, probing: Probing) -> _Curvature:
        parts = (probing.rows, probing.penalty, probing.contrasts, probing.share)
        return cls(*(part.float().contiguous() for part in parts))

    def solve(self, p: Tensor, b: Tensor, rtol: float) -> Tensor:
        """Return about ``H⁻¹ b`` at probabilities p ``[k, n]``.

        The closer the probe is to certain, the flatter the loss, while the penalty stays: the preconditioner follows,
        as if all rows were as certain as their mean.
        """
        p = p.float()
        weighted = p * self.share
        flat = float(2 * (weighted * (1 - p)).sum() / len(self.contrasts))  # 1: the bound; 0: certain
        middle = (1 - flat) * self.penalty
        middle.diagonal().add_(flat)
        lower = torch.linalg.cholesky(middle)

        def apply(step: Tensor) -> Tensor:
            change = self.contrasts.T @ _logits(self.rows, step)
            change -= (p * change).sum(0)
            return _back(self.rows, self.penalty, step, self.contrasts @ change.mul_(weighted))

        def precondition(residual: Tensor) -> Tensor:
            inner = torch.cholesky_solve(residual[:, :-1].T, lower).T
            return torch.cat([inner, residual[:, -1:] / flat], dim=1)

        return _conjugate_gradients(apply, precondition, b.float(), rtol).to(b)


def _logits(rows: Tensor, theta: Tensor) -> Tensor:
    """Logits of the contrasts ``[k - 1, n]``: classes before rows, the layout in which thin products are fast."""
    return theta[:, :-1] @ rows + _INTERCEPT * theta[:, -1:]


def _back(rows: Tensor, penalty: Tensor, theta: Tensor, error: Tensor) -> Tensor:
    """Pull a derivative by the logits of the contrasts, and that of the penalty, back to theta."""
    inner = error @ rows.T + theta[:, :-1] @ penalty
    return torch.cat([inner, _INTERCEPT * error.sum(1, keepdim=True)], dim=1)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], b: Tensor, rtol: float
) -> Tensor:
    """Return s with ``‖apply(s) - b‖ <= rtol ‖b‖``, or the best after a fixed number of steps."""
    s, residual = torch.zeros_like(b), b.clone()
    direction = precondition(residual)
    size, goal = float((residual * direction).sum()), rtol * float(b.norm())
    for _ in range(_CG_STEPS):
        image = apply(direction)
        bend = float((direction * image).sum())
        if bend <= 0:  # rounding only: the curvature is positive
            break
        t = size / bend
        s, residual = s + t * direction, residual - t * image
        if float(residual.norm()) <= goal:
            break
        closer = precondition(residual)
        new = float((residual * closer).sum())
        direction, size = closer + new / size * direction, new
    return s
