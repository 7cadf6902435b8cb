"""The batched solve against one solve after the other."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import covariances, one_hot, planted

from repe_unlearn.errors import InputError, NoConceptWarning, NotEnoughDataError, NumericalWarning, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.shrinkage import Shrinkage
from repe_unlearn.solvers import leace, leace_many


def sites(count: int = 5, k: int = 3) -> list[Moments]:
    return [Moments.of(*planted(k, seed=seed)) for seed in range(count)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shrinkage", ["olse", None, 0.3])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gives_what_leace_gives(k: int, shrinkage: Shrinkage, affine: bool) -> None:
    moments = sites(k=k)
    found = leace_many(moments, shrinkage=shrinkage, affine=affine)
    assert len(found) == len(moments)
    for e, m in zip(found, moments, strict=True):
        assert e.allclose(leace(m, shrinkage=shrinkage, affine=affine), rtol=1e-10)
        assert e.is_idempotent
        assert e.is_linear != affine
    assert not found[0].allclose(leace(moments[1], shrinkage=shrinkage, affine=affine), rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gives_the_same_on_a_gpu() -> None:
    moments = sites()
    for e, m in zip(leace_many([m.to("cuda") for m in moments]), moments, strict=True):
        assert e.device.type == "cuda"
        assert e.allclose(leace(m).to("cuda"), rtol=1e-9)


def test_a_singular_one_is_solved_by_itself_and_spoils_no_other() -> None:
    pairs = [planted(2), planted(2, "rank-deficient"), planted(2, "constant coordinate")]
    moments = [Moments.of(x, z) for x, z in pairs]
    with pytest.warns(NumericalWarning, match="singular"):
        found = leace_many(moments, shrinkage=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        for e, m in zip(found, moments, strict=True):
            assert e.allclose(leace(m, shrinkage=None))
    for e, (x, z) in zip(found, pairs, strict=True):
        columns = one_hot(z)
        assert float(covariances(e(x), columns)[1].norm() / covariances(x, columns)[1].norm()) < 1e-10


def test_ranks_may_differ() -> None:
    x, z = planted(5)
    clean = leace(Moments.of(x, z))(x)
    moments = [Moments.of(x, z), Moments.of(clean, z), Moments.of(x, z % 2, classes=5)]
    with pytest.warns(NoConceptWarning):
        found = leace_many(moments)
    assert [e.rank for e in found] == [4, 0, 1]
    assert [e.rank for e in leace_many([moments[0], moments[0]], rtol=0.9)] == [
        leace(moments[0], rtol=0.9).rank
    ] * 2


def test_refuses_moments_that_do_not_go_together() -> None:
    assert leace_many([]) == []
    a, b = sites(2)
    x, z = planted(3)
    for other in (Moments.of(x[:, :5], z), Moments.of(x, z, classes=4)):
        with pytest.raises(ShapeError, match="2 kinds"):
            leace_many([a, other])
    with pytest.raises(NotEnoughDataError, match="one class"):
        leace_many([a, Moments.of(x, z * 0, classes=3)])
    with pytest.raises(InputError, match="ledoit_wolf"):
        leace_many([a, b], shrinkage="ledoit_wolf")
    leace_many([a, b])
