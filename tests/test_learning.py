from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditkit import numbered, planted

from repe_unlearn.activations import Rows
from repe_unlearn.audit.learning import learning_curve
from repe_unlearn.audit.probes import Labels
from repe_unlearn.contrast import Contrast
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import NoConceptWarning, NotEnoughDataError, NumericalWarning
from repe_unlearn.moments import Moments
from repe_unlearn.sites import Site
from repe_unlearn.solvers import random

SITES = tuple(Site(f"site {i}") for i in range(4))


def rows(n: int, seed: int) -> dict[Site, Rows]:
    return {site: planted(n, d=24, seed=seed + 10 * i)[1] for i, site in enumerate(SITES)}


@pytest.fixture(scope="module")
def data() -> tuple[dict[Site, Rows], dict[Site, Rows], Contrast, Labels]:
    heldout = rows(400, 1)
    return rows(400, 0), heldout, numbered(400), Labels.of(heldout[SITES[0]], numbered(400))


def test_more_pairs_leave_less(data: tuple) -> None:
    curve = learning_curve(*data)
    assert curve.x == (12, 24, 48, 96, 192, 384, 400)
    for low, middle, high in zip(curve.low, curve.y, curve.high, strict=True):
        assert 0 < low <= middle <= high
    assert curve.y[0] > 1.5 * curve.y[2] > 2 * curve.y[-1]
    assert curve.y[-1] < 0.06
    # what is left is the difference of two noisy means: it falls like the square root of the number of pairs
    slope = np.polyfit(np.log(curve.x[:-1]), np.log(curve.y[:-1]), 1)[0]
    assert -0.9 < slope < -0.2


def test_an_eraser_that_reads_nothing_has_a_flat_curve(data: tuple) -> None:
    curve = learning_curve(*data, solver=random)
    assert min(curve.y) > 0.8
    nothing = learning_curve(
        *data, solver=lambda m: Eraser(torch.zeros(m.d, 0), torch.zeros(0, m.d), torch.zeros(m.d))
    )
    assert nothing.y == pytest.approx([1.0] * 7)


def test_sizes_seeds_and_sites(data: tuple) -> None:
    seen: list[Moments] = []

    def spy(m: Moments) -> Eraser:
        seen.append(m)
        return random(m)

    curve = learning_curve(*data, sizes=(5, 50), solver=spy, most_sites=2)
    assert curve.x == (5, 50)
    assert [m.n for m in seen] == [10, 10, 100, 100]  # whole pairs at two sites
    assert curve.label == "median of 2 sites"
    again = learning_curve(*data, sizes=(5, 50), solver=random, most_sites=2)
    assert curve.y == again.y
    other = learning_curve(*data, sizes=(5, 50), most_sites=2, seed=1)
    assert other.y != learning_curve(*data, sizes=(5, 50), most_sites=2).y


def test_the_pairs_of_a_curve_are_nested(data: tuple) -> None:
    fit = {SITES[0]: data[0][SITES[0]]}
    means = []

    def spy(m: Moments) -> Eraser:
        means.append((m.n, m.mean_x))
        return random(m)

    learning_curve(fit, data[1], data[2], data[3], sizes=(12, 400), solver=spy)
    x = fit[SITES[0]].x.double()
    (few, mean), (everything, whole) = means
    assert (few, everything) == (24, 800)
    assert torch.allclose(whole, x.mean(0))
    assert not torch.allclose(mean, whole, atol=1e-3)


def test_too_few_pairs(data: tuple) -> None:
    fit, heldout, _, labels = data
    few = {site: Rows(r.x[:22], r.z[:22], r.owner[:22]) for site, r in fit.items()}
    with pytest.raises(NotEnoughDataError, match="got 11 pairs; a learning curve needs at least 12"):
        learning_curve(few, heldout, numbered(11), labels)
    assert len(learning_curve(few, heldout, numbered(11), labels, sizes=(4, 11)).x) == 2


def test_weak_numerics_are_the_point_and_not_a_warning(data: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        warnings.simplefilter("error", NoConceptWarning)
        learning_curve(*data, sizes=(2, 4))  # far fewer prompts than dimensions


def test_a_site_without_any_gap_is_left_out(data: tuple) -> None:
    fit, heldout, contrast, labels = data
    flat = {**heldout, SITES[1]: replace(heldout[SITES[1]], x=torch.zeros_like(heldout[SITES[1]].x))}
    curve = learning_curve(fit, flat, contrast, labels, sizes=(12, 48))
    assert curve.label == "median of 3 sites"
    assert all(math.isfinite(y) for y in curve.y)
