"""Oracle erasure: zero covariance with z whatever the prior of a class, at less change than without labels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from concept_erasure import OracleFitter
from reference import SHAPES, covariances, one_hot, planted
from torch import Tensor

from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    NonFiniteError,
    NotEnoughDataError,
    OutputExistsError,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import OracleEraser, leace, oracle
from repe_unlearn.tensorfile import write_tensors
from repe_unlearn.thin_moments import ThinMoments


def left_over(y: Tensor, x: Tensor, z: Tensor) -> float:
    """Covariance of y with z as a share of that of x."""
    return float(covariances(y, one_hot(z))[1].norm() / covariances(x, one_hot(z))[1].norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_leaves_no_covariance_at_less_change_than_leace(k: int, shape: str) -> None:
    x, z = planted(k, shape)
    m = Moments.of(x, z)
    y = oracle(m)(x, z)
    assert left_over(y, x, z) <= 1e-10
    assert left_over(oracle(m)(x, z.roll(1)), x, z) > 1e-2  # labels of others do not help
    assert torch.allclose(y.mean(0), x.mean(0))
    blind = leace(m, shrinkage=0.1)(x)
    assert float((y - x).norm()) < float((blind - x).norm())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_is_the_residual_of_least_squares(k: int) -> None:
    x, z = planted(k)
    design = torch.cat([torch.ones(len(x), 1).double(), one_hot(z)], 1)
    fitted = design @ torch.linalg.pinv(design) @ x
    assert torch.allclose(oracle(Moments.of(x, z))(x, z), x - fitted + x.mean(0), atol=1e-9)


def rare() -> tuple[Tensor, Tensor]:
    """Three classes, the last with a prior of 0.1 % and a mean far away."""
    g = torch.Generator().manual_seed(0)
    z = torch.arange(4000) % 2
    z[:4] = 2
    x = torch.randn(4000, 8, generator=g, dtype=torch.float64)
    x[:, 0] += 3 * (z == 2)
    return x, z


def test_a_class_of_one_in_a_thousand_is_erased() -> None:
    x, z = rare()
    means = lambda y: torch.stack([y[z == c].mean(0) for c in range(3)])  # noqa: E731
    assert float((means(x)[2] - means(x)[0]).norm()) > 2
    after = means(oracle(Moments.of(x, z))(x, z))
    assert float((after - after[0]).abs().max()) <= 1e-12
    theirs = OracleFitter.fit(x, one_hot(z)).eraser(x, one_hot(z))
    assert (
        float((means(theirs)[2] - means(theirs)[0]).norm()) > 2
    )  # concept-erasure 0.2.4: absolute tolerance


def test_equals_concept_erasure_for_large_classes() -> None:
    x, z = planted(2)
    theirs = OracleFitter.fit(x, one_hot(z), svd_tol=1e-10).eraser(x, one_hot(z))
    assert torch.allclose(oracle(Moments.of(x, z))(x, z), theirs, atol=1e-9)


def test_units_do_not_matter() -> None:
    x, _ = planted(1)
    g = torch.Generator().manual_seed(1)
    z = torch.randn(len(x), 3, generator=g, dtype=torch.float64)
    units, scale = (
        torch.logspace(-9, 9, 3, dtype=torch.float64),
        torch.logspace(-6, 6, 12, dtype=torch.float64),
    )
    plain = oracle(Moments.of(x, z))(x, z)
    scaled = oracle(Moments.of(x * scale, z * units))(x * scale, z * units)
    assert torch.allclose(scaled / scale, plain, atol=1e-9)
    assert not torch.allclose(oracle(Moments.of(x, z[:, :2]))(x, z[:, :2]), plain, atol=1e-3)


def test_shapes_dtypes_and_forms_of_labels() -> None:
    x, z = planted(5)
    e = oracle(Moments.of(x, z))
    y = e(x, z)
    assert torch.allclose(e(x.reshape(20, 20, 12), z.reshape(20, 20)), y.reshape(20, 20, 12))
    assert torch.allclose(e(x, one_hot(z)), y)
    assert torch.allclose(e(x, one_hot(z).long()), y)
    assert torch.allclose(e(x[0], z[0]), y[0])
    half = e(x.bfloat16(), z)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), y, atol=0.2)
    assert e.to(dtype=torch.float32).coef.dtype == torch.float32
    real = oracle(Moments.of(x, z.double()))
    assert torch.allclose(real(x, z.double()), real(x, z.double()[:, None]))
    assert repr(e) == "OracleEraser(d=12, k=5, float64)"


def test_thin_moments_do_as_well() -> None:
    x, z = planted(5, "n<d")
    thin, full = oracle(ThinMoments.of(x, z)), oracle(Moments.of(x, z))
    assert torch.allclose(thin(x, z), full(x, z))
    assert left_over(thin(x, z), x, z) <= 1e-10


def test_refuses_labels_that_do_not_fit() -> None:
    x, z = planted(2)
    e = oracle(Moments.of(x, z, classes=4))
    assert torch.allclose(e(x, z), oracle(Moments.of(x, z))(x, z))
    with pytest.raises(InputError, match="class 3, of which the fit saw none"):
        e(x, torch.full_like(z, 3))
    with pytest.raises(InputError, match="from 0 to 7"):
        e(x, z * 7)
    with pytest.raises(InputError, match="from -1"):
        e(x, z - 1)
    with pytest.raises(ShapeError, match="needed integer class ids"):
        e(x, z.double())
    with pytest.raises(ShapeError):
        e(x, z[:-1])
    with pytest.raises(ShapeError, match=r"\[\.\.\., 12\]"):
        e(x[:, 1:], z)
    with pytest.raises(NonFiniteError, match="z holds NaN"):
        e(x, torch.full((len(x), 4), math.nan))
    real = oracle(Moments.of(x, z.double()))
    with pytest.raises(ShapeError, match="no classes"):
        real(x, z)


def test_refuses_what_cannot_be_solved() -> None:
    x, z = planted(2)
    with pytest.raises(NotEnoughDataError, match="one class"):
        oracle(Moments.of(x, torch.zeros_like(z), classes=2))
    with pytest.raises(ShapeError, match="needed \\[d, k\\] and \\[k\\]"):
        OracleEraser(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ShapeError, match="one dtype"):
        OracleEraser(torch.zeros(3, 2), torch.zeros(2).double())
    with pytest.raises(NonFiniteError, match="coef"):
        OracleEraser(torch.full((3, 2), math.inf), torch.zeros(2))


def test_later_changes_of_the_callers_tensors_do_not_matter() -> None:
    coef, mean = torch.ones(3, 2), torch.zeros(2)
    e = OracleEraser(coef, mean)
    before = e(torch.ones(3), torch.ones(2))
    coef.zero_()
    mean.fill_(9.0)
    assert torch.equal(e(torch.ones(3), torch.ones(2)), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_file_round_trip_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    x, z = planted(3)
    e = oracle(Moments.of(x, z)).to(dtype=dtype)
    path = e.save(tmp_path / "oracle")
    loaded = OracleEraser.load(path)
    assert torch.equal(loaded.coef, e.coef)
    assert torch.equal(loaded(x, z), e(x, z))
    assert not torch.equal(loaded(x, z), e(x, z.roll(1)))
    with pytest.raises(OutputExistsError):
        e.save(path)


def test_files_that_are_no_oracle_eraser_are_refused(tmp_path: Path) -> None:
    x, z = planted(3)
    path = oracle(Moments.of(x, z)).save(tmp_path / "f")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        OracleEraser.load(path)
    Moments.of(x, z).save(path, force=True)
    with pytest.raises(FileFormatError, match="holds 'moments'; needed 'oracle eraser'"):
        OracleEraser.load(path)
    for tensors in ({"coef": torch.ones(3, 2)}, {"coef": torch.ones(3, 2), "mean_z": torch.ones(3)}):
        write_tensors(path, tensors, kind="oracle eraser", version=1, header={}, force=True)
        with pytest.raises(FileFormatError, match="not a whole oracle eraser"):
            OracleEraser.load(path)
