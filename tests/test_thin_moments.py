"""ThinMoments against the dense way: the same numbers, the same erasers, without the d x d matrix."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from reference import SHAPES, covariances, one_hot, planted
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NoConceptWarning,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    OutputExistsError,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.shrinkage import Shrinkage
from repe_unlearn.solvers import leace, mean_difference, random
from repe_unlearn.tensorfile import write_tensors
from repe_unlearn.thin_moments import ThinMoments


def solved(m: Moments | ThinMoments, shrinkage: Shrinkage, *, affine: bool = True) -> Eraser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        return leace(m, shrinkage=shrinkage, affine=affine)


def far(a: Eraser, b: Eraser) -> float:
    """The difference of two erasers relative to the size of the change that they make."""
    change = (b.left @ b.right).norm()
    return float((a.matrix() - b.matrix()).norm() / change + (a.bias() - b.bias()).norm() / b.bias().norm())


def few(n: int, d: int, k: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    z = torch.arange(n) % k
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, d) + 2.0
    return x + torch.randn(k, d, generator=g, dtype=torch.float64)[z] * torch.logspace(-3, 3, d), z


@pytest.mark.parametrize("shrinkage", ["olse", 0.05, 1.0])
@pytest.mark.parametrize(("n", "d"), [(2, 40), (10, 64), (39, 40), (40, 40), (41, 40), (200, 16)])
def test_leace_is_that_of_the_dense_moments(n: int, d: int, shrinkage: Shrinkage) -> None:
    x, z = few(n, d)
    thin, dense = ThinMoments.of(x, z), Moments.of(x, z)
    assert far(solved(thin, shrinkage), solved(dense, shrinkage)) < 1e-9
    assert far(solved(thin, 0.5), solved(dense, shrinkage)) > 1e-3 or (n == 2)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_shrinkage_too(shape: str, k: int) -> None:
    x, z = planted(k, shape)
    thin, dense = ThinMoments.of(x, z), Moments.of(x, z)
    a, b = solved(thin, None), solved(dense, None)
    # On the sample, which is what a singular covariance determines.
    assert torch.allclose(a(x), b(x), atol=1e-7 * float(x.abs().max()))
    assert a.rank == b.rank
    for e in (a, b):
        left = covariances(e(x), one_hot(z))[1].norm() / covariances(x, one_hot(z))[1].norm()
        assert float(left) < 1e-10
    assert solved(thin, "olse").allclose(solved(dense, "olse"))


def test_without_shrinkage_nothing_is_read_outside_the_sample() -> None:
    x, z = few(12, 48)
    scale = x.std(0, correction=0)
    _, _, v = torch.linalg.svd((x - x.mean(0)) / scale)
    unseen = v[11:].T
    reads = solved(ThinMoments.of(x, z), None).right * scale
    assert float((reads @ unseen).norm()) < 1e-9 * float(reads.norm())
    shrunk = solved(ThinMoments.of(x, z), 0.3).right * scale
    assert float((shrunk @ v[:11].T).norm()) > 0.1 * float(shrunk.norm())


def test_a_singular_covariance_is_warned_of_without_shrinkage_only() -> None:
    m = ThinMoments.of(*few(10, 30))
    with pytest.warns(NumericalWarning, match="21 directions hold no variance") as caught:
        leace(m, shrinkage=None)
    assert caught[0].filename == __file__
    leace(m)  # a warning would be an error here


@pytest.mark.parametrize("affine", [True, False])
def test_the_other_solvers_take_it(affine: bool) -> None:
    x, z = few(12, 40, 3)
    thin, dense = ThinMoments.of(x, z), Moments.of(x, z)
    for solver in (mean_difference, random):
        e = solver(thin, affine=affine)
        assert e.allclose(solver(dense, affine=affine))
        assert e.rank == 2
    assert solved(thin, "olse", affine=affine).is_linear != affine


def test_units_of_x_carry_over() -> None:
    x, z = few(12, 40)
    units = torch.logspace(6, -6, 40, dtype=torch.float64)
    for rule in ("olse", "ledoit_wolf", None):
        plain = solved(ThinMoments.of(x, z), rule).matrix()
        scaled = solved(ThinMoments.of(x * units, z), rule).matrix()
        assert torch.allclose(scaled / units[:, None] * units, plain, atol=1e-7, rtol=1e-7)


def test_fields_are_those_of_the_dense_moments() -> None:
    x, z = few(30, 12, 3)
    weight = torch.rand(30, generator=torch.Generator().manual_seed(0))
    thin, dense = ThinMoments.of(x, z, weight=weight), Moments.of(x, z, weight=weight)
    assert thin.n == pytest.approx(dense.n)
    for name in ("mean_x", "mean_z", "m_xz", "m_zz", "var_x", "cov_xz", "cov_zz"):
        assert torch.allclose(getattr(thin, name), getattr(dense, name), rtol=1e-12), name
    assert torch.allclose(thin.dense().m_xx, dense.m_xx, rtol=1e-12)
    y = thin.standardised(torch.ones(12, dtype=torch.float64))
    assert torch.allclose(y.T @ y, dense.cov_xx, rtol=1e-10)
    assert not torch.allclose(thin.var_x, Moments.of(x, z).var_x, rtol=1e-3)
    assert repr(thin.to("cpu")) == repr(thin)


def test_merging_keeps_all_rows_and_narrow_rows_stay_narrow() -> None:
    x, z = few(20, 30)
    a, b = ThinMoments.of(x[:7].half(), z[:7]), ThinMoments.of(x[7:].half(), z[7:])
    both = a + b
    assert both.x.dtype == torch.float16
    assert solved(both, "olse").allclose(solved(ThinMoments.of(x.half(), z), "olse"))
    assert not solved(both, "olse").allclose(solved(a, "olse"), rtol=1e-2)
    with pytest.raises(ShapeError, match=r"d=30.*d=29"):
        a + ThinMoments.of(x[7:, 1:], z[7:])


def same(a: ThinMoments, b: ThinMoments) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("x", "z", "weight", "mean_x", "m_xz"))


def test_minus_takes_a_batch_out_again() -> None:
    x, z = few(20, 30, 3)
    weight = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    a, b = (ThinMoments.of(x[i], z[i], classes=3, weight=weight[i]) for i in (slice(0, 8), slice(8, 20)))
    assert same(a + b - b, a)
    assert same(a + b - a, b)
    # whatever the order and the dtype that the rows came in
    narrow = ThinMoments.of(x[:8].half(), z[:8], classes=3, weight=weight[:8])
    assert same(
        narrow + b - b.to("cpu"), ThinMoments.of(x[:8].half().double(), z[:8], classes=3, weight=weight[:8])
    )
    assert same(b + narrow - narrow, b)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert same(a + b - ThinMoments(b.x[shuffled], b.z[shuffled], b.weight[shuffled]), a)
    nothing = a - a
    assert (nothing.n, nothing.x.shape) == (0.0, (0, 30))
    assert same(nothing + a, a)
    assert nothing.dense().n == 0
    with pytest.raises(NotEnoughDataError, match="got 0 samples"):
        leace(nothing)


def test_minus_counts_repeated_rows_by_their_weight() -> None:
    x, z = few(4, 6)
    once = ThinMoments.of(x, z)
    thrice = once + once + once
    rest = thrice - once
    assert (rest.n, rest.x.shape[0]) == (8.0, 8)
    partly = thrice - ThinMoments.of(x, z, weight=torch.full((4,), 1.5))
    assert partly.n == pytest.approx(6.0)
    assert torch.allclose(partly.dense().m_xx, 1.5 * once.dense().m_xx)
    with pytest.raises(InputError, match=r"row 0 .*less weight"):
        once - ThinMoments.of(x, z, weight=torch.full((4,), 1.5))


def test_minus_refuses_what_was_not_part() -> None:
    x, z = few(20, 30)
    m = ThinMoments.of(x[:10], z[:10])
    for other in (
        ThinMoments.of(x[9:12], z[9:12]),
        ThinMoments.of(x[:1], 1 - z[:1], classes=2),
        ThinMoments.of(x[:2] * (1 + 1e-15), z[:2]),
    ):
        with pytest.raises(InputError, match="not among the 10 rows"):
            m - other
    with pytest.raises(ShapeError, match=r"d=30.*d=29"):
        m - ThinMoments.of(x[:2, 1:], z[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_file_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    x, z = few(9, 20)
    m = ThinMoments.of(x.to(dtype), z, weight=torch.rand(9, generator=torch.Generator().manual_seed(0)))
    path = m.save(tmp_path / "thin", fingerprint="abc")
    loaded = ThinMoments.load(path, fingerprint="abc")
    assert same(loaded, m)
    assert loaded.x.dtype == dtype
    assert not same(loaded, ThinMoments.of(x.to(dtype), z))
    with pytest.raises(OutputExistsError):
        m.save(path)
    with pytest.raises(ModelMismatchError, match="needed abd"):
        ThinMoments.load(path, fingerprint="abd")
    with pytest.raises(FileFormatError, match="holds 'thin moments'; needed 'moments'"):
        Moments.load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        ThinMoments.load(path)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"z": torch.zeros(3, 2).double()}, {"x": torch.zeros(4)}, {"weight": torch.ones(3).double()}],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, tensors: dict) -> None:
    m = ThinMoments.of(*few(4, 6))
    whole = {name: getattr(m, name) for name in ("x", "z", "weight")}

    def write(tensors: dict) -> Path:
        return write_tensors(tmp_path / "f", tensors, kind="thin moments", version=1, header={}, force=True)

    assert same(ThinMoments.load(write(whole)), m)
    with pytest.raises(FileFormatError, match="not a whole thin moments file"):
        ThinMoments.load(write({**whole, **tensors} if tensors else {}))


def test_what_needs_the_matrix_says_to_call_dense() -> None:
    m = ThinMoments.of(*few(6, 8))
    for name in ("m_xx", "cov_xx"):
        with pytest.raises(InputError, match=r"8 x 8 covariance.*dense\(\)"):
            getattr(m, name)


def test_owns_its_rows_and_never_changes() -> None:
    x, z = few(6, 8)
    given = x.clone()
    m = ThinMoments.of(given, z)
    given.zero_()
    assert torch.equal(m.x, x)
    before = m.x.clone()
    for rule in ("olse", "ledoit_wolf", 0.1):
        solved(m, rule)
    assert torch.equal(m.x, before)
    with pytest.raises(FrozenInstanceError):
        m.x = x  # type: ignore[misc]


def test_refuses_bad_input() -> None:
    x, z = few(6, 8)
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        ThinMoments.of(x * math.nan, z)
    with pytest.raises(NotEnoughDataError, match="no sample left"):
        ThinMoments.of(x, z, mask=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="needed z of shape"):
        ThinMoments.of(x, z[:5])
    with pytest.raises(NotEnoughDataError, match="one class"):
        leace(ThinMoments.of(x, z * 0, classes=2))
    with pytest.raises(InputError, match="shrinkage"):
        leace(ThinMoments.of(x, z), shrinkage="oas")  # type: ignore[arg-type]
    centred = x - x.mean(0)
    clean = leace(ThinMoments.of(centred, z))(centred)
    with pytest.warns(NoConceptWarning):
        assert leace(ThinMoments.of(clean, z)).rank == 0


WIDE = """
import resource, torch
from repe_unlearn.solvers import leace
from repe_unlearn.thin_moments import ThinMoments
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
leace(ThinMoments.of(torch.randn(8, 64), torch.arange(8) % 2))  # what is loaded once
x, z = torch.randn({n}, {d}), torch.arange({n}) % 2
before = peak()
e = leace(ThinMoments.of(x, z))
print(peak() - before, e.rank)
"""


def test_memory_grows_with_n_times_d() -> None:
    n, d = 64, 8192  # d² float64 numbers would be 512 MB
    result = subprocess.run(
        [sys.executable, "-c", WIDE.format(n=n, d=d)], capture_output=True, text=True, check=True
    )
    used, rank = result.stdout.split()
    assert rank == "1"
    assert float(used) < 100  # MB; one copy of the rows in float64 is 4
