from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import planted
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NonFiniteError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import leace, mean_difference


def projector(seed: int, d: int = 8, r: int = 2, *, orthogonal: bool = False, linear: bool = False) -> Eraser:
    """A random idempotent eraser with ``right @ left = I``."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(d, r, generator=g, dtype=torch.float64) for _ in range(2))
    if orthogonal:
        left = right = torch.linalg.qr(left)[0]
    shift = torch.randn(d, generator=g, dtype=torch.float64)
    return Eraser(left @ torch.linalg.inv(right.T @ left), right.T, shift * (not linear))


def rows(n: int = 20, d: int = 8, seed: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_affine_map_of_its_formula() -> None:
    e, x = projector(0), rows()
    assert torch.allclose(e(x), x - (x - e.shift) @ e.right.T @ e.left.T)
    assert torch.allclose(e(x), x @ e.matrix().T + e.bias())
    assert torch.allclose(e(e.shift), e.shift)
    assert (e.dim, e.rank, e.dtype, str(e.device)) == (8, 2, torch.float64, "cpu")
    assert not torch.allclose(e(x), x)


def test_keeps_shape_and_dtype() -> None:
    e, x = projector(0), rows()
    assert e(x[0]).shape == (8,)
    assert torch.allclose(e(x.reshape(4, 5, 8)).reshape(20, 8), e(x))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert e(x.to(dtype)).dtype == dtype
        assert torch.equal(e(x.to(dtype)), e(x.to(dtype).double()).to(dtype))  # one cast, at the end
    low = e.to(dtype=torch.bfloat16)
    assert torch.allclose(low(x.bfloat16()), low.to(dtype=torch.float32)(x.bfloat16().float()).bfloat16())
    assert e(x[:0]).shape == (0, 8)


def test_what_it_reads_becomes_constant() -> None:
    e, x = projector(0), rows()
    assert torch.allclose(e(x) @ e.right.T, (e.right @ e.shift).expand(20, 2))
    assert float((x @ e.right.T).std(0).min()) > 0.1


def test_idempotent_or_not() -> None:
    e, x = projector(0), rows()
    assert e.is_idempotent
    assert torch.allclose(e(e(x)), e(x))
    for other in (e.partial(0.9), replace(e, left=e.left * (1 + 1e-6))):
        assert not other.is_idempotent
        assert not torch.allclose(other(other(x)), other(x), atol=1e-12)


def test_flags_do_not_depend_on_units() -> None:
    units = torch.logspace(-6, 6, 8, dtype=torch.float64)
    e = projector(0)
    scaled = Eraser(units[:, None] * e.left, e.right / units, e.shift * units)
    assert scaled.is_idempotent
    assert not scaled.partial(0.9).is_idempotent
    assert scaled.to(dtype=torch.float32).is_idempotent
    assert not scaled.to(dtype=torch.float32).partial(0.9).is_idempotent


def test_orthogonal_or_not() -> None:
    assert projector(0, orthogonal=True).is_orthogonal
    assert not projector(0).is_orthogonal
    assert not projector(0, orthogonal=True).partial(0.5).is_orthogonal  # symmetric, but no projection
    x, z = planted(5)
    m = Moments.of(x, z)
    assert mean_difference(m).is_orthogonal
    assert not leace(m).is_orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flags_survive_a_cast(dtype: torch.dtype) -> None:
    oblique, straight = projector(0).to(dtype=dtype), projector(0, orthogonal=True).to(dtype=dtype)
    assert oblique.is_idempotent
    assert straight.is_orthogonal
    assert not oblique.is_orthogonal
    assert not oblique.partial(0.5).is_idempotent


def test_linear_or_not() -> None:
    e = projector(0)
    assert not e.is_linear
    assert float(e(torch.zeros(8).double()).norm()) > 0
    for linear in (projector(0, linear=True), e.partial(0.0)):
        assert linear.is_linear
        assert torch.equal(linear(torch.zeros(8).double()), torch.zeros(8).double())


@given(alpha=st.floats(-2, 2))
def test_partial_goes_part_of_the_way(alpha: float) -> None:
    e, x = projector(0), rows()
    assert torch.allclose(e.partial(alpha)(x), x + alpha * (e(x) - x))


def test_partial_at_its_ends() -> None:
    e, x = projector(0), rows()
    assert torch.equal(e.partial(0.0)(x), x)
    assert e.partial(1.0).allclose(e)
    assert not e.partial(0.999).allclose(e)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="alpha"):
            e.partial(bad)


@given(seeds=st.tuples(st.integers(0, 50), st.integers(51, 99)), ranks=st.tuples(*[st.integers(0, 3)] * 2))
def test_compose_is_function_composition(seeds: tuple[int, int], ranks: tuple[int, int]) -> None:
    a, b = (projector(seed, r=rank) for seed, rank in zip(seeds, ranks, strict=True))
    x = rows()
    joint = a.compose(b)
    assert joint.rank <= a.rank + b.rank
    assert torch.allclose(joint(x), a(b(x)), atol=1e-7)
    if a.rank and b.rank:
        assert not torch.allclose(joint(x), b(a(x)), atol=1e-3)


def test_compose_with_itself_and_with_another_shift() -> None:
    a, x = projector(0), rows()
    moved = replace(a, shift=a.shift + rows(1)[0])
    assert torch.allclose(a.compose(a)(x), a(x))
    assert torch.allclose(a.compose(moved)(x), a(moved(x)))
    assert torch.allclose(moved.compose(a)(x), moved(x))  # the last shift wins
    assert not torch.allclose(moved.compose(a)(x), a(x), atol=1e-3)
    assert torch.allclose(a.partial(0.5).compose(a)(x), a(x))
    assert torch.allclose(a.partial(0.5).compose(moved)(x), a.partial(0.5)(moved(x)))


def test_compose_of_linear_erasers_is_linear() -> None:
    a, b = projector(0, linear=True), projector(1, linear=True)
    assert a.compose(b).is_linear
    assert not a.compose(projector(1)).is_linear


def test_compose_refuses_what_is_no_eraser() -> None:
    # Both set the first coordinate, to 5 and to 7, and the second one drags the second coordinate along: that moves
    # every point by a constant, and x - (x - shift) rightᵀ leftᵀ cannot.
    read = torch.tensor([[1.0, 0.0, 0.0]]).double()
    b = Eraser(torch.tensor([[1.0], [0.0], [0.0]]).double(), read, torch.tensor([5.0, 0.0, 0.0]).double())
    a = Eraser(torch.tensor([[1.0], [1.0], [0.0]]).double(), read, torch.tensor([7.0, 0.0, 0.0]).double())
    with pytest.raises(InputError, match="no fixed point"):
        a.compose(b)
    agreeing = replace(a, shift=b.shift)
    x = rows(d=3)
    assert torch.allclose(agreeing.compose(b)(x), agreeing(b(x)))


def test_compose_across_units_and_dtypes() -> None:
    units = torch.logspace(-3, 3, 8, dtype=torch.float64)
    a, b = (
        Eraser(units[:, None] * e.left, e.right / units, e.shift * units)
        for e in (projector(0), projector(1))
    )
    x = rows() * units
    assert torch.allclose(a.compose(b)(x) / units, a(b(x)) / units, atol=1e-6)
    low = projector(0).to(dtype=torch.bfloat16).compose(projector(1).to(dtype=torch.float32))
    assert low.dtype == torch.float32
    assert projector(0).to(dtype=torch.bfloat16).compose(projector(1).to(dtype=torch.bfloat16)).rank == 4


def test_to_changes_the_dtype_and_nothing_else() -> None:
    e, x = projector(0), rows()
    low = e.to(dtype=torch.float32)
    assert low.dtype == torch.float32
    assert low.allclose(e, rtol=1e-5)
    assert not low.allclose(e, rtol=1e-12)
    assert e.to("cpu").allclose(e)
    assert torch.allclose(low(x), e(x), atol=1e-5)
    assert e.dtype == torch.float64
    with pytest.raises(ShapeError):
        e.to(dtype=torch.int64)


def test_allclose_compares_maps_not_factors() -> None:
    e = projector(0)
    turn = torch.linalg.qr(rows(2, 2))[0]
    assert Eraser(e.left @ turn, turn.T @ e.right, e.shift).allclose(e)
    along = e.shift + torch.linalg.svd(e.right).Vh[-1]  # a shift along what is not read is the same map
    assert replace(e, shift=along).allclose(e)
    assert not replace(e, shift=e.shift + e.left[:, 0]).allclose(e)
    assert not replace(e, left=e.left * 1.001).allclose(e)
    assert not e.allclose(projector(0, d=9))


def test_rank_zero_is_the_identity() -> None:
    empty = Eraser(torch.zeros(8, 0).double(), torch.zeros(0, 8).double(), torch.ones(8).double())
    x, e = rows(), projector(0)
    assert torch.equal(empty(x), x)
    assert empty.rank == 0
    assert empty.is_linear
    assert empty.is_idempotent
    assert empty.is_orthogonal
    assert torch.equal(empty.matrix(), torch.eye(8).double())
    assert torch.allclose(empty.compose(e)(x), e(x))
    assert torch.allclose(e.compose(empty)(x), e(x))
    assert empty.compose(empty).rank == 0
    assert empty.allclose(empty.partial(0.3))
    assert not empty.allclose(e)


def test_refuses_other_widths_and_integers() -> None:
    e = projector(0)
    for x in (torch.zeros(4, 7), torch.tensor(1.0), torch.zeros(8, 4), torch.zeros(4, 8, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"needs floating-point \[\.\.\., 8\]"):
            e(x)
    with pytest.raises(ShapeError, match="8 and 9"):
        e.compose(projector(0, d=9))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"left": torch.zeros(8, 3).double()}, ShapeError, r"needed \[d, r\], \[r, d\] and \[d\]"),
        ({"left": torch.zeros(8).double()}, ShapeError, "needed"),
        ({"right": torch.zeros(8, 2).double()}, ShapeError, "needed"),
        ({"shift": torch.zeros(8, 1).double()}, ShapeError, "needed"),
        ({"shift": torch.zeros(8, dtype=torch.int64)}, ShapeError, "floating-point"),
        ({"shift": [0.0] * 8}, ShapeError, "list"),
        ({"shift": torch.zeros(8)}, ShapeError, "one dtype"),
        ({"right": torch.full((2, 8), math.nan).double()}, NonFiniteError, "Eraser.right"),
        ({"shift": torch.full((8,), math.inf).double()}, NonFiniteError, "Eraser.shift"),
    ],
)
def test_refuses_unusable_tensors(change: dict, error: type[Exception], match: str) -> None:
    e = projector(0)
    good = {"left": e.left, "right": e.right, "shift": e.shift}
    assert Eraser(**good).rank == 2
    with pytest.raises(error, match=match):
        Eraser(**{**good, **change})


def test_is_frozen_and_owns_its_tensors() -> None:
    left, right, shift = torch.ones(4, 1, requires_grad=True), torch.ones(1, 4) / 4, torch.ones(4)
    e = Eraser(left, right, shift)
    x = torch.arange(4.0)
    before = e(x)
    right.zero_()
    shift.fill_(9.0)
    assert torch.equal(e(x), before)
    assert not e.left.requires_grad
    with pytest.raises(FrozenInstanceError):
        e.shift = torch.zeros(4)  # type: ignore[misc]
    assert not torch.equal(Eraser(left, right, shift)(x), before)


def test_repr_says_what_it_is() -> None:
    assert repr(projector(0)) == "Eraser(d=8, rank=2, oblique, affine, float64)"
    plain = projector(0, orthogonal=True, linear=True).to(dtype=torch.float32)
    assert repr(plain) == "Eraser(d=8, rank=2, orthogonal, linear, float32)"
    assert "partial" in repr(projector(0).partial(0.5))
