"""Second order: what LEACE promises always holds, and where class covariances differ, non-linear probes lose too."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from reference import SHAPES, covariances, one_hot, planted
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    InputError,
    NoConceptWarning,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, random, second_order


@cache
def gaussian(spread: float, seed: int, k: int = 2, n: int = 1500, d: int = 12) -> tuple[Tensor, Tensor]:
    """Gaussian classes with unequal means, whose covariances differ along two directions if ``spread`` is not 1."""
    fixed, g = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=fixed)
    means = 0.7 * torch.randn(k, d, generator=fixed)
    z = torch.arange(n) % k
    y = torch.randn(n, d, generator=g)
    y[:, 0] *= torch.where(z == 0, spread, 1 / spread)
    y[:, 1] *= torch.where(z == 0, 1 / spread, spread)
    return (y @ mix + means[z]).double(), z


def energy(e: Eraser, x: Tensor) -> float:
    return float((e(x) - x).square().sum(1).mean())


def gap(x: Tensor, z: Tensor) -> float:
    """Largest difference of a class covariance from the pooled one, in units of the pooled one where it has variance."""
    groups = [x[z == c] - x[z == c].mean(0) for c in range(int(z.max()) + 1)]
    pooled = sum((g.T @ g for g in groups), torch.zeros(x.shape[1], x.shape[1]).double()) / len(x)
    values, vectors = torch.linalg.eigh(pooled)
    keep = values > 1e-9 * values[-1]
    white = vectors[:, keep] / values[keep].sqrt()
    eye = torch.eye(white.shape[1]).double()
    return max(float(torch.linalg.matrix_norm(white.T @ g.T @ g @ white / len(g) - eye, 2)) for g in groups)


def read_by(e: Eraser, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Held-out accuracy of non-linear probes that are trained after erasure."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    scaler = StandardScaler().fit(e(train[0]))
    a, b = scaler.transform(e(train[0])), scaler.transform(e(test[0]))
    probes = {"rbf": SVC(), "mlp": MLPClassifier((32,), max_iter=60, random_state=0, tol=1e-3)}
    return {name: float(p.fit(a, train[1]).score(b, test[1])) for name, p in probes.items()}


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_non_linear_probes_read_less_than_after_leace_at_equal_energy() -> None:
    train, test = gaussian(2.5, 0), gaussian(2.5, 1)
    m = Moments.of(*train)
    ours = second_order(*train)
    assert ours.rank == 3
    # LEACE with random directions on top, until it changes x at least as much.
    padded, seed = leace(m), 0
    while energy(padded, train[0]) < energy(ours, train[0]):
        padded, seed = random(m, rank=1, seed=seed).compose(padded), seed + 1
    assert energy(padded, train[0]) >= energy(ours, train[0]) > energy(leace(m), train[0])
    after, same_energy, plain = (read_by(e, train, test) for e in (ours, padded, leace(m)))
    for probe in ("rbf", "mlp"):
        assert after[probe] < 0.55
        assert same_energy[probe] > 0.75
        assert plain[probe] > 0.75


@pytest.mark.parametrize("k", [2, 3])
def test_where_only_means_differ_it_is_leace(k: int) -> None:
    x, z = gaussian(1.0, 0, k)
    assert second_order(x, z).allclose(leace(Moments.of(x, z)))
    assert not second_order(*gaussian(2.5, 0, k)).allclose(leace(Moments.of(*gaussian(2.5, 0, k))), rtol=1e-2)


def test_shuffles_rarely_find_what_is_not_there() -> None:
    extra = [second_order(*gaussian(1.0, seed, n=300)).rank - 1 for seed in range(40)]
    assert sum(r > 0 for r in extra) <= 2
    assert all(second_order(*gaussian(2.5, seed, n=300)).rank == 3 for seed in range(5))


@pytest.mark.parametrize("k", [2, 3])
def test_class_covariances_agree_afterwards(k: int) -> None:
    x, z = gaussian(2.5, 0, k)
    plain, ours = leace(Moments.of(x, z))(x), second_order(x, z)(x)
    assert gap(plain, z) > 0.6
    assert gap(ours, z) < 0.3
    assert gap(second_order(*gaussian(2.5, 0, k))(gaussian(2.5, 1, k)[0]), z) < 0.35


def test_covariances_that_differ_in_few_directions_agree_exactly() -> None:
    # One sample and its copy, stretched along the first direction: the rest agrees to rounding.
    x, _ = planted(1)
    x = x - x.mean(0)
    x = x / x.std(0)
    y = x.clone()
    y[:, 0] += 2 * x[:, 3]
    both, z = torch.cat([x, y]), torch.arange(2 * len(x)) // len(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoConceptWarning)  # the means agree as well
        one, two = (second_order(both, z, extra=r, shrinkage=None) for r in (1, 2))
    assert gap(two(both), z) < 1e-10
    assert gap(one(both), z) > 1e-2
    # Asked for more, it takes only what differs.
    assert second_order(both, z, extra=9, shrinkage=None).rank == 2


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extra", [None, 0, 2])
def test_keeps_what_leace_promises(k: int, shape: str, extra: int | None) -> None:
    x, z = planted({2: 2, 3: 5}[k], shape)
    z = z % k  # so that no class has a single row
    e = second_order(x, z, extra=extra)
    before = covariances(x, one_hot(z))[1].norm()
    assert float(covariances(e(x), one_hot(z))[1].norm() / before) <= 1e-9
    assert torch.allclose(e(x).mean(0), x.mean(0), atol=1e-9)
    assert e.is_idempotent
    assert float(covariances(second_order(x, z).partial(0.5)(x), one_hot(z))[1].norm() / before) > 0.1
    if extra == 0:
        assert e.allclose(leace(Moments.of(x, z)), rtol=1e-7)
    if extra == 2:
        assert e.rank == k + 1


def test_singular_covariance_without_shrinkage() -> None:
    x, z = planted(2, "rank-deficient")
    with pytest.warns(NumericalWarning, match="singular"):
        e = second_order(x, z, extra=1, shrinkage=None)
    assert float(covariances(e(x), one_hot(z))[1].norm() / covariances(x, one_hot(z))[1].norm()) <= 1e-9


@pytest.mark.parametrize("shrinkage", ["olse", None])
def test_units_of_x_carry_over(shrinkage: object) -> None:
    x, z = gaussian(2.5, 0)
    units = torch.logspace(-6, 6, 12, dtype=torch.float64)
    plain, scaled = (second_order(a, z, shrinkage=shrinkage).matrix() for a in (x, x * units))  # type: ignore[arg-type]
    assert torch.allclose(scaled / units[:, None] * units, plain, atol=1e-8)
    assert not torch.allclose(scaled, plain, atol=1e-2)


def test_runs_repeat_and_limit_caps() -> None:
    x, z = gaussian(2.5, 0)
    assert torch.equal(second_order(x, z).left, second_order(x, z).left)
    assert [second_order(x, z, limit=r).rank for r in (0, 1, 2, 12)] == [1, 2, 3, 3]
    assert second_order(x, z + 4).allclose(second_order(x, z))
    assert second_order(x, z, affine=False).is_linear


def test_no_difference_gives_the_identity_and_says_so() -> None:
    x, z = planted(2)
    x, z = torch.cat([x, x]), torch.arange(2 * len(x)) // len(x)
    with pytest.warns(NoConceptWarning, match="neither") as caught:
        e = second_order(x, z)
    assert [w.filename for w in caught] == [__file__]
    assert e.rank == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"extra": -1}, InputError, "extra"),
        ({"extra": 13}, InputError, "extra"),
        ({"limit": -1}, InputError, "limit"),
        ({"draws": 1}, InputError, "draws"),
        ({"z": torch.zeros(400, dtype=torch.int64)}, NotEnoughDataError, "one class"),
        ({"z": (torch.arange(400) == 7).long()}, NotEnoughDataError, "at least 2"),
        ({"z": torch.rand(400)}, ShapeError, "integer class"),
        ({"x": torch.full((400, 12), float("nan"))}, NonFiniteError, "NaN"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], match: str) -> None:
    x, z = planted(2)
    with pytest.raises(error, match=match):
        second_order(**{"x": x, "z": z, **change})  # type: ignore[arg-type]
