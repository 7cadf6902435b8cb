"""INLP removes directions until a probe is at chance on held-out rows, and no longer."""

from __future__ import annotations

import pytest
import torch
from reference import covariances, fit_logistic, one_hot, planted
from torch import Tensor

from repe_unlearn.errors import (
    InputError,
    NoConceptWarning,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import inlp, leace


def balanced_accuracy(train: Tensor, z: Tensor, test: Tensor, z_test: Tensor) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    scale = train.std(0) + 1e-9
    probe = LogisticRegression(class_weight="balanced", C=1.0, max_iter=2000)
    probe.fit((train / scale).numpy(), z.numpy())
    return float(balanced_accuracy_score(z_test, probe.predict((test / scale).numpy())))


def sample(seed: int, n: int = 900, d: int = 16, k: int = 3) -> tuple[Tensor, Tensor]:
    fixed, g = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=fixed)
    means = torch.randn(k, d, generator=fixed)
    z = torch.arange(n) % k
    return (torch.randn(n, d, generator=g) @ mix + means[z] + 2).double(), z


@pytest.mark.parametrize("k", [2, 3])
def test_unseen_rows_are_read_at_chance(k: int) -> None:
    (x, z), (y, z_y) = sample(0, k=k), sample(1, k=k)
    e = inlp(x, z)
    assert balanced_accuracy(x, z, y, z_y) > 1 / k + 0.3
    assert balanced_accuracy(e(x), z, e(y), z_y) < 1 / k + 0.1
    assert k - 1 <= e.rank < 16
    assert e.rank % (k - 1) == 0


def test_one_round_does_not_suffice_where_the_covariance_misleads_the_probe() -> None:
    x, z = sample(0)
    with pytest.warns(NumericalWarning, match="more rounds"):
        once = inlp(x, z, rounds=1)
    assert once.rank == 2
    assert inlp(x, z).rank > 2
    # Unlike leace, it leaves some covariance with z: that is the documented difference.
    before, after = (covariances(a, one_hot(z))[1].norm() for a in (x, inlp(x, z)(x)))
    assert 1e-6 < float(after / before) < 0.5
    assert float(covariances(leace(Moments.of(x, z))(x), one_hot(z))[1].norm() / before) < 1e-10


def test_it_is_the_plain_loop_that_projects_rows_and_starts_anew() -> None:
    x, z = sample(0)
    held = torch.arange(len(z)) // 3 % 4 == 3  # classes alternate: every fourth row of each
    centre = x[~held].mean(0)
    y = x[~held] - centre
    basis = y.new_zeros(16, 0)

    def plain(rounds: int) -> Tensor:
        found = basis
        for _ in range(rounds):
            left = y - y @ found @ found.T
            scale = float(
                y.square().sum() / left.square().sum()
            )  # the penalty follows the unprojected variance
            probe = fit_logistic(left, z[~held], left.T @ left / len(y), ridge=1e-2 * scale)
            found = torch.cat([found, torch.linalg.svd(probe.weights, full_matrices=False).U[:, :2]], dim=1)
        return found @ found.T

    e = inlp(x, z, heldout=held)
    assert torch.equal(e.left, inlp(x, z).left)
    assert e.rank >= 4
    # The probes of the solver stop at a tolerance, which is all that differs.
    assert float((plain(e.rank // 2) - e.left @ e.left.T).norm()) <= 0.05
    assert float((plain(e.rank // 2 - 1) - e.left @ e.left.T).norm()) > 1.0


def test_many_rounds_do_not_drift() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.arange(600) % 2
    # Every direction holds the concept, and the scales span six decades.
    x = (torch.randn(600, 40, generator=g) + 3 * z[:, None]).double() * torch.logspace(0, 6, 40).double()
    e = inlp(x, z, ridge=1e-9, slack=0.0, rounds=60)
    assert e.rank > 10
    eye = torch.eye(e.rank, dtype=torch.float64)
    assert float((e.right @ e.left - eye).abs().max()) <= 1e-13
    assert e.is_orthogonal
    product, drift = torch.eye(40).double(), 0.0
    for direction in e.left.T:
        rounded = direction.float().double()  # what happens without care: products of rounded projections
        product = product @ (torch.eye(40).double() - torch.outer(rounded, rounded))
        drift = float((product @ product - product).abs().max())
    assert drift > 1e-10


def test_affine_keeps_the_mean_and_linear_keeps_zero() -> None:
    x, z = sample(0)
    affine, linear = inlp(x, z), inlp(x, z, affine=False)
    assert torch.allclose(affine(x).mean(0), x.mean(0))
    assert not torch.allclose(linear(x).mean(0), x.mean(0), atol=1e-2)
    assert torch.equal(affine.left, linear.left)
    assert linear.is_linear


def test_the_same_input_gives_the_same_eraser_in_any_unit() -> None:
    x, z = sample(0)
    assert torch.equal(inlp(x, z).left, inlp(x, z).left)
    assert torch.allclose(inlp(1e6 * x, z).matrix(), inlp(x, z).matrix(), atol=1e-6)
    assert torch.allclose(inlp(x, 7 * z + 3).matrix(), inlp(x, z).matrix(), atol=1e-8)


def test_a_rare_class_is_erased_too() -> None:
    (x, z), (y, z_y) = sample(0, k=2, n=4000), sample(1, k=2, n=4000)
    few, few_y = ((a == 0) | (torch.arange(4000) % 20 == 1) for a in (z, z_y))
    x, z, y, z_y = x[few], z[few], y[few_y], z_y[few_y]
    assert float((z == 0).double().mean()) > 0.9  # a plain accuracy would start near the majority
    e = inlp(x, z)
    assert balanced_accuracy(x, z, y, z_y) > 0.8
    assert balanced_accuracy(e(x), z, e(y), z_y) < 0.62


def test_no_concept_gives_the_identity_and_says_so() -> None:
    x, z = sample(0)
    shuffled = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    with pytest.warns(NoConceptWarning, match="chance is 0.333"):
        e = inlp(x, shuffled)
    assert e.rank == 0
    assert torch.equal(e(x), x)


def test_held_out_rows_only_measure() -> None:
    x, z = sample(0)
    held = torch.arange(len(z)) % 5 == 0
    # With labels that the held-out rows contradict, the first probe looks useless.
    wrong = torch.where(held, (z + 1) % 3, z)
    with pytest.warns(NoConceptWarning):
        assert inlp(x, wrong, heldout=held).rank == 0
    assert inlp(x, z, heldout=held).rank >= 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rounds": 0}, InputError, "rounds"),
        ({"slack": -1.0}, InputError, "slack"),
        ({"ridge": 0.0}, InputError, "ridge"),
        ({"heldout": torch.zeros(3, dtype=torch.bool)}, ShapeError, "heldout"),
        ({"heldout": torch.zeros(900, dtype=torch.bool)}, NotEnoughDataError, "held-out"),
        ({"heldout": torch.ones(900, dtype=torch.bool)}, NotEnoughDataError, "training"),
        ({"z": torch.zeros(900, dtype=torch.int64)}, NotEnoughDataError, "one class"),
        ({"z": torch.rand(900)}, ShapeError, "integer class"),
        ({"z": torch.zeros(899, dtype=torch.int64)}, ShapeError, "rows"),
        ({"x": torch.full((900, 16), float("nan"))}, NonFiniteError, "NaN"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], match: str) -> None:
    x, z = sample(0)
    arguments = {"x": x, "z": z, **change}
    with pytest.raises(error, match=match):
        inlp(**arguments)  # type: ignore[arg-type]


def test_refuses_a_class_of_three_rows() -> None:
    x, _ = planted(2)
    with pytest.raises(NotEnoughDataError, match="3 rows"):
        inlp(x, torch.arange(len(x)) // 397)
