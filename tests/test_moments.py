from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Statistics, one_hot, planted, two_pass
from torch import Tensor

from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NonFiniteError,
    NotEnoughDataError,
    OutputExistsError,
    ShapeError,
)
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.solvers import leace
from repe_unlearn.tensorfile import write_tensors

FIELDS = ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz")


def difference(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """The largest difference of two moments, relative to the size of each field."""
    worst = abs(a.n - b.n)
    for name in FIELDS:
        left, right = torch.as_tensor(getattr(a, name)), torch.as_tensor(getattr(b, name))
        worst = max(worst, float((left - right).abs().max() / (1e-300 + right.abs().max())))
    return worst


def accumulated(x: Tensor, z: Tensor, size: int, classes: int | None = None) -> Moments:
    sums = Accumulator(classes=classes)
    for start in range(0, len(x), size):
        sums.add(x[start : start + size], z[start : start + size])
    return sums.moments()


def merged(x: Tensor, z: Tensor, size: int) -> Moments:
    total = Moments.empty(x.shape[1], z.shape[1])
    for start in range(0, len(x), size):
        total = total + Moments.of(x[start : start + size], z[start : start + size])
    return total


def sample(n: int = 1100, d: int = 6, k: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-3, 3, d) + 5.0
    z = torch.randn(n, k, generator=g, dtype=torch.float64) + x[:, :k] / torch.logspace(-3, 3, d)[:k]
    return x, z


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_equals_the_two_pass_reference(k: int) -> None:
    x, z = planted(k)
    found, wanted = Moments.of(x, z), two_pass(x, one_hot(z))
    assert difference(found, wanted) < 1e-12
    assert difference(Moments.of(x + 1e-3, z), wanted) > 1e-6


@pytest.mark.parametrize("size", [1, 2, 7, 64, 511, 512, 513, 1100])
def test_batch_size_does_not_matter(size: int) -> None:
    x, z = sample()
    wanted = two_pass(x, z)
    assert difference(accumulated(x, z, size), wanted) < 1e-11
    assert difference(merged(x, z, size), wanted) < 1e-11
    assert difference(accumulated(x[1:], z[1:], size), wanted) > 1e-5


@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 99))
def test_merge_is_associative_commutative_and_blind_to_chunks(cuts: list[int], seed: int) -> None:
    x, z = sample(60)
    edges = [0, *sorted(cuts), 60]
    parts = [Moments.of(x[a:b], z[a:b]) if b > a else Moments.empty(6, 3) for a, b in pairwise(edges)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    left, right = Moments.empty(6, 3), Moments.empty(6, 3)
    for i in order:
        left = left + parts[i]
    for part in parts:
        right = part.merge(right)
    assert difference(left, Moments.of(x, z)) < 1e-11
    assert difference(right, left) < 1e-11


def test_minus_undoes_plus() -> None:
    x, z = sample(200)
    a, b = Moments.of(x[:120], z[:120]), Moments.of(x[120:], z[120:])
    assert difference(a + b - b, a) < 1e-10
    assert difference(a + b - a, b) < 1e-10
    assert difference(a + b, a) > 1e-2
    nothing = a - a
    assert nothing.n == 0
    assert difference(nothing + b, b) == 0
    assert difference(nothing - nothing + b, b) == 0
    with pytest.raises(NotEnoughDataError, match="cannot take 120 samples out of 80"):
        b - a


def test_minus_with_fractional_weights_leaves_nothing() -> None:
    x, z = sample(3)
    total = Moments.empty(6, 3)
    for i in range(3):
        total = total + Moments.of(x[i : i + 1], z[i : i + 1], weight=torch.tensor([0.1]).double())
    assert total.n != 0.3  # which is why the rest may not be exactly zero
    rest = total - Moments.of(x, z, weight=torch.tensor([0.1, 0.1, 0.1]).double())
    assert rest.n == 0
    assert torch.equal(rest.mean_x, torch.zeros(6).double())


def test_merge_refuses_other_widths() -> None:
    x, z = sample(20)
    with pytest.raises(ShapeError, match=r"d=6, k=3.*d=5, k=3"):
        Moments.of(x, z) + Moments.of(x[:, :5], z)
    with pytest.raises(ShapeError, match=r"k=3.*k=2"):
        Moments.of(x, z) - Moments.of(x, z[:, :2])


@pytest.mark.parametrize("how", [lambda x, z: Moments.of(x, z), lambda x, z: accumulated(x, z, 64)])
def test_a_large_mean_in_float32_costs_no_accuracy(how: Callable[[Tensor, Tensor], Moments]) -> None:
    g = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(1000, 4, generator=g)).float()
    z = (x[:, :1] > 1e4).long()[:, 0]
    wanted = two_pass(x, one_hot(z))
    assert difference(how(x, z), wanted) < 1e-10
    # What the same sums give in float32 without centring:
    naive = x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))
    assert float((naive - torch.as_tensor(wanted.m_xx)).abs().max() / wanted.m_xx.max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_exactly(dtype: torch.dtype) -> None:
    x, z = planted(2)
    narrow = x.to(dtype)
    for found in (Moments.of(narrow, z), accumulated(narrow, z, 37, classes=2)):
        assert found.m_xx.dtype == torch.float64
        assert difference(found, two_pass(narrow, one_hot(z))) < 1e-12
        assert difference(found, two_pass(x, one_hot(z))) > 1e-9  # not the same numbers before the rounding


def test_leading_dimensions_are_samples() -> None:
    x, z = planted(5)
    flat = Moments.of(x, z)
    assert difference(Moments.of(x.reshape(4, 100, 12), z.reshape(4, 100)), flat) == 0
    assert difference(Moments.of(x.reshape(4, 100, 12), one_hot(z).reshape(4, 100, 5)), flat) == 0
    assert Moments.of(x[0], z[0], classes=5).n == 1


def test_labels_may_be_ids_bools_reals_or_columns() -> None:
    x, z = planted(2)
    ids = Moments.of(x, z)
    assert difference(Moments.of(x, z.bool()), ids) == 0
    assert difference(Moments.of(x, one_hot(z)), ids) == 0
    assert difference(Moments.of(x, one_hot(z).long()), ids) == 0
    assert Moments.of(x, z.double()).k == 1
    assert Moments.of(x, z, classes=4).k == 4


def test_weights_count_rows() -> None:
    x, z = planted(2)
    counts = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(0))
    repeated = Moments.of(x.repeat_interleave(counts, 0), z.repeat_interleave(counts, 0))
    weighted = Moments.of(x, z, weight=counts)
    assert difference(weighted, repeated) < 1e-12
    assert difference(weighted, two_pass(x, one_hot(z), counts)) < 1e-12
    assert difference(weighted, Moments.of(x, z)) > 1e-4


@pytest.mark.parametrize("size", [1, 100, 700])
def test_weights_are_streamed_too(size: int) -> None:
    x, z = sample()
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[::7] = 0.0
    sums = Accumulator()
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        # Every third batch without weights: they are 1 there.
        sums.add(x[part], z[part], None if start // size % 3 == 2 else weight[part])
    whole = torch.where(torch.arange(len(x)) // size % 3 == 2, 1.0, weight)
    assert difference(sums.moments(), Moments.of(x, z, weight=whole)) < 1e-12
    assert difference(sums.moments(), Moments.of(x, z)) > 1e-4


def test_a_float32_product_takes_weights() -> None:
    x, z = sample()
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = Accumulator(product=torch.float32)
    sums.add(x, z, weight)
    assert 1e-12 < difference(sums.moments(), Moments.of(x, z, weight=weight)) < 1e-5


def test_a_row_of_weight_zero_is_not_there_whatever_it_holds() -> None:
    x, z = sample(20)
    wanted = Moments.of(x, z)
    x, z = torch.cat([x, torch.full((1, 6), math.nan)]), torch.cat([z, torch.full((1, 3), math.inf)])
    weight = torch.ones(21)
    weight[20] = 0
    sums = Accumulator()
    sums.add(x, z, weight)
    assert difference(sums.moments(), wanted) < 1e-12
    assert difference(Moments.of(x, z, weight=weight), wanted) < 1e-12
    with pytest.raises(NonFiniteError):
        sums.add(x, z, torch.ones(21))
    assert sums.moments().n == 20
    sums.add(x, z, torch.zeros(21))
    assert sums.moments().n == 20


def test_normalised_weights_are_refused_with_the_remedy() -> None:
    x, _ = sample(50)
    z = torch.arange(50) % 2
    share = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share /= share.sum()
    with pytest.raises(NotEnoughDataError, match="multiply weights that sum to 1 by the number of rows"):
        leace(Moments.of(x, z, weight=share))
    assert leace(Moments.of(x, z, weight=50 * share)).rank == 1


def test_masked_rows_do_not_count_whatever_they_hold() -> None:
    x, z = planted(2)
    keep = torch.arange(len(x)) % 3 > 0
    wanted = Moments.of(x[keep], z[keep])
    x[~keep], z[~keep] = math.nan, -100
    assert difference(Moments.of(x, z, mask=keep), wanted) == 0
    assert difference(Moments.of(x, z, mask=keep, weight=torch.ones(len(x))), wanted) == 0
    with pytest.raises(InputError):
        Moments.of(x, z)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.full((6, 3), math.nan)}, NonFiniteError, "x holds NaN .* 6 of 6 rows"),
        ({"x": torch.full((6, 3), math.inf)}, NonFiniteError, "x holds"),
        ({"z": torch.full((6,), math.nan)}, NonFiniteError, "z holds"),
        ({"weight": torch.full((6,), math.nan)}, NonFiniteError, "weight holds"),
        ({"weight": -torch.ones(6)}, InputError, "negative sample weight"),
        ({"weight": torch.zeros(6)}, NotEnoughDataError, "no sample left"),
        ({"mask": torch.zeros(6, dtype=torch.bool)}, NotEnoughDataError, "no sample left"),
        ({"weight": torch.ones(5)}, ShapeError, "weight"),
        ({"mask": torch.ones(6, 1)}, ShapeError, "mask"),
        ({"z": torch.zeros(5, dtype=torch.int64)}, ShapeError, "needed z of shape"),
        ({"x": torch.ones(6, 3, dtype=torch.int64)}, ShapeError, "floating-point"),
        ({"z": torch.tensor([0, 1, 0, 1, 0, -1])}, InputError, "class ids from -1 to 1"),
        ({"classes": 1}, InputError, "needed 0 <= id < 1"),
        ({"x": torch.zeros(0, 3), "z": torch.zeros(0)}, NotEnoughDataError, "no sample left"),
        ({"x": torch.zeros(0, 3), "z": torch.zeros(0).long()}, NotEnoughDataError, "no sample left"),
    ],
)
def test_refuses_bad_input(change: dict, error: type[Exception], match: str) -> None:
    good: dict[str, Any] = {"x": torch.randn(6, 3), "z": torch.tensor([0, 1, 0, 1, 0, 1])}
    assert Moments.of(**good).n == 6
    with pytest.raises(error, match=match):
        Moments.of(**{**good, **change})


def test_accumulator_survives_a_refused_batch() -> None:
    x, z = sample(40)
    sums = Accumulator()
    sums.add(x[:20], z[:20])
    for bad_x, bad_z in ((x[:, :5], z), (x, z[:, :2]), (x * math.nan, z)):
        with pytest.raises(InputError):
            sums.add(bad_x, bad_z)
    sums.add(x[20:], z[20:])
    assert difference(sums.moments(), Moments.of(x, z)) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_spans_blocks_is_refused_as_a_whole(bad: float) -> None:
    x, z = sample(1500)
    sums = Accumulator()
    sums.add(x[:300], z[:300])
    broken = x[300:].clone()
    broken[-1, 2] = bad  # behind two full blocks
    with pytest.raises(NonFiniteError, match=r"x holds .* 1 of 1200 rows; nothing was added"):
        sums.add(broken, z[300:])
    assert difference(sums.moments(), Moments.of(x[:300], z[:300])) < 1e-12
    sums.add(x[300:], z[300:])
    assert difference(sums.moments(), Moments.of(x, z)) < 1e-11


def test_large_finite_half_precision_is_not_taken_for_infinite() -> None:
    x, z = torch.full((700, 4), 60000.0, dtype=torch.float16), torch.arange(700) % 2
    x[::2] *= -1  # their sum would overflow
    assert difference(accumulated(x, z, 700), Moments.of(x, z)) < 1e-12


def test_a_first_block_of_outliers_costs_no_accuracy() -> None:
    # Attention sinks come first in a prompt, 1000 times the rest; the reference must not be one of them.
    x, z = sample(1200)
    x[0] *= 1e4
    assert difference(accumulated(x, z, 1), two_pass(x, z)) < 1e-11


@pytest.mark.parametrize("size", [7, 600])
def test_a_float32_product_is_good_to_single_precision(size: int) -> None:
    x, z = sample()
    sums = Accumulator(product=torch.float32)
    for start in range(0, len(x), size):
        sums.add(x[start : start + size], z[start : start + size])
    found, wanted = sums.moments(), Moments.of(x, z)
    assert found.m_xx.dtype == torch.float64
    scale = wanted.m_xx.diagonal().sqrt()
    error = float(((found.m_xx - wanted.m_xx) / scale[:, None] / scale).abs().max())
    assert 1e-12 < error < 1e-6  # not the float64 product, and good in every coordinate's own unit
    assert torch.allclose(found.mean_x, wanted.mean_x, rtol=1e-7)
    with pytest.raises(InputError, match=r"product=torch\.float16"):
        Accumulator(product=torch.float16)


def test_var_x_is_the_diagonal_of_the_covariance() -> None:
    m = Moments.of(*sample())
    assert torch.equal(m.var_x, m.cov_xx.diagonal())


def test_accumulator_needs_the_number_of_classes_where_a_batch_may_lack_one() -> None:
    x, z = planted(2)
    ordered = z.argsort()
    sums = Accumulator()
    sums.add(x[ordered][:50], z[ordered][:50])
    with pytest.raises(ShapeError, match="Give classes="):
        sums.add(x, z)
    assert difference(accumulated(x[ordered], z[ordered], 50, classes=2), Moments.of(x, z)) < 1e-11


def test_accumulator_without_rows_says_so() -> None:
    sums = Accumulator()
    with pytest.raises(NotEnoughDataError, match="no activation"):
        sums.moments()
    sums.add(torch.zeros(0, 3), torch.zeros(0, 2))
    with pytest.raises(NotEnoughDataError, match="no activation"):
        sums.moments()


@pytest.mark.parametrize("size", [8, 600])  # less and more than what is gathered before a product
def test_nothing_shares_memory_with_what_came_in(size: int) -> None:
    # In concept-erasure the eraser's bias *is* the running mean, so an eraser changes when more data arrives.
    x, z = sample(size)
    wanted, given_x, given_z = Moments.of(x, z), x.clone(), z.clone()
    sums = Accumulator()
    sums.add(given_x, given_z)
    direct = Moments.of(given_x, given_z)
    given_x.zero_()
    given_z.zero_()
    early = sums.moments()
    assert difference(direct, wanted) == 0
    assert difference(early, wanted) < 1e-12
    eraser = leace(early)
    before = eraser(x)
    sums.add(x + 7, z * 2)
    later = sums.moments()
    assert difference(early, wanted) < 1e-12
    assert torch.equal(eraser(x), before)
    assert difference(later, early) > 1e-3


def test_merging_leaves_the_terms_alone() -> None:
    x, z = sample(40)
    a, b = Moments.of(x[:20], z[:20]), Moments.of(x[20:], z[20:])
    kept = Moments.of(x[:20], z[:20])
    total = a + b
    total.m_xx.zero_()
    assert difference(a, kept) == 0
    same = a + Moments.empty(6, 3)
    same.m_xx.zero_()
    assert difference(a, kept) == 0
    with pytest.raises(FrozenInstanceError):
        a.n = 3.0  # type: ignore[misc]


def test_covariances_and_class_means() -> None:
    x, z = planted(2)
    m = Moments.of(x, z, classes=3)
    assert torch.allclose(m.cov_xx, torch.cov(x.T, correction=0))
    assert torch.allclose(m.cov_xz * m.n, m.m_xz)
    assert torch.allclose(m.cov_zz.diagonal()[:2], m.mean_z[:2] * (1 - m.mean_z[:2]))
    means = m.class_means()
    for c in (0, 1):
        assert torch.allclose(means[c], x[z == c].mean(0))
    assert not torch.allclose(means[0], means[1])
    assert means[2].isnan().all()


def test_file_round_trip(tmp_path: Path) -> None:
    m = Moments.of(*sample(50))
    path = m.save(tmp_path / "a" / "m.safetensors")
    loaded = Moments.load(path)
    assert difference(loaded, m) == 0
    assert repr(loaded) == "Moments(n=50, d=6, k=3)"
    with pytest.raises(OutputExistsError):
        m.save(path)
    (m + m).save(path, force=True)
    assert Moments.load(path).n == 100


def test_a_file_may_say_which_model_it_is_of(tmp_path: Path) -> None:
    m = Moments.of(*sample(20))
    named, nameless = m.save(tmp_path / "named", fingerprint="abc"), m.save(tmp_path / "nameless")
    for wanted in (None, "abc"):
        assert difference(Moments.load(named, fingerprint=wanted), m) == 0
    assert difference(Moments.load(nameless), m) == 0
    with pytest.raises(ModelMismatchError, match=r"fingerprint abc; needed abd.*capture"):
        Moments.load(named, fingerprint="abd")
    with pytest.raises(ModelMismatchError, match="fingerprint None; needed abc"):
        Moments.load(nameless, fingerprint="abc")


def test_a_file_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    parts = {"mean_x": torch.zeros(2)}
    path = write_tensors(tmp_path / "m", parts, kind="moments", version=1, header={"n": 3.0}, force=False)
    with pytest.raises(FileFormatError, match="mean_z"):
        Moments.load(path)
    with pytest.raises(FileFormatError, match="not a file"):
        Moments.load(tmp_path / "absent")
