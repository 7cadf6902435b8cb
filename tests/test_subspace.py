"""Given directions, principal directions, joint and shared erasers: what each promises, and what it does not."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from reference import covariances, one_hot, planted
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
from repe_unlearn.solvers import joint, leace, mean_difference, pca, shared, subspace


def directions(k: int = 3, d: int = 12) -> Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def left_over(e: Eraser, x: Tensor, z: Tensor) -> float:
    """Covariance with z as a share of what it was."""
    return float(covariances(e(x), one_hot(z))[1].norm() / covariances(x, one_hot(z))[1].norm())


def change(e: Eraser, x: Tensor) -> float:
    return float((e(x) - x).square().sum())


# subspace


@pytest.mark.parametrize("metric", ["orthogonal", "whitened"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_step_along_a_direction_changes_nothing(metric: str, affine: bool) -> None:
    x, z = planted(2)
    v = directions()
    e = subspace(Moments.of(x, z), v, metric=metric, affine=affine)  # type: ignore[arg-type]
    assert e.rank == 3
    assert e.is_idempotent
    assert torch.allclose(e(x + 5 * v[1]), e(x))
    assert not torch.allclose(e(x + 5 * directions(4)[3]), e(x), atol=1e-2)
    readings = (e(x) - e(x).mean(0)) @ v.T
    assert (float(readings.abs().max()) <= 1e-9) == (metric == "orthogonal") == e.is_orthogonal
    assert torch.allclose(e(x).mean(0), x.mean(0)) == affine
    assert e.is_linear != affine


def test_whitened_is_the_least_change_with_that_kernel() -> None:
    x, z = planted(2)
    m, v = Moments.of(x, z), directions()
    best = subspace(m, v, metric="whitened", shrinkage=None)
    assert change(best, x) < change(subspace(m, v), x)
    assert change(best, x) < change(subspace(m, v, metric="whitened", shrinkage=0.5), x)
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        noise = torch.randn(best.right.shape, generator=g, dtype=torch.float64) * best.right.norm() / 10
        other = Eraser(best.left, best.right + noise - noise @ best.left @ best.right, best.shift)
        assert float((other.matrix() @ v.T).norm()) <= 1e-9
        assert change(other, x) > change(best, x)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_with_the_directions_of_a_concept_it_is_that_concepts_eraser(k: int) -> None:
    x, z = planted(k)
    m = Moments.of(x, z)
    assert subspace(m, m.m_xz.T).allclose(mean_difference(m))
    assert subspace(m, m.m_xz.T, metric="whitened").allclose(leace(m))
    assert not subspace(m, m.m_xz.T).allclose(leace(m), rtol=1e-3)


@pytest.mark.parametrize("metric", ["orthogonal", "whitened"])
def test_dependent_repeated_zero_and_tiny_rows(metric: str) -> None:
    m = Moments.of(*planted(2))
    v = directions()
    more = torch.cat([v, v[:1] * 1e-30, v[:1] + v[1:2], torch.zeros(1, 12).double(), v[2:] * 1e200])
    wide = subspace(m, more, metric=metric)  # type: ignore[arg-type]
    assert wide.rank == 3
    assert wide.allclose(subspace(m, v, metric=metric))  # type: ignore[arg-type]
    tiny = subspace(m, v * torch.tensor([1e-30, 1.0, 1e30])[:, None], metric=metric)  # type: ignore[arg-type]
    assert tiny.allclose(wide)
    assert subspace(m, v[0].float(), metric=metric).rank == 1  # type: ignore[arg-type]
    everything = subspace(m, torch.eye(12), metric=metric)  # type: ignore[arg-type]
    assert everything.rank == 12
    with pytest.warns(NoConceptWarning, match="2 directions are zero"):
        assert subspace(m, torch.zeros(2, 12), metric=metric).rank == 0  # type: ignore[arg-type]


def test_units_carry_over_to_whitened_only() -> None:
    x, z = planted(2)
    units = torch.logspace(-5, 5, 12, dtype=torch.float64)
    for metric, carries in (("whitened", True), ("orthogonal", False)):
        plain = subspace(Moments.of(x, z), directions(), metric=metric).matrix()  # type: ignore[arg-type]
        scaled = subspace(Moments.of(x * units, z), directions() * units, metric=metric).matrix()  # type: ignore[arg-type]
        assert torch.allclose(scaled / units[:, None] * units, plain, atol=1e-8) == carries


def test_needs_no_labels_but_needs_directions_that_fit() -> None:
    x, _ = planted(2)
    m = Moments.of(x, torch.ones(len(x)))
    assert subspace(m, directions()).rank == 3
    with pytest.raises(ShapeError, match=r"needed floating-point \[k, 12\]"):
        subspace(m, directions(d=11))
    with pytest.raises(ShapeError):
        subspace(m, directions().long())
    with pytest.raises(ShapeError):
        subspace(m, torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="directions"):
        subspace(m, directions() * math.nan)
    with pytest.raises(InputError, match="metric"):
        subspace(m, directions(), metric="oblique")  # type: ignore[arg-type]
    with pytest.raises(NotEnoughDataError, match="at least 2"):
        subspace(Moments.of(x[:1], torch.ones(1)), directions())


# pca


def test_pca_of_pairs_is_the_principal_direction_of_their_differences() -> None:
    x, z = planted(2)
    count = min(int((z == 0).sum()), int((z == 1).sum()))
    delta = x[z == 1][:count] - x[z == 0][:count]
    flip = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()[:, None]
    m = Moments.of(x, z)
    ours = pca(m, rank=2, differences=Moments.of(delta, torch.ones(count)))
    theirs = torch.linalg.svd(delta).Vh[:2]
    assert torch.allclose(ours.left @ ours.right, theirs.T @ theirs, atol=1e-9)
    flipped = pca(m, rank=2, differences=Moments.of(delta * flip, torch.ones(count)))
    assert flipped.allclose(ours)
    centred = torch.linalg.svd(delta - delta.mean(0)).Vh[:2]
    assert not torch.allclose(ours.left @ ours.right, centred.T @ centred, atol=1e-2)


@pytest.mark.parametrize("k", [2, 5])
def test_pca_without_pairs_is_that_of_all_pairs_when_classes_have_one_covariance(k: int) -> None:
    x, z = planted(k)
    count = int(torch.bincount(z).min())
    means = torch.stack([x[z == c].mean(0) for c in range(k)])
    same = (x[z == 0] - means[0])[:count]
    rows = torch.cat(
        [same + means[c] for c in range(k) for _ in range(c + 1)]
    )  # unequal classes, equal covariances
    labels = torch.arange(k).repeat_interleave(torch.arange(1, k + 1) * count)
    delta = rows[:, None] - rows[None]
    pairs = delta[labels[:, None] != labels[None]]
    second = pairs.T @ pairs
    _, vectors = torch.linalg.eigh(second)
    top = vectors[:, -2:]
    e = pca(Moments.of(rows, labels, classes=k + 1), rank=2)
    assert torch.allclose(e.left @ e.right, top @ top.T, atol=1e-8)


def test_pca_does_not_guard() -> None:
    x, z = planted(2)
    m = Moments.of(x, z)
    assert left_over(pca(m), x, z) > 1e-2
    assert left_over(mean_difference(m), x, z) <= 1e-10


def test_pca_refuses() -> None:
    x, z = planted(2)
    m = Moments.of(x, z)
    with pytest.raises(InputError, match="one-hot"):
        pca(Moments.of(x, z.double()))
    with pytest.raises(InputError, match="one-hot"):
        pca(Moments.of(x, one_hot(z)[:, :1]))
    assert pca(m, rank=12).rank == 12
    assert pca(m, rank=0).rank == 0
    for rank in (-1, 13):
        with pytest.raises(InputError, match=r"rank <= 12"):
            pca(m, rank=rank)
    pairs = Moments.of(x[:3] - x[3:6], torch.ones(3))
    with pytest.raises(InputError, match=r"rank <= 3"):
        pca(m, rank=4, differences=pairs)
    with pytest.raises(ShapeError, match="width 11"):
        pca(m, differences=Moments.of(x[:, 1:], z))


def test_pca_says_when_the_direction_is_arbitrary() -> None:
    corners = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    differences = Moments.of(torch.cat([corners, -corners]), torch.ones(6))
    with pytest.warns(NumericalWarning, match="arbitrary"):
        pca(differences, rank=1, differences=differences)
    assert pca(differences, rank=2, differences=differences).rank == 2


# joint and shared


def two_concepts() -> tuple[Tensor, Tensor, Tensor]:
    x, a = planted(3)
    g = torch.Generator().manual_seed(2)
    b = torch.randn(len(x), generator=g, dtype=torch.float64) + (a == 1)
    return x + b[:, None] * torch.randn(12, generator=g, dtype=torch.float64), a, b


def test_joint_guards_every_concept_and_one_after_the_other_does_not() -> None:
    x, a, b = two_concepts()
    first, second = Moments.of(x, a), Moments.of(x, b)
    e = joint(first, second, shrinkage=None)
    assert e.rank == 3
    assert max(left_over(e, x, a), left_over(e, x, b)) <= 1e-10
    assert e.allclose(leace(Moments.of(x, torch.cat([one_hot(a), one_hot(b)], 1)), shrinkage=None))
    in_turn = leace(second, shrinkage=None).compose(leace(first, shrinkage=None))
    assert left_over(in_turn, x, b) > 1e-3
    assert left_over(leace(first), x, b) > 1e-2


def test_joint_of_one_is_leace() -> None:
    m = Moments.of(*planted(5))
    assert joint(m).allclose(leace(m))
    assert joint(m, m, affine=False, shrinkage=0.2).allclose(leace(m, affine=False, shrinkage=0.2))


def sites() -> list[tuple[Tensor, Tensor]]:
    """Three sites of growing scale; at the second the trace of z has the other sign."""
    out = []
    for number, sign in enumerate((1.0, -1.0, 0.5)):
        g = torch.Generator().manual_seed(10 + number)
        z = torch.arange(300) % 2
        x = torch.randn(300, 12, generator=g, dtype=torch.float64) + number
        x[:, 0] += sign * 3 * z
        out.append((x * 10.0**number, z))
    return out


def test_shared_guards_at_every_site_and_the_pool_does_not() -> None:
    data = sites()
    moments = [Moments.of(x, z) for x, z in data]
    e = shared(*moments, shrinkage=None)
    assert max(left_over(e, x, z) for x, z in data) <= 1e-9
    pooled = leace(reduce(Moments.merge, moments), shrinkage=None)
    assert max(left_over(pooled, x, z) for x, z in data) > 1e-2
    assert torch.allclose(e.shift, torch.cat([x for x, _ in data]).mean(0))


def test_shared_has_the_least_total_change() -> None:
    data = sites()
    best = shared(*(Moments.of(x, z) for x, z in data), shrinkage=None)
    least = sum(change(best, x) for x, _ in data)
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        noise = torch.randn(best.right.shape, generator=g, dtype=torch.float64) * best.right.norm() / 10
        other = Eraser(best.left, best.right + noise - noise @ best.left @ best.right, best.shift)
        assert max(left_over(other, x, z) for x, z in data) <= 1e-9
        assert sum(change(other, x) for x, _ in data) > least


def test_shared_takes_sites_with_other_columns() -> None:
    (x, z), (y, _), _ = sites()
    e = shared(Moments.of(x, z), Moments.of(y, torch.arange(300) % 3))
    assert e.rank == 3
    assert left_over(e, y, torch.arange(300) % 3) <= 1e-9


def test_joint_and_shared_refuse() -> None:
    x, a, b = two_concepts()
    m = Moments.of(x, a)
    for solver in (joint, shared):
        with pytest.raises(InputError, match="no moments"):
            solver()
        with pytest.raises(ShapeError, match="width d="):
            solver(m, Moments.of(x[:, :5], b))
        with pytest.raises(NotEnoughDataError, match="constant"):
            solver(m, Moments.of(x, torch.zeros(len(x))))
        assert solver(m, Moments.of(x, b)).rank == 3
    with pytest.raises(InputError, match="concept 2: got moments of other activations"):
        joint(m, Moments.of(x + 1.0, b))
