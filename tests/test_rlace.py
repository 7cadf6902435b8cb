"""R-LACE: closed where that is proven, and elsewhere no worse than its starts, random play and a search by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import fit_logistic, planted
from torch import Tensor

from repe_unlearn.errors import InputError, NoConceptWarning, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, mean_difference, rlace, rlace_game
from repe_unlearn.solvers.rlace import _gradient


def value(x: Tensor, z: Tensor, u: Tensor) -> float:
    """The loss of the best adversary on rows that are projected one by one, not inside the fit."""
    y = x - x.mean(0)
    y = y - y @ u @ u.T
    scale = float((x - x.mean(0)).square().sum() / y.square().sum())
    return fit_logistic(y, z, y.T @ y / len(y), ridge=1e-2 * scale).loss


def classes(k: int = 4, d: int = 8, n: int = 240) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    mix = torch.eye(d) + 0.4 * torch.randn(d, d, generator=g)
    z = torch.arange(n) % k
    x = torch.randn(n, d, generator=g) @ mix + 1.2 * torch.randn(k, d, generator=g)[z]
    return x.double(), z


@pytest.mark.parametrize("k", [2, 5])
def test_at_full_rank_the_adversary_knows_nothing(k: int) -> None:
    x, z = planted(k)
    game = rlace_game(x, z)
    assert game.eraser.allclose(mean_difference(Moments.of(x, z)))
    assert (game.steps, game.value) == (0, game.ceiling)
    # The claimed value, measured.
    assert value(x, z, game.eraser.left) == pytest.approx(game.ceiling, abs=1e-12)
    assert game.unerased < game.ceiling - 0.2
    # Any other subspace of that rank leaves something.
    other = game.eraser.left + 1e-2 * torch.randn_like(game.eraser.left)
    assert value(x, z, torch.linalg.qr(other).Q) < game.ceiling - 1e-6


def test_more_than_the_concept_is_not_removed() -> None:
    x, z = planted(2)
    assert rlace(x, z, rank=5).allclose(rlace(x, z, rank=1))
    assert rlace(x, z, rank=5).rank == 1


def test_an_eigenvalue_below_one_hides_nothing_without_penalty() -> None:
    x, z = planted(2)
    u = rlace(x, z).left
    y = x - x.mean(0)

    def loss(eigenvalue: float, ridge: float) -> float:
        shrunk = y - eigenvalue * (y @ u) @ u.T
        scale = float(y.square().sum() / shrunk.square().sum())
        return fit_logistic(shrunk, z, shrunk.T @ shrunk / len(y), ridge=ridge * scale).loss

    assert loss(0.9, 1e-9) == pytest.approx(loss(0.0, 1e-9), abs=1e-4)
    assert loss(1.0, 1e-9) > loss(0.0, 1e-9) + 0.2


@pytest.mark.parametrize("rank", [1, 2])
def test_below_full_rank_it_beats_every_simpler_choice(rank: int) -> None:
    x, z = classes()
    game = rlace_game(x, z, rank=rank, steps=60)
    u = game.eraser.left
    assert game.eraser.rank == rank
    assert game.eraser.is_orthogonal
    assert game.value == pytest.approx(value(x, z, u), abs=1e-9)
    assert game.unerased < game.value < game.ceiling
    m = Moments.of(x, z)
    truncated = torch.linalg.svd(m.cov_xz, full_matrices=False).U[:, :rank]
    oblique = torch.linalg.qr(leace(m).left[:, :rank]).Q
    for simpler in (truncated, oblique):
        assert value(x, z, simpler) < game.value - 1e-3
    g = torch.Generator().manual_seed(0)
    draws = [torch.linalg.qr(torch.randn(8, rank, generator=g, dtype=torch.float64)).Q for _ in range(100)]
    assert max(value(x, z, d) for d in draws) < game.value


def test_in_three_dimensions_it_is_the_best_of_all_directions() -> None:
    x, z = classes(k=3, d=3)
    game = rlace_game(x, z, rank=1)
    steps = torch.linspace(0, math.pi, 17, dtype=torch.float64)
    grid = [
        torch.stack([a.sin() * b.cos(), a.sin() * b.sin(), a.cos()])[:, None] for a in steps for b in steps
    ]
    best = max(value(x, z, u) for u in grid)
    assert best - 1e-9 <= game.value <= best + 0.05


def test_the_gradient_is_that_of_the_value() -> None:
    x, z = classes()
    m = Moments.of(x, z)
    u = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64)).Q
    play = lambda b: fit_logistic(x - m.mean_x, z, m.cov_xx, ridge=1e-3, basis=b)  # noqa: E731
    gradient = _gradient(u, play(u))
    assert float((u.T @ gradient).norm()) <= 1e-12 * float(gradient.norm())
    for _ in range(3):
        turn = torch.randn_like(u)
        turn = turn - u @ (u.T @ turn)
        ahead, behind = (play(torch.linalg.qr(u + h * turn).Q).loss for h in (1e-4, -1e-4))
        slope = float((gradient * turn).sum())
        assert (ahead - behind) / 2e-4 == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-3


def test_ascent_converges_and_never_falls() -> None:
    x, z = classes()
    values = [rlace_game(x, z, rank=1, steps=s).value for s in (0, 3, 10, 200)]
    assert values == sorted(values)
    assert values[3] > values[0] + 0.02
    end = rlace_game(x, z, rank=1, steps=200)
    assert end.slope < 1e-4
    assert end.steps < 200
    assert rlace_game(x, z, rank=1, steps=0).slope > 1e-2


def test_units_and_names_of_classes_do_not_matter_and_runs_repeat() -> None:
    x, z = classes()
    game = rlace_game(x, z, rank=2, steps=8)
    assert torch.equal(rlace(x, z, rank=2, steps=8).left, game.eraser.left)
    assert rlace_game(1e6 * x, 3 * z + 5, rank=2, steps=8).value == pytest.approx(game.value, abs=1e-6)
    assert rlace_game(x, z % 3, rank=1, steps=8).value != pytest.approx(game.value, abs=1e-2)


def test_affine_keeps_the_mean_and_linear_keeps_zero() -> None:
    x, z = planted(2)
    assert torch.allclose(rlace(x, z)(x).mean(0), x.mean(0))
    linear = rlace(x, z, affine=False)
    assert linear.is_linear
    assert not torch.allclose(linear(x).mean(0), x.mean(0), atol=1e-2)


@pytest.mark.parametrize("solver", [rlace, rlace_game])
def test_no_concept_gives_the_identity_and_says_so(solver: Callable[..., Any]) -> None:
    x, z = planted(2)
    clean = leace(Moments.of(x, z))(x)
    with pytest.warns(NoConceptWarning, match="uncorrelated") as caught:
        result = solver(clean, z)
    assert [w.filename for w in caught] == [__file__]
    assert getattr(result, "eraser", result).rank == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rank": 0}, InputError, "rank"),
        ({"rank": 13}, InputError, "rank"),
        ({"steps": -1}, InputError, "steps"),
        ({"ridge": -1.0}, InputError, "ridge"),
        ({"z": torch.zeros(400, dtype=torch.int64)}, NotEnoughDataError, "one class"),
        ({"z": torch.rand(400)}, ShapeError, "integer class"),
        ({"x": torch.full((400, 12), float("inf"))}, NonFiniteError, "infinite"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], match: str) -> None:
    x, z = planted(2)
    with pytest.raises(error, match=match):
        rlace_game(**{"x": x, "z": z, **change})  # type: ignore[arg-type]
