"""SPLINCE: z goes, the covariance with y stays, at least change; and where both cannot be had it says so."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from reference import SHAPES, covariances, one_hot, planted
from torch import Tensor

from repe_unlearn.errors import (
    InputError,
    NoConceptWarning,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    ShapeError,
)
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.solvers import leace, splince


def sample(k: int = 3, shape: str = "n>d") -> tuple[Tensor, Tensor, Tensor]:
    """The planted sample with a second concept: classes that are correlated with z."""
    x, z = planted(k, shape)
    g = torch.Generator().manual_seed(7)
    y = torch.randint(3, (len(x),), generator=g)
    y = torch.where(torch.rand(len(x), generator=g) < 0.4, (z > 0).long(), y)
    trace = torch.randn(3, x.shape[1], generator=g, dtype=torch.float64)
    if shape == "n>d":
        x = x + trace[y]
    return x, z, y


def kept(e: object, x: Tensor, y: Tensor) -> float:
    """Relative change of the covariance with y."""
    before = covariances(x, one_hot(y))[1]
    return float((covariances(e(x), one_hot(y))[1] - before).norm() / before.norm())  # type: ignore[operator]


def left_over(e: object, x: Tensor, z: Tensor) -> float:
    """Covariance with z as a share of what it was."""
    return float(covariances(e(x), one_hot(z))[1].norm() / covariances(x, one_hot(z))[1].norm())  # type: ignore[operator]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("shrinkage", [None, "olse", 0.3])
def test_erases_one_and_keeps_the_other(k: int, shape: str, shrinkage: float | str | None) -> None:
    x, z, y = sample(k, shape)
    m, other = Moments.of(x, z), Moments.of(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # singular covariance, tested elsewhere
        e = splince(m, preserve=other, shrinkage=shrinkage)  # type: ignore[arg-type]
        control = leace(m, shrinkage=shrinkage)  # type: ignore[arg-type]
    assert left_over(e, x, z) <= 1e-9
    assert kept(e, x, y) <= 1e-9
    assert e.is_idempotent
    assert e.rank == control.rank
    assert kept(control, x, y) > 1e-3


def test_is_the_least_norm_solution_of_both_constraints() -> None:
    x, z, y = sample()
    e = splince(Moments.of(x, z), preserve=Moments.of(x, y), shrinkage=None)
    sigma, cross_z = covariances(x, one_hot(z))
    _, cross_y = covariances(x, one_hot(y))
    root = torch.linalg.cholesky(sigma)
    white = torch.linalg.solve_triangular(root, torch.cat([cross_z, cross_y], 1), upper=False)
    wanted = torch.cat([cross_z, torch.zeros_like(cross_y)], 1)
    # The change A has A Σxz = Σxz and A Σxy = 0; the pseudoinverse gives the A L of least Frobenius norm.
    change = wanted @ torch.linalg.pinv(white, rtol=1e-10) @ torch.linalg.inv(root)
    assert torch.allclose(e.left @ e.right, change, atol=1e-9)
    shrunk = splince(Moments.of(x, z), preserve=Moments.of(x, y), shrinkage=0.3)
    assert not torch.allclose(shrunk.left @ shrunk.right, change, atol=1e-3)


def test_changes_more_than_leace_and_the_same_where_y_asks_nothing() -> None:
    x, z, y = sample()
    m = Moments.of(x, z)
    plain = leace(m, shrinkage=None)
    size = lambda e: float((e(x) - x).square().sum())  # noqa: E731
    assert size(splince(m, preserve=Moments.of(x, y), shrinkage=None)) > size(plain) * (1 + 1e-6)
    # A y without any trace in x, and a y that is orthogonal to z in whitened coordinates (a reading that leace keeps).
    free = leace(Moments.of(x, y))(x) @ torch.ones(x.shape[1]).double()
    noise = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), free[:, None] ** 2).solution
    blind = free**2 - (torch.cat([x, torch.ones(len(x), 1).double()], 1) @ noise)[:, 0]
    same = splince(m, preserve=Moments.of(x, blind), shrinkage=None)
    assert same.allclose(plain, rtol=1e-8)


def test_units_carry_over() -> None:
    x, z, y = sample()
    units = torch.logspace(-6, 6, x.shape[1], dtype=torch.float64)
    plain = splince(Moments.of(x, z), preserve=Moments.of(x, y)).matrix()
    z_units = one_hot(z) * torch.tensor([1e-9, 1.0, 1e9]).double()
    scaled = splince(Moments.of(x * units, z_units), preserve=Moments.of(x * units, one_hot(y) * 1e-7))
    assert torch.allclose(scaled.matrix() / units[:, None] * units, plain, atol=1e-8)


def test_linear_keeps_no_mean() -> None:
    x, z, y = sample()
    m, other = Moments.of(x, z), Moments.of(x, y)
    assert torch.allclose(splince(m, preserve=other)(x).mean(0), x.mean(0))
    linear = splince(m, preserve=other, affine=False)
    assert linear.is_linear
    assert not torch.allclose(linear(x).mean(0), x.mean(0), atol=1e-2)
    assert kept(linear, x, y) <= 1e-9


def test_refuses_concepts_that_share_a_direction_and_names_it() -> None:
    x, z, _ = sample(3)
    m = Moments.of(x, z)
    with pytest.raises(InputError, match=r"direction of z \(.*z\[2\].* are .* rad apart") as caught:
        splince(m, preserve=Moments.of(x, (z == 2).long()))
    assert "y[0]" in str(caught.value)
    assert "min_angle" not in str(caught.value)
    with pytest.raises(InputError, match="meet"):
        splince(m, preserve=m)
    few = Moments.of(x[:, :3], z)
    with pytest.raises(InputError, match="meet"):  # ranks 2 + 2 in three dimensions
        splince(few, preserve=Moments.of(x[:, :3], sample(3)[2]))


def near(angle: float) -> tuple[Moments, Moments, Tensor, Tensor, Tensor]:
    """Two reals whose traces in white x are ``angle`` apart."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * 200**0.5
    z, y = x[:, 0], math.cos(angle) * x[:, 0] + math.sin(angle) * x[:, 1]
    return Moments.of(x, z), Moments.of(x, y), x, z, y


@pytest.mark.parametrize("angle", [1e-5, 1e-3])
def test_warns_at_a_small_angle_but_keeps_its_word(angle: float) -> None:
    m, other, x, z, y = near(angle)
    with pytest.warns(NumericalWarning, match="times as far") as caught:
        e = splince(m, preserve=other)
    assert all(w.filename == __file__ for w in caught)
    assert left_over(e, x, z) <= 1e-9
    assert kept(e, x, y) <= 1e-9
    assert float(e.left.norm() * e.right.norm()) == pytest.approx(1 / math.sin(angle), rel=1e-3)


@pytest.mark.parametrize(
    ("angle", "least", "fine"), [(1e-7, 1e-6, False), (0.1, 1e-6, True), (0.1, 0.2, False)]
)
def test_the_smallest_angle_is_the_callers(angle: float, least: float, fine: bool) -> None:
    m, other, *_ = near(angle)
    if fine:
        assert splince(m, preserve=other, min_angle=least).rank == 1
    else:
        with pytest.raises(InputError, match=f"needed at least {least:.0e} rad"):
            splince(m, preserve=other, min_angle=least)


@pytest.mark.parametrize("bad", [0.0, -1.0, 2.0, math.nan])
def test_refuses_an_impossible_angle(bad: float) -> None:
    m, other, *_ = near(1.0)
    with pytest.raises(InputError, match="min_angle"):
        splince(m, preserve=other, min_angle=bad)


def test_refuses_another_sample() -> None:
    x, z, y = sample()
    m = Moments.of(x, z)
    with pytest.raises(InputError, match=r"399 samples.*same 400"):
        splince(m, preserve=Moments.of(x[:-1], y[:-1]))
    moved = x.clone()
    moved[0, 0] += 1e-2
    with pytest.raises(InputError, match="other activations"):
        splince(m, preserve=Moments.of(moved, y))
    with pytest.raises(ShapeError, match="width d=11"):
        splince(m, preserve=Moments.of(x[:, :11], y))
    with pytest.raises(NotEnoughDataError, match="preserve"):
        splince(m, preserve=Moments.of(x, torch.zeros(len(x))))
    broken = Moments.of(x, y)
    with pytest.raises(NonFiniteError, match=r"preserve.*m_xz"):
        splince(m, preserve=replace(broken, m_xz=broken.m_xz * math.nan))


def test_accepts_the_same_sample_summed_in_another_order() -> None:
    x, z, y = sample()
    x = x + 1e5
    streamed = Accumulator(classes=3)
    for rows, labels in zip(x.flip(0).split(37), y.flip(0).split(37), strict=True):
        streamed.add(rows, labels)
    e = splince(Moments.of(x, z), preserve=streamed.moments())
    assert kept(e, x, y) <= 1e-8


def test_no_concept_is_the_identity() -> None:
    x, z, y = sample(2)
    clean = leace(Moments.of(x, z), shrinkage=None)(x)
    with pytest.warns(NoConceptWarning):
        e = splince(Moments.of(clean, z), preserve=Moments.of(clean, y), shrinkage=0.1)
    assert e.rank == 0
