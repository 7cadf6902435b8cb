"""Every rule against its peer, around n = d, where the rules matter; and what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from concept_erasure import optimal_linear_shrinkage
from torch import Tensor

from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.shrinkage import Shrinkage, olse_weight, shrinkage_of
from repe_unlearn.solvers import leace
from repe_unlearn.solvers.linalg import shrink
from repe_unlearn.thin_moments import ThinMoments

D = 24
SIZES = (6, 12, 23, 24, 25, 48, 400)


def correlated(n: int, d: int = D, seed: int = 1) -> Tensor:
    """Rows [n, d] of one population with a power-law spectrum, in units that span four decades."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows * torch.arange(1, d + 1).double() ** -0.3 @ basis * torch.logspace(-2, 2, d) + 3.0


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.parametrize("n", SIZES)
def test_ledoit_wolf_is_that_of_scikit_learn(n: int) -> None:
    from sklearn.covariance import ledoit_wolf

    x = correlated(n)
    _, wanted = ledoit_wolf(standardised(x).numpy())
    assert shrinkage_of(x, "ledoit_wolf") == pytest.approx(wanted, rel=1e-9)
    assert 0 < wanted < 1
    _, other = ledoit_wolf(x.numpy())  # not standardised
    assert abs(other - wanted) > 1e-3 * wanted


@pytest.mark.parametrize("n", SIZES)
def test_olse_is_that_of_concept_erasure(n: int) -> None:
    x = correlated(n)
    c = torch.corrcoef(x.T)
    wanted = optimal_linear_shrinkage(c, n)
    eye = torch.eye(D, dtype=torch.float64)
    weight = shrinkage_of(x, "olse")
    assert torch.allclose((1 - weight) * c + weight * eye, wanted, atol=1e-10)
    assert torch.allclose(shrink(c, n, "olse"), wanted, atol=1e-10)
    assert not torch.allclose(shrink(c, n + 1, "olse"), wanted, atol=1e-5)


def test_olse_is_clamped_where_the_formula_leaves_the_interval() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert float(olse_weight(one * 4, one * 10, 100)) == pytest.approx(0.25)
    assert float(olse_weight(one * 0.5, one * 10, 100)) == 1.0  # the formula says 2
    assert float(olse_weight(one * 0, one * 10, 100)) == 1.0  # the formula says infinity


@pytest.mark.parametrize("rule", ["olse", "ledoit_wolf"])
@pytest.mark.parametrize("n", [12, 24, 48])
def test_shrinking_brings_the_estimate_closer_to_the_population(rule: Shrinkage, n: int) -> None:
    population = torch.corrcoef(correlated(100_000).T)
    eye = torch.eye(D, dtype=torch.float64)

    def error(weight_of: Callable[[Tensor], float]) -> float:
        """‖(1 - ρ) C + ρ I - population‖², the mean over draws of n rows."""
        errors = []
        for seed in range(10, 30):
            x = correlated(n, seed=seed)
            weight = weight_of(x)
            c = torch.corrcoef(x.T)
            errors.append(float(((1 - weight) * c + weight * eye - population).square().sum()))
        return sum(errors) / len(errors)

    found = error(lambda x: shrinkage_of(x, rule))
    assert found < 0.9 * error(lambda x: 0.0)
    best = min(error(lambda x, w=w: w / 10) for w in range(11))
    assert found < 1.1 * best


@pytest.mark.parametrize("rule", ["olse", "ledoit_wolf"])
def test_more_samples_mean_less_shrinkage(rule: Shrinkage) -> None:
    weights = [shrinkage_of(correlated(n), rule) for n in (12, 48, 200, 2000)]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] < 0.05


@pytest.mark.parametrize("rule", ["olse", "ledoit_wolf", 0.3])
def test_rules_do_not_depend_on_units_nor_on_constant_coordinates(rule: Shrinkage) -> None:
    x = correlated(20)
    wanted = shrinkage_of(x, rule)
    assert shrinkage_of(x * torch.logspace(6, -6, D), rule) == pytest.approx(wanted, rel=1e-9)
    constant = torch.full((20, 3), 0.1, dtype=torch.float64)
    assert shrinkage_of(torch.cat([x, constant], dim=1), rule) == pytest.approx(wanted, rel=1e-9)
    if isinstance(rule, str):
        assert shrinkage_of(x[:10], rule) != pytest.approx(wanted, rel=1e-2)


def test_a_constant_coordinate_does_not_change_what_leace_does_to_the_others() -> None:
    x = correlated(40)
    z = torch.arange(40) % 2
    padded = torch.cat([x, torch.full((40, 2), 0.1, dtype=torch.float64)], dim=1)
    e, wide = leace(Moments.of(x, z)), leace(Moments.of(padded, z))
    assert torch.allclose(wide(padded)[:, :D], e(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [12, 24, 400])
def test_leace_erases_whatever_the_rule(n: int) -> None:
    x = correlated(n)
    z = torch.arange(n) % 2
    m = ThinMoments.of(x, z)
    erasers = [leace(m, shrinkage=rule) for rule in ("ledoit_wolf", "olse", 0.5)]
    for e in erasers:
        left = Moments.of(standardised(x) * 0 + e(x), z)
        assert float((left.cov_xz / m.var_x.sqrt()[:, None]).abs().max()) < 1e-12
    assert float((m.cov_xz / m.var_x.sqrt()[:, None]).abs().max()) > 1e-3
    assert not erasers[0].allclose(erasers[1], rtol=1e-6)


def test_ledoit_wolf_refuses_moments_and_says_what_to_pass() -> None:
    x, z = correlated(30), torch.arange(30) % 2
    with pytest.raises(InputError, match=r"ledoit_wolf.*ThinMoments"):
        leace(Moments.of(x, z), shrinkage="ledoit_wolf")
    leace(ThinMoments.of(x, z), shrinkage="ledoit_wolf")


def test_weights_count_rows_in_every_rule() -> None:
    x = correlated(20)
    counts = torch.tensor([1, 2, 3, 0, 1] * 4)
    z = torch.arange(20) % 2
    weighted = ThinMoments.of(x, z, weight=counts)
    repeated = ThinMoments.of(x.repeat_interleave(counts, 0), z.repeat_interleave(counts))
    for rule in ("olse", "ledoit_wolf"):
        assert leace(weighted, shrinkage=rule).allclose(leace(repeated, shrinkage=rule))
    assert not leace(weighted).allclose(leace(ThinMoments.of(x, z)), rtol=1e-3)


@pytest.mark.parametrize(
    ("x", "rule", "error", "match"),
    [
        (torch.randn(5), "olse", ShapeError, "rows"),
        (torch.ones(5, 2, dtype=torch.int64), "olse", ShapeError, "floating-point"),
        (torch.full((5, 2), math.nan), "olse", NonFiniteError, "NaN"),
        (torch.ones(5, 2), "olse", NotEnoughDataError, "0 coordinates vary"),
        (torch.randn(1, 2), "olse", NotEnoughDataError, "at least 2 rows"),
        (torch.randn(5, 2), "oas", InputError, "'oas'"),
        (torch.randn(5, 2), -0.1, InputError, "from 0 to 1"),
        (torch.randn(5, 2), math.nan, InputError, "from 0 to 1"),
    ],
)
def test_refuses_bad_input(x: Tensor, rule: Shrinkage, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        shrinkage_of(x, rule)
    assert shrinkage_of(torch.randn(5, 2), None) == 0.0
