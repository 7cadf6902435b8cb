"""The spectrum and the predictions, against scipy, explicit hat matrices, and edits carried out on the rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from editkit import TARGETS, Rows, U, lam, relative, rows, wanted_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments
from repe_unlearn.solvers import (
    Prediction,
    Tradeoff,
    choose,
    distortion,
    predict,
    remaining,
    ridge_edit,
    spectrum,
    targets,
)

ALPHAS = (0.0, 0.01, 1.0, 50.0)


def tradeoff(r: Rows, name: str = "zero", *, neighbour: bool = True, ridge: float = 0.03) -> Tradeoff:
    return Tradeoff.of(
        r.weight,
        r.moments("forget"),
        r.moments("retain"),
        target=TARGETS[name][0](r),
        ridge=ridge,
        neighbour=r.moments("neighbour") if neighbour else None,
        beta=0.4,
    )


def second(k: Tensor) -> Tensor:
    return k.T @ k / len(k)


def share(changes: Tensor, of: Tensor) -> float:
    return float(changes.square().sum() / of.square().sum())


@pytest.mark.parametrize("alpha", [0.01, 1.0, 50.0])
def test_the_spectrum_is_scipys(alpha: float) -> None:
    r = rows()
    found = spectrum(
        r.moments("forget"),
        r.moments("retain"),
        alpha=alpha,
        ridge=0.03,
        neighbour=r.moments("neighbour"),
        beta=0.4,
    )
    a = second(r.keys["forget"])
    b = (
        alpha * second(r.keys["retain"])
        + 0.4 * second(r.keys["neighbour"])
        + lam(r, 0.03) * torch.eye(8).double()
    )
    want = scipy.linalg.eigh(a.numpy(), b.numpy(), eigvals_only=True)[::-1]
    np.testing.assert_allclose(found.values.numpy(), want, rtol=1e-8, atol=1e-12)
    v = found.directions
    torch.testing.assert_close(v.T @ b @ v, torch.eye(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(a @ v, b @ v * found.values, rtol=1e-7, atol=1e-7)


@given(st.integers(0, 50), st.sampled_from([0.01, 1.0, 50.0]), st.integers(1, 30))
def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix(seed: int, alpha: float, n: int) -> None:
    r = rows(seed, forget=n)
    k, kept = r.keys["forget"], alpha * second(r.keys["retain"])
    kept += lam(r, 0.03) * torch.eye(8).double()
    hat = k @ torch.linalg.solve(second(k) + kept, k.T) / n  # fitted changes = hat @ wanted changes
    dof = spectrum(r.moments("forget"), r.moments("retain"), alpha=alpha, ridge=0.03).dof
    assert math.isclose(dof, float(hat.trace()), rel_tol=1e-9)
    assert dof <= min(n, 8)
    assert math.isclose(tradeoff(r, neighbour=False).at(alpha).dof, dof, rel_tol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", TARGETS)
def test_predictions_are_what_the_edit_does_to_the_rows(name: str, alpha: float) -> None:
    r, e = rows(), wanted_rows(rows(), name)
    edit = ridge_edit(
        r.weight,
        r.moments("forget"),
        r.moments("retain"),
        target=TARGETS[name][0](r),
        alpha=alpha,
        ridge=0.03,
        neighbour=r.moments("neighbour"),
        beta=0.4,
    )
    trade = tradeoff(r, name)
    assert relative(trade.edit(alpha).delta(), edit.delta()) < 1e-9
    row, delta = trade.at(alpha), edit.delta()
    truth = {
        "remaining": share(e - r.keys["forget"] @ delta.T, e),
        "distortion": share(r.keys["retain"] @ delta.T, r.outputs["retain"]),
        "neighbour": share(r.keys["neighbour"] @ delta.T, r.outputs["neighbour"]),
        "relative": float(delta.norm() / r.weight.norm()),
    }
    for field, value in truth.items():
        assert math.isclose(getattr(row, field), value, rel_tol=1e-7), field
    # The same numbers from the edit itself, on any moments.
    target, forget, retain = TARGETS[name][0](r), r.moments("forget"), r.moments("retain")
    assert math.isclose(
        remaining(edit, r.weight, forget, retain, target=target), truth["remaining"], rel_tol=1e-9
    )
    assert math.isclose(distortion(edit, retain), truth["distortion"], rel_tol=1e-9)
    # Negative control: another alpha is another prediction.
    assert not math.isclose(trade.at(alpha + 1).remaining, truth["remaining"], rel_tol=1e-4)


def test_held_out_rows_are_measured_as_they_are() -> None:
    r, fresh = rows(0, forget=4), rows(5, forget=40)
    fresh = replace(fresh, weight=r.weight)
    edit = tradeoff(r).edit(0.1)
    k = fresh.keys["forget"]
    value = remaining(edit, r.weight, fresh.moments("forget"), target=targets.zero())
    assert math.isclose(value, share(k @ (r.weight + edit.delta()).T, k @ r.weight.T), rel_tol=1e-9)
    assert value > tradeoff(r).at(0.1).remaining  # fit to four positions
    nothing = Edit(torch.zeros_like(r.weight), None, "nothing")
    assert remaining(nothing, r.weight, fresh.moments("forget"), target=targets.zero()) == 1.0
    assert distortion(nothing, fresh.moments("retain")) == 0.0


@given(st.integers(0, 50))
def test_more_alpha_is_less_distortion_and_less_forgetting(seed: int) -> None:
    found = [tradeoff(rows(seed)).at(a) for a in (0.0, 0.01, 0.1, 1.0, 10.0, 1000.0)]
    for field in ("distortion", "dof"):
        series = [getattr(row, field) for row in found]
        assert series == sorted(series, reverse=True), field
    assert found[0].remaining < found[-1].remaining


@given(st.integers(0, 50), st.floats(-5, -1))
def test_alpha_at_a_budget_spends_the_budget(seed: int, power: float) -> None:
    r = rows(seed)
    trade, budget = tradeoff(r, neighbour=False), 10**power
    alpha = trade.alpha_at(budget)
    delta = trade.edit(alpha).delta()
    spent = share(r.keys["retain"] @ delta.T, r.outputs["retain"])
    assert spent <= budget * (1 + 1e-6)
    assert math.isclose(spent, budget, rel_tol=1e-4) or alpha == 1e-8


def test_a_budget_that_no_alpha_reaches_is_refused() -> None:
    trade = tradeoff(rows())
    with pytest.raises(InputError, match="no alpha up to 1e8 brings the distortion to 1e-30"):
        trade.alpha_at(1e-30)
    with pytest.raises(InputError, match="got distortion=0"):
        trade.alpha_at(0.0)
    with pytest.raises(InputError, match="got alpha=-1"):
        trade.at(-1.0)


def separable(own: float) -> Rows:
    """Forget keys that share half of the coordinates with the retain keys, and have the other half to themselves."""
    r = rows(2, m=12, forget=6)
    half = torch.cat([torch.ones(6), torch.zeros(6)]).double()
    forget = r.keys["forget"] * (half + own * (1 - half))
    return replace(r, keys={**r.keys, "forget": forget, "retain": r.keys["retain"] * half})


def test_the_layer_where_forget_and_retain_part_is_chosen() -> None:
    layers = {n: separable(own) for n, own in ((3, 0.0), (4, 2.0), (5, 0.1))}
    found = {
        n: predict(r.weight, r.moments("forget"), r.moments("retain"), target=targets.mean_of(U))
        for n, r in layers.items()
    }
    layer, row = choose(found, distortion=1e-3)
    assert layer == 4
    assert row.distortion <= 1e-3
    # It is the best of the table, by brute force on the rows.
    scores = {}
    for n, r in layers.items():
        for candidate in found[n]:
            edit = ridge_edit(
                r.weight,
                r.moments("forget"),
                r.moments("retain"),
                target=targets.mean_of(U),
                alpha=candidate.alpha,
            ).delta()
            if share(r.keys["retain"] @ edit.T, r.outputs["retain"]) <= 1e-3:
                e = U - r.outputs["forget"]
                scores[n, candidate.alpha] = share(e - r.keys["forget"] @ edit.T, e)
    assert min(scores, key=scores.__getitem__) == (layer, row.alpha)


def test_choose_keeps_to_both_budgets() -> None:
    def row(remaining: float, distortion: float, neighbour: float = math.nan) -> Prediction:
        return Prediction(1.0, remaining, distortion, neighbour, 2.0, 0.1)

    table = {"a": [row(0.1, 0.05), row(0.3, 0.01)], "b": [row(0.2, 0.01, 0.5), row(0.4, 0.01, 0.01)]}
    assert choose(table, distortion=0.02) == ("a", table["a"][1])
    assert choose(table, distortion=0.02, neighbour=0.6) == ("b", table["b"][0])
    assert choose(table, distortion=0.1) == ("a", table["a"][0])
    with pytest.raises(
        InputError, match=r"none of 4 rows is within distortion 0.001 .* \(the least distortion is 0.01\)"
    ):
        choose(table, distortion=0.001)
    with pytest.raises(InputError, match="none of 0 rows"):
        choose({}, distortion=1.0)


def test_predict_gives_one_row_per_alpha() -> None:
    r = rows()
    found = predict(r.weight, r.moments("forget"), r.moments("retain"), target=targets.zero(), alphas=ALPHAS)
    assert [row.alpha for row in found] == list(ALPHAS)
    assert all(math.isnan(row.neighbour) for row in found)


def test_bad_input_is_refused_in_a_sentence() -> None:
    r = rows()
    forget, retain = r.moments("forget"), r.moments("retain")
    labels = Moments.of(r.keys["retain"], torch.zeros(30))
    silent = Moments.of(r.keys["retain"], torch.zeros(30, 5))
    zero = targets.zero()
    for error, message, call in (
        (ShapeError, "retain: got z of width 1", lambda: predict(r.weight, forget, labels, target=zero)),
        (InputError, "retain: z is 0", lambda: predict(r.weight, forget, silent, target=zero)),
        (InputError, "nothing is wanted", lambda: predict(0 * r.weight, forget, retain, target=zero)),
        (InputError, "got ridge=-1", lambda: predict(r.weight, forget, retain, target=zero, ridge=-1.0)),
        (InputError, "singular", lambda: tradeoff(rows(forget=3), neighbour=False, ridge=0.0)),
        (InputError, "got alpha=-1", lambda: spectrum(forget, retain, alpha=-1.0)),
        (InputError, "singular", lambda: spectrum(forget, None, ridge=0.0)),
        (NotEnoughDataError, "no rows", lambda: spectrum(Moments.empty(8, 5), retain)),
        (ShapeError, "an edit of shape", lambda: distortion(Edit(r.weight[:, :3], None, "x"), retain)),
        (
            ShapeError,
            "an edit of shape",
            lambda: remaining(Edit(r.weight[:, :3], None, "x"), r.weight, forget, target=zero),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
