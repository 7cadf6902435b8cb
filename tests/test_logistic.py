"""The linear adversary is the one of scikit-learn, finds its minimum to rounding, and stays out of what was removed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import fit_logistic, planted
from torch import Tensor

from repe_unlearn.errors import InputError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers.logistic import Probing


def centred(k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x, z = planted(k)
    return x - x.mean(0), z, Moments.of(x, z).cov_xx


@pytest.mark.parametrize("k", [2, 4])
def test_equals_scikit_learn(k: int) -> None:
    from sklearn.linear_model import LogisticRegression

    x, z, cov = centred(k)
    fit = fit_logistic(x, z, cov, ridge=1e-2)

    def peer(ridge: float) -> Tensor:
        penalty = ridge * float(cov.trace()) / len(cov)
        if k == 2:  # one column there, two of half its size with half its penalty here
            penalty /= 2
        probe = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-12, max_iter=10_000)
        coef = torch.from_numpy(probe.fit(x.numpy(), z.numpy()).coef_.T)
        return torch.cat([-coef / 2, coef / 2], 1) if k == 2 else coef

    assert torch.allclose(fit.weights, peer(1e-2), atol=1e-5 * float(fit.weights.norm()))
    assert not torch.allclose(fit.weights, peer(2e-2), atol=1e-2 * float(fit.weights.norm()))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_minimum_is_found_in_any_unit(scale: float) -> None:
    x, z, cov = centred()
    fit = fit_logistic(scale * x, z, scale**2 * cov, ridge=1e-3)
    assert fit.gradient <= 1e-9
    assert fit.loss == pytest.approx(fit_logistic(x, z, cov, ridge=1e-3).loss, abs=1e-12)
    assert fit.loss < 0.5


def test_separable_rows_have_a_finite_probe() -> None:
    x, z, _ = centred(2)
    x = x + 1e3 * (z[:, None] - 0.5)
    fit = fit_logistic(x, z, x.T @ x / len(x), ridge=1e-6)
    assert fit.gradient <= 1e-9
    assert 0 < fit.loss < 1e-2


def test_a_basis_is_left_alone_and_equals_projected_rows() -> None:
    x, z, cov = centred()
    u = torch.linalg.qr(torch.randn(len(cov), 3, dtype=torch.float64)).Q
    fit = fit_logistic(x, z, cov, ridge=1e-3, basis=u)
    assert float((u.T @ fit.weights).norm()) <= 1e-12 * float(fit.weights.norm())
    y = x - x @ u @ u.T
    scale = float(cov.trace() / (y.T @ y / len(y)).trace())  # the penalty follows the unprojected variance
    other = fit_logistic(y, z, y.T @ y / len(y), ridge=1e-3 * scale)
    assert fit.loss == pytest.approx(other.loss, abs=1e-12)
    assert fit.loss > fit_logistic(x, z, cov, ridge=1e-3).loss + 0.01


def test_weights_count_like_copies() -> None:
    x, z, cov = centred(2)
    weight = 1.0 + (torch.arange(len(x)) % 3 == 0).double()
    copies = torch.cat([torch.arange(len(x)), (weight > 1).nonzero()[:, 0]])
    weighted = fit_logistic(x, z, cov, ridge=1e-3, weight=weight)
    copied = fit_logistic(x[copies], z[copies], cov, ridge=1e-3)
    assert torch.allclose(weighted.weights, copied.weights, rtol=1e-7)
    assert not torch.allclose(fit_logistic(x, z, cov, ridge=1e-3).weights, copied.weights, rtol=1e-2)


def test_a_start_saves_work_and_changes_nothing() -> None:
    x, z, cov = centred()
    cold = fit_logistic(x, z, cov, ridge=1e-3)
    warm = fit_logistic(x, z, cov, ridge=1e-3, start=replace(cold, weights=cold.weights + 0.1))
    assert torch.allclose(cold.weights, warm.weights, atol=1e-7)


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_penalty_that_bounds_nothing(ridge: float) -> None:
    with pytest.raises(InputError, match="ridge"):
        fit_logistic(*centred(), ridge=ridge)


def test_directions_taken_away_one_by_one_equal_those_taken_at_once() -> None:
    x, z, cov = centred()
    u = torch.linalg.qr(torch.randn(len(cov), 3, dtype=torch.float64)).Q
    probing = Probing.of(x, z, cov, ridge=1e-3)
    steps = probing.without(u[:, :1]).without(u[:, 1:2]).without(u[:, 2:])
    assert len(steps.rows) == len(cov) - 3
    one_by_one, at_once = steps.fit(), fit_logistic(x, z, cov, ridge=1e-3, basis=u)
    assert torch.allclose(one_by_one.weights, at_once.weights, atol=1e-8)
    assert torch.allclose(one_by_one.pull, at_once.pull, atol=1e-8)
    assert not torch.allclose(probing.without(u[:, :2]).fit().weights, at_once.weights, atol=1e-2)


def test_where_nothing_is_allowed_the_labels_keep_their_entropy() -> None:
    x, z, cov = centred()
    fit = Probing.of(x, z, cov, ridge=1e-3).without(torch.eye(len(cov), dtype=torch.float64)).fit()
    share = torch.bincount(z).double() / len(z)
    assert fit.loss == pytest.approx(float(-(share * share.log()).sum()), abs=1e-12)
    assert float(fit.weights.abs().max()) == 0.0


def test_fewer_rows_than_coordinates_are_fit_to_rounding() -> None:
    x, z = planted(3, "n<d")
    x = x - x.mean(0)
    assert len(x) < x.shape[1]
    fit = fit_logistic(x, z, x.T @ x / len(x), ridge=1e-4)
    assert fit.gradient <= 1e-9
    assert ((x @ fit.weights + fit.intercepts).argmax(1) == z).all()


def test_a_looser_tolerance_costs_its_square_in_loss() -> None:
    x, z, cov = centred()
    exact = fit_logistic(x, z, cov, ridge=1e-3)
    for tolerance in (1e-2, 1e-3, 1e-4):
        fit = fit_logistic(x, z, cov, ridge=1e-3, tolerance=tolerance)
        assert 1e-9 < fit.gradient <= tolerance
        assert -1e-12 <= fit.loss - exact.loss <= 100 * tolerance**2


def test_refuses_a_penalty_below_the_rounding_of_the_covariance() -> None:
    x, z = planted(2, "rank-deficient")
    x = x - x.mean(0)
    with pytest.raises(InputError, match="vanishes"):
        fit_logistic(x, z, x.T @ x / len(x) - 1e-12 * torch.eye(x.shape[1]).double(), ridge=1e-300)
