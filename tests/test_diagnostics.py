from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repe_unlearn.diagnostics import Diagnosis, diagnose, summarize
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, NumericalWarning, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, mean_difference, random
from repe_unlearn.thin_moments import ThinMoments

D = 8
MIX = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sample(n: int, k: int = 2, *, seed: int = 0, signal: float = 1.0) -> tuple[Tensor, Tensor]:
    """Correlated x [n, 8] from one population, with class means ``signal`` apart along fixed directions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    z = torch.randint(k, (n,), generator=g) if k > 1 else torch.randn(n, generator=g, dtype=torch.float64)
    trace = torch.eye(D, dtype=torch.float64)[z] if k > 1 else z[:, None] * torch.ones(D).double() / D**0.5
    return (x + 2 * signal * trace) @ MIX + 3, z


def identity(d: int = D) -> Eraser:
    return Eraser(torch.zeros(d, 0).double(), torch.zeros(0, d).double(), torch.zeros(d).double())


def quiet(*args: object, **options: object) -> Diagnosis:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        return diagnose(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_tells_an_eraser_from_its_controls_on_unseen_rows(k: int) -> None:
    x, z = sample(1000, k, seed=1)
    m = Moments.of(*sample(20000, k))
    for solver in (leace, mean_difference):
        found = quiet(solver(m), x, z)
        assert found.before.low > 0.6
        assert found.before.p_value == 1 / 200
        assert abs(found.after.correlation) < 0.1
        assert found.after.low < 0.05
        assert found.after.p_value > 0.02
    for control in (random(m), identity(), leace(m).partial(0.5)):
        found = quiet(control, x, z)
        assert found.after.low > 0.3
        assert found.after.p_value == 1 / 200


def test_sees_that_a_small_fit_does_not_carry_over() -> None:
    """Of the gap that 20 rows show much remains in others, though nothing remains in the 20."""
    few = sample(20)
    assert float(Moments.of(leace(Moments.of(*few))(few[0]), few[1]).cov_xz.abs().max()) < 1e-12
    found = quiet(leace(Moments.of(*few)), *sample(2000, seed=1))
    assert found.after.low > 0.1
    assert found.after.p_value == 1 / 200


def test_p_values_are_uniform_without_a_concept_and_the_correlation_is_around_zero() -> None:
    for n in (40, 7 * D):  # fewer rows in each half than four times d
        found = [quiet(identity(), *sample(n, seed=s, signal=0), permutations=19).before for s in range(80)]
        p = np.array([leak.p_value for leak in found])
        assert abs(p.mean() - 0.525) < 0.1  # the mean of 1/20 ... 20/20
        assert (p <= 0.1).mean() < 0.22
        assert abs(np.mean([leak.correlation for leak in found])) < 0.1
    strong = [quiet(identity(), *sample(40, seed=s), permutations=19).before.p_value for s in range(20)]
    assert np.mean(strong) < 0.1


def test_more_columns_than_rows_do_not_look_like_a_concept() -> None:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(40, 64, generator=g, dtype=torch.float64), torch.arange(40) % 2
    found = quiet(identity(64), x, z)
    assert found.before.p_value > 0.05
    assert found.before.low < 0.0 < found.before.high
    # control: what a single sample says of itself is a perfect correlation
    columns = torch.cat([x, torch.ones(40, 1).double()], 1)
    target = z.double()
    assert torch.allclose(columns @ torch.linalg.lstsq(columns, target).solution, target)


def test_rows_of_one_prompt_are_not_independent() -> None:
    """Every prompt has an offset of its own and one label: read as single rows, chance looks like a concept."""
    alone, together = [], []
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        prompt = torch.arange(24).repeat_interleave(20)
        offset = torch.randn(24, D, generator=g, dtype=torch.float64)
        x = offset[prompt] + 0.1 * torch.randn(480, D, generator=g, dtype=torch.float64)
        z = torch.randint(2, (24,), generator=g)[prompt]
        alone.append(quiet(identity(), x, z, permutations=19).before)
        together.append(quiet(identity(), x, z, clusters=prompt, permutations=19).before)
    assert max(leak.p_value for leak in alone) == 0.05
    assert 0.3 < np.mean([leak.p_value for leak in together]) < 0.8
    width = [np.mean([leak.high - leak.low for leak in leaks]) for leaks in (alone, together)]
    assert width[1] > 2 * width[0]


def test_labels_are_shuffled_inside_pairs() -> None:
    """Content varies much more than the concept; within a pair it is the same."""
    g = torch.Generator().manual_seed(0)
    pair = torch.arange(30).repeat_interleave(2)
    z = torch.arange(60) % 2
    content = 20 * torch.randn(30, 3, generator=g, dtype=torch.float64)
    x = torch.cat(
        [content[pair], z[:, None] + 0.7 * torch.randn(60, 1, generator=g, dtype=torch.float64)], dim=1
    )
    found = quiet(identity(4), x, z, clusters=pair)
    assert found.clusters == 30
    assert found.before.p_value <= 0.01
    shuffled = z.reshape(30, 2)[:, [0, 1]].clone()
    flip = torch.rand(30, generator=g) < 0.5
    shuffled[flip] = shuffled[flip].flip(1)
    assert quiet(identity(4), x, shuffled.reshape(-1), clusters=pair).before.p_value > 0.05


def test_correlations_do_not_depend_on_units() -> None:
    x, z = sample(300, 1)
    units = torch.logspace(-4, 4, D, dtype=torch.float64)
    plain = quiet(identity(), x, z)
    scaled = quiet(identity(), x * units, 1e-7 * z)
    assert scaled.before.correlation == pytest.approx(plain.before.correlation, abs=1e-9)
    assert scaled.before.p_value == plain.before.p_value
    assert scaled.effective_rank < 1.1 < plain.effective_rank


def test_energy_and_effective_rank_are_what_they_say() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    x = torch.cat([eye, -eye] * 4)  # isotropic: one direction of four is a quarter
    z = torch.arange(32) % 2
    found = quiet(Eraser(eye[:, :1], eye[:1], torch.zeros(4).double()), x, z)
    assert found.energy == pytest.approx(0.25)
    assert found.effective_rank == pytest.approx(4.0)
    assert found.outlier == pytest.approx(1.0)
    assert quiet(Eraser(eye[:, :1], 2 * eye[:1], torch.zeros(4).double()), x, z).energy == pytest.approx(1.0)
    line = quiet(identity(4), x[:, :1] * torch.ones(4).double() + 5, z)
    assert line.effective_rank == pytest.approx(1.0)
    wide = quiet(identity(64), torch.randn(8, 64).double(), torch.arange(8) % 2)
    assert wide.effective_rank < 8  # fewer rows than columns


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("n", [6, 300])
def test_a_summary_is_what_the_rows_say(n: int, affine: bool) -> None:
    x, z = sample(n, seed=2)
    x[:, 3] *= 1e3
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    e = leace(Moments.of(x, z, weight=weight), affine=affine, shrinkage=0.1)
    centred = x - weight @ x / weight.sum()
    change = float(weight @ (e(x) - x).square().sum(1)) / float(weight @ centred.square().sum(1))
    spectrum = torch.linalg.eigvalsh(centred.T * weight @ centred)
    std = (weight @ centred.square()).sqrt()
    for m in (Moments.of(x, z, weight=weight), ThinMoments.of(x, z, weight=weight)):
        found = summarize(e, m)
        assert found.energy == pytest.approx(change, rel=1e-9)
        assert found.effective_rank == pytest.approx(float(spectrum.sum() ** 2 / spectrum.square().sum()))
        assert found.outlier == pytest.approx(float(std.max() / std.median()))
        assert (found.widest, found.rank, found.d, found.n) == (3, 1, D, pytest.approx(float(weight.sum())))
        assert found.residual < 1e-10
        assert summarize(e.partial(0.5), m).residual == pytest.approx(0.5)
        assert summarize(e.partial(0.5), m).energy == pytest.approx(change / 4)
    with pytest.raises(ShapeError, match="width 8 and moments of width 4"):
        summarize(e, Moments.of(x[:, :4], z))


def test_constant_coordinates_do_not_make_an_outlier() -> None:
    x, z = sample(300, seed=2)
    dead = torch.cat([x, torch.full((300, 20), 0.1).double()], 1)
    m = Moments.of(dead, z)
    assert summarize(leace(m), m).outlier == pytest.approx(summarize(identity(), Moments.of(x, z)).outlier)


def test_arrays_tensors_and_dtypes_agree() -> None:
    x, z = sample(200)
    e = leace(Moments.of(*sample(400, seed=3)))
    base = diagnose(e, x, z)
    assert diagnose(e, x.numpy(), z.numpy()) == base
    assert diagnose(e, x, z, seed=1) != base
    assert diagnose(e, x, z.double()).after.correlation == pytest.approx(base.after.correlation)
    names = [f"row {i:03d}" for i in range(200)]
    assert diagnose(e, x, z, clusters=names) == base
    low = diagnose(e, x.float(), z)
    assert low.after.correlation == pytest.approx(base.after.correlation, abs=1e-3)


def test_prints_as_a_table() -> None:
    e = leace(Moments.of(*sample(400)))
    text = repr(diagnose(e, *sample(200, seed=1)))
    assert "eraser of rank 1 on 200 rows, 200 clusters, d = 8" in text
    assert "correlation before   +0." in text
    assert "warning" not in text
    assert "warning: the eraser has rank 0" in repr(quiet(identity(), *sample(200)))


def outlier_rows(e: Eraser) -> tuple[Eraser, Tensor, Tensor]:
    x, z = sample(200, seed=1)
    return e, torch.cat([1e4 * x[:, :1], x[:, 1:]], 1), z


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("rank 0 and changes nothing.*Check labels", lambda e, x, z: (identity(), x, z)),
        (
            "moves .* % of the variance.*more varied prompts",
            lambda e, x, z: (random(Moments.of(x, z), rank=7), x, z),
        ),
        ("coordinate 0 is .* times.*sinks", lambda e, x, z: outlier_rows(e)),
        ("10 rows for d = 8.*more prompts", lambda e, x, z: (e, x[:10], z[:10])),
    ],
)
def test_warns_and_says_what_to_do(message: str, change) -> None:
    e = leace(Moments.of(*sample(400)))
    x, z = sample(200, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = diagnose(*change(e, x, z))
    matching = [w for w in caught if issubclass(w.category, NumericalWarning)]
    assert [str(w.message) for w in matching] == list(found.warnings)
    assert all(w.filename == __file__ for w in matching)
    with pytest.warns(NumericalWarning, match=message):
        diagnose(*change(e, x, z))
    assert diagnose(e, x, z).warnings == ()  # control; a warning would be an error here


def test_what_is_refused() -> None:
    e = leace(Moments.of(*sample(400)))
    x, z = sample(100)
    with pytest.raises(ShapeError, match="as the eraser"):
        diagnose(e, x[:, :5], z)
    with pytest.raises(ShapeError, match="needed z of shape"):
        diagnose(e, x, z[:50])
    with pytest.raises(ShapeError, match="clusters"):
        diagnose(e, x, z, clusters=[1, 2])
    with pytest.raises(ShapeError, match="labels in words take the ids"):
        diagnose(e, x, np.array(["cat", "dog"])[z])
    with pytest.raises(NonFiniteError):
        diagnose(e, x * torch.nan, z)
    with pytest.raises(NotEnoughDataError, match="got 2 clusters; needed at least 4"):
        diagnose(e, x, z, clusters=z)
    with pytest.raises(NotEnoughDataError, match="constant over one half"):
        diagnose(e, x, torch.zeros(100, dtype=torch.int64))
    with pytest.raises(InputError, match="permutations"):
        diagnose(e, x, z, permutations=0)
    assert isinstance(replace(diagnose(e, x, z), n=3), Diagnosis)
