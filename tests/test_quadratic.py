"""Quadratic erasure: all classes get one mean and one covariance, at the least change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from concept_erasure import QuadraticFitter
from concept_erasure.optimal_transport import ot_barycenter, ot_map
from reference import planted
from torch import Tensor

from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    OutputExistsError,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import QuadraticEraser, oracle, quadratic
from repe_unlearn.tensorfile import write_tensors


def sample(k: int = 3, d: int = 6, seed: int = 0, n: int = 900) -> tuple[Tensor, Tensor]:
    """Classes of unequal sizes, means and covariances."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(n, generator=g) ** 2 * k).long().clamp_max(k - 1)
    mixes = torch.eye(d).double() + torch.randn(k, d, d, generator=g, dtype=torch.float64) / 2
    means = torch.randn(k, d, generator=g, dtype=torch.float64) * 2
    noise = torch.randn(n, d, generator=g, dtype=torch.float64)
    return torch.einsum("nd,nde->ne", noise, mixes[z]) + means[z] + 5.0, z


def classes(x: Tensor, z: Tensor) -> list[Moments]:
    return [Moments.of(x[z == c], z[z == c]) for c in range(int(z.max()) + 1)]


def spread(x: Tensor, z: Tensor) -> float:
    """The largest difference between class means or class covariances, relative to the covariance of x."""
    parts = classes(x, z)
    std = x.std(0)
    means = torch.stack([m.mean_x for m in parts]) / std
    covs = torch.stack([m.cov_xx for m in parts]) / std[:, None] / std
    return max(float((means - means[0]).abs().max()), float((covs - covs[0]).abs().max()))


@pytest.mark.parametrize("metric", ["euclidean", "standardized"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_all_classes_get_one_mean_and_one_covariance(k: int, metric: str) -> None:
    x, z = sample(k)
    e = quadratic(classes(x, z), metric=metric)  # type: ignore[arg-type]
    y = e(x, z)
    assert spread(x, z) > 0.3
    assert spread(y, z) <= 1e-10
    assert torch.allclose(y.mean(0), x.mean(0))
    assert e.residual <= 1e-8
    assert e.gap <= 1e-10
    linear = oracle(Moments.of(x, z))(x, z)
    assert spread(linear, z) > 0.3  # covariances stay unequal


def test_a_quadratic_classifier_learns_nothing() -> None:
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    x, z = sample(2)
    accuracy = lambda rows: (  # noqa: E731
        QuadraticDiscriminantAnalysis(priors=[0.5, 0.5])
        .fit(rows.numpy(), z.numpy())
        .predict_proba(rows.numpy())[:, 0]
    )
    after = accuracy(quadratic(classes(x, z))(x, z))
    assert float(abs(after - 0.5).max()) < 0.05  # unbiased covariances differ by 1/n
    assert float(abs(accuracy(oracle(Moments.of(x, z))(x, z)) - 0.5).max()) > 0.4


def cost(e: QuadraticEraser, x: Tensor, z: Tensor) -> float:
    return float((e(x, z) - x).square().sum(1).mean())


def test_the_common_covariance_is_the_cheapest() -> None:
    x, z = sample(3)
    parts = classes(x, z)
    best = quadratic(parts)
    least = cost(best, x, z)
    centre = Moments.of(best(x, z), z).cov_xx
    g = torch.Generator().manual_seed(1)
    for size in (0.05, -0.05, 0.3):
        turn = torch.eye(6).double() + size * torch.randn(6, 6, generator=g, dtype=torch.float64)
        # Any other common covariance, reached from every class by the cheapest map, the optimal transport.
        maps = torch.stack([_transport(m.cov_xx, turn @ centre @ turn.T) for m in parts])
        other = replace(best, maps=maps)
        assert spread(other(x, z), z) <= 1e-8
        assert cost(other, x, z) > least * (1 + 1e-6)


def _root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return vectors * values.sqrt() @ vectors.T


def _transport(a: Tensor, b: Tensor) -> Tensor:
    root = _root(a)
    inverse = torch.linalg.inv(root)
    return inverse @ _root(root @ b @ root) @ inverse


@pytest.mark.parametrize("k", [2, 4])
def test_maps_are_the_optimal_transport_of_concept_erasure(k: int) -> None:
    parts = classes(*sample(k))
    covs = torch.stack([m.cov_xx for m in parts])
    e = quadratic(parts)
    assert torch.allclose(e.maps, e.maps.mT, atol=1e-7)  # optimal transport of Gaussians is symmetric
    centre = ot_barycenter(covs, torch.tensor([m.n for m in parts]).double())
    assert torch.allclose(e.maps, ot_map(covs, centre), atol=1e-5)
    assert not torch.allclose(e.maps, ot_map(covs, ot_barycenter(covs)), atol=1e-2)  # other weights


def test_is_what_concept_erasure_gives_but_for_the_mean() -> None:
    x, z = sample(3)
    theirs = QuadraticFitter.fit(x, z, shrinkage=False).eraser
    y, other = quadratic(classes(x, z))(x, z), theirs(x, z)
    # Their covariances are unbiased, so class sizes enter the barycenter by 1 / n.
    assert torch.allclose(y - y.mean(0), other - other.mean(0), atol=0.05)
    assert torch.allclose(y.mean(0), x.mean(0))
    assert (
        float((other.mean(0) - x.mean(0)).norm()) > 0.1
    )  # concept-erasure 0.2.4: unweighted mean of classes


def test_convergence_is_reported() -> None:
    parts = classes(*sample(5))
    assert quadratic(parts).residual <= 1e-8
    with pytest.warns(NumericalWarning, match="max_iterations"):
        early = quadratic(parts, max_iterations=1)
    assert early.residual > 1e-6
    x, z = sample(5)
    assert spread(early(x, z), z) <= 1e-9  # equality does not rest on convergence
    assert quadratic(parts, rtol=0.5).residual <= 0.5


def test_scale_of_x_does_not_matter() -> None:
    x, z = sample(3)
    y = quadratic(classes(x, z))(x, z)
    for factor in (1e-9, 1e9):
        e = quadratic(classes(x * factor, z))
        assert torch.allclose(e(x * factor, z) / factor, y, atol=1e-6)
        assert e.residual <= 1e-8


def test_units_do_not_matter_when_standardized() -> None:
    x, z = sample(3)
    units = torch.logspace(-6, 6, 6, dtype=torch.float64)
    plain = quadratic(classes(x, z), metric="standardized")(x, z)
    scaled = quadratic(classes(x * units, z), metric="standardized")(x * units, z)
    assert torch.allclose(scaled / units, plain, atol=1e-6)
    mild = torch.logspace(-1, 1, 6, dtype=torch.float64)
    euclidean = quadratic(classes(x * mild, z))(x * mild, z)
    assert spread(euclidean, z) <= 1e-8
    assert not torch.allclose(euclidean / mild, quadratic(classes(x, z))(x, z), atol=1e-2)


@pytest.mark.parametrize("factor", [1e3, 1e7])
@pytest.mark.parametrize("metric", ["euclidean", "standardized"])
def test_an_outlier_coordinate_hides_nothing(factor: float, metric: str) -> None:
    x, z = sample(3)
    x[:, 0] *= factor
    e = quadratic(classes(x, z), metric=metric)  # type: ignore[arg-type]
    assert spread(e(x, z), z) <= 1e-8
    theirs = QuadraticFitter.fit(x, z, shrinkage=False).eraser
    assert spread(theirs(x, z), z) > 1e-3  # concept-erasure 0.2.4: roots of squared condition numbers


def test_directions_without_variance_are_left_alone() -> None:
    x, z = sample(3)
    g = torch.Generator().manual_seed(4)
    wide = torch.cat(
        [x @ torch.randn(6, 9, generator=g, dtype=torch.float64), torch.full((len(x), 1), 0.1)], 1
    )
    e = quadratic(classes(wide, z))
    y = e(wide, z)
    assert spread(y[:, :9], z) <= 1e-8
    assert torch.allclose(y[:, 9], wide[:, 9])
    assert spread(wide[:, :9], z) > 0.3


def test_refuses_a_class_that_does_not_vary_where_others_do() -> None:
    x, z = sample(2)
    few = torch.cat([x[z == 0], x[z == 1][:5]])
    labels = torch.cat([z[z == 0], z[z == 1][:5]])
    with pytest.raises(
        NotEnoughDataError, match=r"class 1 \(5 samples, d=6\) has no variance in 2 directions"
    ):
        quadratic(classes(few, labels))
    for shrinkage in ("olse", 0.2):
        e = quadratic(classes(few, labels), shrinkage=shrinkage)  # type: ignore[arg-type]
        assert e.gap <= 1e-8
        assert spread(e(few, labels), labels) > 1e-6  # not exact on the sample
    assert quadratic(classes(x, z)).k == 2


def test_refuses_what_cannot_be_solved() -> None:
    x, z = sample(2)
    a, b = classes(x, z)
    assert torch.equal(quadratic({1: b, 0: a}).maps, quadratic([a, b]).maps)
    with pytest.raises(InputError, match="ids 0 to 1"):
        quadratic({0: a, 2: b})
    with pytest.raises(InputError, match="1 classes"):
        quadratic([a])
    with pytest.raises(ShapeError, match="class 1"):
        quadratic([a, Moments.of(x[:, 1:], z)])
    with pytest.raises(NotEnoughDataError, match="class 1: got 1 samples"):
        quadratic([a, Moments.of(x[:1], z[:1])])
    with pytest.raises(NonFiniteError, match="class 0"):
        quadratic([replace(a, m_xx=a.m_xx * math.nan), b])
    with pytest.raises(InputError, match="metric"):
        quadratic([a, b], metric="other")  # type: ignore[arg-type]
    still = Moments.of(torch.ones(4, 6), torch.ones(4))
    with pytest.raises(NotEnoughDataError, match="constant within"):
        quadratic([still, still])


def test_shapes_dtypes_and_labels() -> None:
    x, z = sample(3)
    e = quadratic(classes(x, z))
    y = e(x, z)
    assert torch.allclose(e(x.reshape(30, 30, 6), z.reshape(30, 30)), y.reshape(30, 30, 6))
    assert torch.allclose(e(x[z == 1], z[z == 1]), y[z == 1])  # classes may be absent
    assert torch.allclose(e(x[0], z[0]), y[0])
    assert e(x.half(), z).dtype == torch.float16
    assert e.to(dtype=torch.float32).maps.dtype == torch.float32
    for bad in (z.double(), z[:-1]):
        with pytest.raises(ShapeError):
            e(x, bad)
    with pytest.raises(ShapeError, match=r"\[\.\.\., 6\]"):
        e(x[:, 1:], z)
    for bad in (z - 1, z + 1):
        with pytest.raises(InputError, match="classes 0 to 2"):
            e(x, bad)
    with pytest.raises(ShapeError, match="needed"):
        replace(e, maps=e.maps[:2])
    with pytest.raises(NonFiniteError, match="mean"):
        replace(e, mean=e.mean * math.nan)


def test_later_changes_of_the_callers_tensors_do_not_matter() -> None:
    mean = torch.zeros(2)
    e = QuadraticEraser(torch.zeros(2, 2), mean, torch.eye(2).expand(2, 2, 2))
    mean.fill_(9.0)
    assert torch.equal(e(torch.ones(2), torch.tensor(1)), torch.ones(2))


def test_planted_classes() -> None:
    x, z = planted(2)
    assert spread(quadratic(classes(x, z))(x, z), z) <= 1e-8


def test_file_round_trip_is_bit_equal(tmp_path: Path) -> None:
    x, z = sample()
    e = quadratic(classes(x, z))
    path = e.save(tmp_path / "quadratic")
    loaded = QuadraticEraser.load(path)
    assert all(
        torch.equal(getattr(loaded, name), getattr(e, name)) for name in ("class_means", "mean", "maps")
    )
    assert (loaded.residual, loaded.gap) == (e.residual, e.gap)
    assert torch.equal(loaded(x, z), e(x, z))
    assert not torch.equal(loaded(x, z), e(x, z.roll(1)))
    with pytest.raises(OutputExistsError):
        e.save(path)


def test_files_that_are_no_quadratic_eraser_are_refused(tmp_path: Path) -> None:
    x, z = sample()
    e = quadratic(classes(x, z))
    path = e.save(tmp_path / "f")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        QuadraticEraser.load(path)
    oracle(Moments.of(x, z)).save(path, force=True)
    with pytest.raises(FileFormatError, match="holds 'oracle eraser'; needed 'quadratic eraser'"):
        QuadraticEraser.load(path)
    tensors = {name: getattr(e, name) for name in ("class_means", "mean", "maps")}
    header = {"residual": 0.0, "gap": 0.0}
    for changed, head in (
        ({**tensors, "mean": torch.zeros(2)}, header),
        (tensors, {"residual": 0.0}),
        (tensors, {**header, "gap": None}),
        (tensors, {**header, "gap": "wide"}),
    ):
        write_tensors(path, changed, kind="quadratic eraser", version=1, header=head, force=True)
        with pytest.raises(FileFormatError, match="not a whole quadratic eraser"):
            QuadraticEraser.load(path)
