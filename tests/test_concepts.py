"""Several concepts with missing labels, against the statistics of the labelled rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from reference import covariances
from torch import Tensor

from repe_unlearn.concepts import Concepts
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.solvers import leace, mean_difference
from repe_unlearn.thin_moments import ThinMoments

D = 10
CONCEPTS = Concepts((3, None, 2))


def sample(n: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, D] with traces of a class, a real and a second class; a third of the labels of each is missing."""
    g = torch.Generator().manual_seed(2)
    a = torch.randint(3, (n,), generator=g)
    b = torch.randn(n, generator=g, dtype=torch.float64) * 2 + 20
    c = (b + torch.randn(n, generator=g) > 20).long()
    mix = torch.randn(3, D, generator=g, dtype=torch.float64)
    x = (
        torch.randn(n, D, generator=g, dtype=torch.float64)
        + mix[a]
        + b[:, None] * mix[0]
        + c[:, None] * mix[2]
    )
    gone = torch.rand(3, n, generator=g) < torch.tensor([[0.3], [0.3], [0.4]])
    return x, a.masked_fill(gone[0], -1), b.masked_fill(gone[1], math.nan), c.masked_fill(gone[2], -1)


def labelled(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of one concept that have a label, and the label as columns."""
    known = ~label.isnan() if label.is_floating_point() else label >= 0
    kept = label[known]
    columns = kept[:, None] if label.is_floating_point() else torch.nn.functional.one_hot(kept)
    return x[known], columns.double()


def test_every_statistic_comes_from_the_rows_that_it_should() -> None:
    x, *labels = sample()
    m = CONCEPTS.resolve(Moments.of(x, CONCEPTS.columns(*labels)))
    assert (m.n, m.k, CONCEPTS.k) == (300, 6, 6)
    assert torch.allclose(m.mean_x, x.mean(0))
    assert torch.allclose(m.cov_xx, covariances(x, x)[0])
    start = 0
    for label in labels:
        rows, columns = labelled(x, label)
        stop = start + columns.shape[1]
        assert len(rows) < 250
        assert torch.allclose(m.mean_z[start:stop], columns.mean(0))
        assert torch.allclose(m.m_xz[:, start:stop], covariances(rows, columns)[1] * len(rows), atol=1e-9)
        centred = columns - columns.mean(0)
        assert torch.allclose(m.m_zz[start:stop, start:stop], centred.T @ centred, atol=1e-9)
        start = stop
    # Between two concepts: the rows that have both labels, each column centred on its own mean.
    both = ~labels[1].isnan() & (labels[2] >= 0)
    b = (labels[1] - labels[1].nanmean())[both]
    c = labels[2].double()[both] - labels[2][labels[2] >= 0].double().mean()
    assert float(m.m_zz[3, 5]) == pytest.approx(float(b @ c), rel=1e-9)
    # Not the statistics of the rows that have all labels.
    complete = both & (labels[0] >= 0)
    assert not torch.allclose(m.mean_x, x[complete].mean(0), atol=1e-3)


def test_all_concepts_are_erased_on_their_own_rows_at_once() -> None:
    x, *labels = sample()
    m = CONCEPTS.resolve(Moments.of(x, CONCEPTS.columns(*labels)))
    for solver in (leace, mean_difference):
        e = solver(m)
        assert e.rank == 4  # 2 + 1 + 1
        for label in labels:
            rows, columns = labelled(x, label)
            before, after = covariances(rows, columns)[1].norm(), covariances(e(rows), columns)[1].norm()
            assert float(after / before) < 1e-10
            assert float(before) > 0.1
    # Control: filling missing labels with a value of their own does not erase.
    filled = torch.where(labels[1].isnan(), 0.0, labels[1])
    rows, columns = labelled(x, labels[1])
    left = covariances(leace(Moments.of(x, filled))(rows), columns)[1].norm()
    assert float(left / covariances(rows, columns)[1].norm()) > 1e-3


def test_without_missing_labels_it_is_the_plain_moments() -> None:
    x, *_ = sample()
    a, b, c = torch.arange(300) % 3, torch.randn(300), torch.arange(300) % 2
    m = CONCEPTS.resolve(Moments.of(x, CONCEPTS.columns(a, b, c)))
    one_hot = torch.nn.functional.one_hot
    plain = Moments.of(x, torch.cat([one_hot(a), b[:, None], one_hot(c)], dim=1))
    for name in ("n", "mean_x", "mean_z", "m_xx", "m_xz", "m_zz"):
        assert torch.allclose(
            torch.as_tensor(getattr(m, name)), torch.as_tensor(getattr(plain, name)), atol=1e-9
        ), name


def test_streamed_merged_and_taken_out_again() -> None:
    x, *labels = sample()
    z = CONCEPTS.columns(*labels)
    wanted = CONCEPTS.resolve(Moments.of(x, z))
    sums = Accumulator()
    for start in range(0, 300, 37):
        sums.add(x[start : start + 37], z[start : start + 37])
    parts = [Moments.of(x[a:b], z[a:b]) for a, b in ((0, 100), (100, 120), (120, 300))]
    merged = parts[0] + parts[1] + parts[2]
    for found in (sums.moments(), merged, merged + parts[1] - parts[1]):
        assert leace(CONCEPTS.resolve(found)).allclose(leace(wanted))
    assert not leace(CONCEPTS.resolve(merged - parts[0])).allclose(leace(wanted), rtol=1e-3)
    # Why resolve comes last: resolved parts do not merge.
    late = CONCEPTS.resolve(parts[0]) + CONCEPTS.resolve(parts[2])
    early = CONCEPTS.resolve(parts[0] + parts[2])
    assert not torch.allclose(late.m_xz, early.m_xz, atol=1e-3)


def test_thin_moments_too() -> None:
    x, *labels = sample(8)
    z = CONCEPTS.columns(*labels)
    thin = CONCEPTS.resolve(ThinMoments.of(x, z))
    assert leace(thin).allclose(leace(CONCEPTS.resolve(Moments.of(x, z))))


def test_a_real_may_have_a_mean_a_thousand_times_its_spread() -> None:
    x, _, b, _ = sample()
    one = Concepts((None,))
    near = leace(one.resolve(Moments.of(x, one.columns(b - b.nanmean()))))
    far = leace(one.resolve(Moments.of(x, one.columns(b + 2000))))
    assert far.allclose(near, rtol=1e-7)


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ((torch.tensor([0, 1]),), ShapeError, "got 1 label tensors"),
        ((torch.tensor([0, 1]), torch.tensor([0.0])), ShapeError, "same shape"),
        ((torch.tensor([0, 2]), torch.tensor([0.0, 1.0])), InputError, "needed 0 <= id < 2, or -1"),
        ((torch.tensor([0, -2]), torch.tensor([0.0, 1.0])), InputError, "from -2"),
        ((torch.tensor([0, 1]), torch.tensor([0, 1])), InputError, "concept 1; needed reals"),
        ((torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])), InputError, "concept 0; needed integer"),
        ((torch.tensor([0, 1]), torch.tensor([0.0, math.inf])), NonFiniteError, "infinite"),
    ],
)
def test_refuses_bad_labels(labels: tuple[Tensor, ...], error: type[Exception], match: str) -> None:
    concepts = Concepts((2, None))
    assert concepts.columns(torch.tensor([0, -1]), torch.tensor([0.0, math.nan])).shape == (2, 5)
    with pytest.raises(error, match=match):
        concepts.columns(*labels)


def test_refuses_bad_layouts_and_foreign_moments() -> None:
    for classes in ((), (1,), (2, 0)):
        with pytest.raises(InputError, match="classes"):
            Concepts(classes)
    with pytest.raises(InputError, match="missing=1, which is a class"):
        Concepts((2,), missing=1)
    concepts = Concepts((2,), missing=-100)
    x = torch.randn(4, 3)
    with pytest.raises(ShapeError, match="moments of 2 columns; needed 3"):
        concepts.resolve(Moments.of(x, torch.tensor([0, 1, 0, 1])))
    with pytest.raises(NotEnoughDataError, match="no label at all for concept 0"):
        concepts.resolve(Moments.of(x, concepts.columns(torch.full((4,), -100))))
