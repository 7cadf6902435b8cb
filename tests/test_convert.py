from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser, LeaceFitter
from reference import one_hot, planted

from repe_unlearn.convert import from_concept_erasure, to_concept_erasure
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NonFiniteError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, mean_difference, random


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("solver", [leace, mean_difference, random, partial(leace, affine=False)])
def test_there_and_back_is_the_same_map(solver: partial, k: int) -> None:
    x, z = planted(k)
    ours = solver(Moments.of(x, z))
    theirs = to_concept_erasure(ours)
    assert torch.allclose(theirs(x), ours(x), atol=1e-10)
    assert torch.equal(theirs.P, ours.matrix())
    back = from_concept_erasure(theirs)
    assert all(torch.equal(getattr(back, name), getattr(ours, name)) for name in ("left", "right", "shift"))
    assert not torch.allclose(theirs(x), ours.partial(0.9)(x), atol=1e-2)  # control: equality is not for free


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"method": "orth"}, {"shrinkage": False}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_theirs_becomes_ours(options: dict, dtype: torch.dtype, k: int) -> None:
    x, z = planted(k)
    x = x.to(dtype)
    theirs = LeaceEraser.fit(x, one_hot(z).to(dtype), **options)
    ours = from_concept_erasure(theirs)
    size = float(x.abs().max())
    assert ours.dtype == dtype
    assert torch.allclose(ours(x), theirs(x), atol=100 * torch.finfo(dtype).eps * size)
    assert ours.rank == int(theirs.proj_left.any(0).sum()) <= max(1, k - 1)  # their tolerance cut the others
    assert ours.is_linear == (options.get("affine") is False)


def test_the_identity_goes_both_ways() -> None:
    x, z = planted(2)
    theirs = LeaceEraser.fit(x, 1e-9 * one_hot(z))  # below their absolute tolerance
    assert theirs.proj_left.shape == (12, 2)
    ours = from_concept_erasure(theirs)
    assert ours.rank == 0
    assert torch.equal(to_concept_erasure(ours)(x), x)


def test_no_memory_is_shared() -> None:
    x, z = planted(2)
    fitter = LeaceFitter.fit(x, one_hot(z))
    ours = from_concept_erasure(fitter.eraser)
    shift = ours.shift.clone()
    fitter.update(x + 100, one_hot(z))
    assert not torch.equal(fitter.mean_x, shift)  # control: the fitter did move
    assert torch.equal(ours.shift, shift)
    theirs = to_concept_erasure(ours)
    for name in ("proj_left", "proj_right", "bias"):
        getattr(theirs, name).add_(1.0)
    assert torch.equal(ours.shift, shift)
    assert torch.equal(ours.left, from_concept_erasure(to_concept_erasure(ours)).left)


def test_mixed_dtypes_meet_in_the_wider() -> None:
    x, z = planted(2)
    theirs = LeaceEraser.fit(x.float(), one_hot(z).float())
    assert theirs.bias is not None
    ours = from_concept_erasure(replace(theirs, bias=theirs.bias.double()))
    assert ours.dtype == torch.float64


def test_what_is_refused() -> None:
    x, z = planted(2)
    fitter = LeaceFitter.fit(x, one_hot(z))
    with pytest.raises(InputError, match=r"got LeaceFitter.*fitter\.eraser"):
        from_concept_erasure(fitter)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got LeaceEraser; needed a repe_unlearn Eraser"):
        to_concept_erasure(fitter.eraser)  # type: ignore[arg-type]
    good = fitter.eraser
    with pytest.raises(ShapeError, match="needed"):
        from_concept_erasure(replace(good, proj_right=good.proj_right[:, 1:]))
    with pytest.raises(ShapeError, match="floating-point"):
        from_concept_erasure(replace(good, proj_left=good.proj_left.to(torch.complex128), bias=None))
    with pytest.raises(NonFiniteError):
        from_concept_erasure(replace(good, proj_left=good.proj_left * np.nan))
    assert isinstance(from_concept_erasure(good), Eraser)
