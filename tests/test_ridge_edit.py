"""Ridge edits against the explicit least-squares problem: stacked rows, lstsq, autograd, and broken variants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from editkit import BASIS, OBLIQUE, SETTINGS, TARGETS, D, M, Rows, U, lam, relative, rows, wanted_rows
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny, token_ids
from torch import Tensor

from repe_unlearn.activations import capture
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.inputs import Inputs
from repe_unlearn.moments import Accumulator, Moments
from repe_unlearn.patch import Patch
from repe_unlearn.sites import Site
from repe_unlearn.solvers import RidgeFactor, distortion, remaining, ridge_edit, targets


def least_squares(r: Rows, wanted: Tensor, *, alpha: float, ridge: float, beta: float) -> Tensor:
    """The edit from the stacked problem: every term of the objective as rows of one plain lstsq."""
    parts = [(1.0, r.keys["forget"], wanted)]
    for weight, name in ((alpha, "retain"), (beta, "neighbour")):
        parts.append((weight, r.keys[name], torch.zeros(len(r.keys[name]), D).double()))
    m = r.weight.shape[1]
    a = [(w / len(k)) ** 0.5 * k for w, k, _ in parts] + [lam(r, ridge) ** 0.5 * torch.eye(m).double()]
    b = [(w / len(k)) ** 0.5 * e for w, k, e in parts] + [torch.zeros(m, D).double()]
    return torch.linalg.lstsq(torch.cat(a), torch.cat(b)).solution.T


def objective(r: Rows, delta: Tensor, wanted: Tensor, *, alpha: float, ridge: float, beta: float) -> Tensor:
    """J as it is written in the documentation, row by row."""
    mean = lambda rows: rows.square().sum(1).mean()  # noqa: E731
    return (
        mean(wanted - r.keys["forget"] @ delta.T)
        + alpha * mean(r.keys["retain"] @ delta.T)
        + beta * mean(r.keys["neighbour"] @ delta.T)
        + lam(r, ridge) * delta.square().sum()
    )


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_their_explicit_formulas(name: str) -> None:
    r = rows()
    target = TARGETS[name][0](r)
    got = target.wanted(r.weight, r.moments("forget"), r.moments("retain"))
    want = Moments.of(r.keys["forget"], wanted_rows(r, name))
    for field in ("mean_x", "mean_z", "m_xx", "m_xz", "m_zz"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-10, atol=1e-9)
    assert target.name in repr(target)
    if target.basis is not None:  # every e is inside the basis that the target claims
        q = torch.linalg.qr(target.basis).Q
        e = wanted_rows(r, name)
        torch.testing.assert_close(e @ q @ q.T, e)


@pytest.mark.parametrize("name", TARGETS)
def test_edits_solve_the_stacked_least_squares_problem(name: str) -> None:
    r, e = rows(), wanted_rows(rows(), name)
    edit = r.solve(TARGETS[name][0](r))
    assert relative(edit.delta(), least_squares(r, e, **SETTINGS)) < 1e-9
    delta = edit.delta().clone().requires_grad_()
    objective(r, delta, e, **SETTINGS).backward()
    at_zero = torch.zeros_like(delta).requires_grad_()
    objective(r, at_zero, e, **SETTINGS).backward()
    assert delta.grad is not None
    assert at_zero.grad is not None
    assert float(delta.grad.norm() / at_zero.grad.norm()) < 1e-10
    span = {"eraser": 1, "basis": 2, "basis, own mean": 2, "redirect": 1}
    assert edit.rank == span.get(name)
    assert "alpha=0.7, ridge=0.03, beta=0.4" in edit.rule


@pytest.mark.parametrize(
    "broken",
    [
        lambda r, e: -least_squares(r, e, **SETTINGS),  # sign
        lambda r, e: least_squares(r, e, **{**SETTINGS, "alpha": 0.7 * 30 / 11}),  # sums, not means
        lambda r, e: least_squares(r, e, **{**SETTINGS, "ridge": 0.03 * M}),  # ridge not over m
        lambda r, e: least_squares(r, e, **{**SETTINGS, "beta": 0.0}),  # no neighbours
        lambda r, e: least_squares(r, e - e.mean(0), **SETTINGS),  # centred
    ],
)
def test_broken_solvers_are_not_taken_for_the_optimum(broken: Callable[[Rows, Tensor], Tensor]) -> None:
    r, e = rows(), wanted_rows(rows(), "zero")
    edit, wrong = r.solve(targets.zero()).delta(), broken(r, e)
    assert relative(wrong, edit) > 1e-3
    assert objective(r, wrong, e, **SETTINGS) > objective(r, edit, e, **SETTINGS)
    grad = torch.autograd.functional.jacobian(lambda d: objective(r, d, e, **SETTINGS), wrong)
    start = torch.autograd.functional.jacobian(lambda d: objective(r, d, e, **SETTINGS), 0 * wrong)
    assert grad.norm() > 1e-4 * start.norm()


def test_streamed_is_batch_is_woodbury() -> None:
    r = rows()
    sums = {name: Accumulator() for name in r.keys}
    for name, total in sums.items():
        for k, h in zip(r.keys[name].split(4), r.outputs[name].split(4), strict=True):
            total.add(k, h)
    streamed = {name: total.moments() for name, total in sums.items()}
    for name in TARGETS:
        target, e = TARGETS[name][0](r), wanted_rows(r, name)
        batch = r.solve(target).delta()
        again = ridge_edit(
            r.weight,
            streamed["forget"],
            streamed["retain"],
            target=target,
            neighbour=streamed["neighbour"],
            **SETTINGS,
        )
        factor = RidgeFactor.of(streamed["retain"], neighbour=streamed["neighbour"], **SETTINGS)
        woodbury = factor.edit(r.keys["forget"], e, name=name)
        assert relative(again.delta(), batch) < 1e-10
        assert relative(woodbury.delta(), batch) < 1e-10
        assert woodbury.rank == len(e)
        assert name in woodbury.rule
        # Negative control: scaled as if the rows were summed.
        assert relative(factor.edit(r.keys["forget"].repeat(2, 1), torch.cat([e, e])).delta(), batch) < 1e-10
        assert relative(factor.edit(r.keys["forget"][:5], e[:5]).delta(), batch) > 1e-3


def test_one_factor_serves_many_requests() -> None:
    r = rows(m=12)
    factor = RidgeFactor.of(r.moments("retain"), alpha=2.0, ridge=0.1)
    for seed in range(3):
        other = rows(seed + 1, m=12, forget=seed + 1)
        keys, h = other.keys["forget"], other.outputs["forget"]
        want = ridge_edit(
            r.weight,
            Moments.of(keys, h),
            r.moments("retain"),
            target=targets.mean_of(U),
            alpha=2.0,
            ridge=0.1,
        )
        assert relative(factor.edit(keys, U - h).delta(), want.delta()) < 1e-10


def few_retained(m: int = 24) -> Rows:
    return rows(3, m=m, retain=9, neighbour=5, forget=6)


@pytest.mark.parametrize("name", ["zero", "redirect", "mean of retain"])
def test_null_space_edits_leave_the_kept_keys_alone(name: str) -> None:
    r = few_retained()
    e = wanted_rows(r, name)
    edit = r.solve(TARGETS[name][0](r), null_space=1e-12, ridge=1e-6).delta()
    size = (r.keys["forget"] @ edit.T).norm() / len(r.keys["forget"]) ** 0.5
    for kept in ("retain", "neighbour"):
        before = r.keys[kept] @ r.weight.T
        after = r.keys[kept] @ (r.weight + edit).T
        assert float((after - before).abs().max()) < 1e-8 * float(before.abs().max())
    # ... and it is no empty edit: the forget positions are where they should be.
    assert float((e - r.keys["forget"] @ edit.T).norm() / e.norm()) < 1e-2
    assert size > 0
    # Negative control: without the constraint the kept outputs do move.
    loose = r.solve(TARGETS[name][0](r), alpha=0.1, ridge=1e-2).delta()
    assert float((r.keys["retain"] @ loose.T).abs().max()) > 1e-3
    # AlphaEdit's own formula, with the projector: S P (P C_f P + λI)⁻¹ P.
    kept_keys = torch.cat([r.keys["retain"], r.keys["neighbour"]])
    p = torch.eye(24).double() - torch.linalg.pinv(kept_keys) @ kept_keys
    k = r.keys["forget"]
    inner = p @ (k.T @ k / len(k)) @ p + lam(r, 1e-6) * torch.eye(24).double()
    assert relative(edit, e.T @ k / len(k) @ p @ torch.linalg.inv(inner) @ p) < 1e-6


def test_without_a_null_space_the_error_says_how_far_off_it_is() -> None:
    r = rows()
    with pytest.raises(
        InputError, match=r"no null space at 1e-09: the smallest eigenvalue is .* of the largest"
    ):
        r.solve(targets.zero(), null_space=1e-9)
    with pytest.raises(InputError, match="needs retain or neighbour"):
        ridge_edit(r.weight, r.moments("forget"), None, target=targets.zero(), null_space=1e-3)
    with pytest.raises(InputError, match="got null_space=1"):
        r.solve(targets.zero(), null_space=1.0)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["zero", "rmu", "basis"])
def test_truncation_is_optimal_in_the_metric_and_plain_svd_is_not(name: str, rank: int) -> None:
    r, e = rows(), wanted_rows(rows(), name)
    target = TARGETS[name][0](r)
    full, cut = r.solve(target), r.solve(target, rank=rank)
    dense = full.delta()
    assert cut.rank == min(rank, 2) if name == "basis" else cut.rank == rank
    moment = lambda n: r.keys[n].T @ r.keys[n] / len(r.keys[n])  # noqa: E731
    metric = (
        moment("forget") + 0.7 * moment("retain") + 0.4 * moment("neighbour") + lam(r) * torch.eye(M).double()
    )
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(dense @ root)
    best = u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(root)
    assert relative(cut.delta(), best) < 1e-8
    u, s, vh = torch.linalg.svd(dense)
    plain = u[:, :rank] * s[:rank] @ vh[:rank]
    cost = lambda delta: float(objective(r, delta, e, **SETTINGS))  # noqa: E731
    if name != "basis" or rank < 2:
        assert cost(dense) < cost(cut.delta()) < cost(plain)
    # Nothing of this rank nearby is better.
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        assert cut.right is not None
        near = (cut.left + 0.01 * torch.randn(cut.left.shape, generator=g).double()) @ cut.right
        assert cost(near) > cost(cut.delta())


def test_a_rank_within_a_null_space() -> None:
    r = few_retained()
    edit = r.solve(targets.zero(), null_space=1e-12, rank=2)
    assert edit.rank == 2
    assert float((r.keys["retain"] @ edit.delta().T).abs().max()) < 1e-8
    assert "null space 10 of 24, rank 2" in edit.rule
    for unit in (1e-8, 1e8):  # what counts as null does not depend on the unit of the keys
        scaled = replace(r, keys={n: k * unit for n, k in r.keys.items()})
        assert "null space 10 of 24" in scaled.solve(targets.zero(), null_space=1e-12).rule


@given(st.integers(0, 50), st.sampled_from(["zero", "rmu", "mean of retain", "basis"]), st.floats(-6, 6))
def test_a_change_of_units_changes_nothing(seed: int, name: str, power: float) -> None:
    """Keys in another unit: outputs of the edit are the same. Outputs in another unit: so is the edit."""
    r, unit = rows(seed), 10**power
    e = r.solve(TARGETS[name][0](r)).delta()
    in_keys = replace(r, weight=r.weight / unit, keys={n: k * unit for n, k in r.keys.items()})
    assert relative(in_keys.solve(TARGETS[name][0](in_keys)).delta() * unit, e) < 1e-8
    if name in ("zero", "mean of retain"):
        larger = replace(r, weight=r.weight * unit, outputs={n: h * unit for n, h in r.outputs.items()})
        assert relative(larger.solve(TARGETS[name][0](larger)).delta() / unit, e) < 1e-8


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_a_turn_of_the_key_space_turns_the_edit(seed: int, alpha: float) -> None:
    r = rows(seed)
    q = torch.linalg.qr(torch.randn(M, M, generator=torch.Generator().manual_seed(seed)).double()).Q
    turned = replace(r, weight=r.weight @ q.T, keys={n: k @ q.T for n, k in r.keys.items()})
    edit, other = (s.solve(targets.zero(), alpha=alpha).delta() for s in (r, turned))
    assert relative(other @ q, edit) < 1e-9


@given(st.integers(0, 50))
def test_a_large_alpha_is_the_null_space_edit_and_a_small_one_fits(seed: int) -> None:
    r = rows(seed, m=24, retain=9, neighbour=5, forget=6)
    target, settings = targets.zero(), {"ridge": 1e-4, "neighbour": None}
    null = r.solve(target, null_space=1e-12, **settings).delta()
    off = [relative(r.solve(target, alpha=a, **settings).delta(), null) for a in (1e-2, 1.0, 1e2, 1e4)]
    assert all(later < 0.1 * earlier for earlier, later in itertools.pairwise(off)), off
    moved = [
        float((r.keys["retain"] @ r.solve(target, alpha=a, **settings).delta().T).norm())
        for a in (0.01, 1, 100)
    ]
    missed = [
        float((r.keys["forget"] @ (r.weight + r.solve(target, alpha=a, **settings).delta()).T).norm())
        for a in (0.01, 1, 100)
    ]
    assert moved == sorted(moved, reverse=True)
    assert missed == sorted(missed)


def test_without_retain_it_is_plain_ridge() -> None:
    r = rows()
    edit = ridge_edit(r.weight, r.moments("forget"), None, target=targets.mean_of(U), ridge=0.1)
    k = r.keys["forget"]
    penalty = 0.1 * k.square().sum() / k.numel() * torch.eye(M).double()
    want = torch.linalg.solve(k.T @ k / len(k) + penalty, k.T @ (U - r.outputs["forget"]) / len(k)).T
    assert relative(edit.delta(), want) < 1e-10
    with pytest.raises(InputError, match="mean_retain needs retain moments"):
        ridge_edit(r.weight, r.moments("forget"), None, target=targets.mean_retain())


def test_float32_and_bfloat16_weights_are_solved_in_float64() -> None:
    r = rows()
    for dtype in (torch.float32, torch.bfloat16):
        low = r.weight.to(dtype)
        want = replace(r, weight=low.double()).solve(targets.zero()).delta()
        got = replace(r, weight=low).solve(targets.zero()).delta()
        assert got.dtype == torch.float64
        assert torch.equal(got, want)
        assert low.dtype == dtype


@pytest.mark.parametrize(
    ("model_type", "block", "weight"),
    [("llama", "model.layers.1", "mlp.down_proj"), ("gpt2", "transformer.h.1", "mlp.c_proj")],
)
def test_in_a_model_the_block_output_becomes_what_was_asked_for(
    model_type: str, block: str, weight: str
) -> None:
    model = tiny(model_type)  # type: ignore[arg-type]
    keys, output, name = Site(f"{block}.{weight}", "input"), Site(block), f"{block}.{weight}.weight"
    prompts = {"forget": token_ids(2, 6, seed=1), "retain": token_ids(3, 9, seed=2)}

    def seen(which: str, **extra: Site) -> Moments:
        batch = [Inputs({"input_ids": prompts[which]}, z=torch.zeros(len(prompts[which])))]
        return capture(model, None, batch, [keys], progress=False, **extra)[keys]  # type: ignore[arg-type]

    forget, retain = (seen(which, target=output) for which in prompts)
    stored = model.get_parameter(name).detach()
    turned = model_type == "gpt2"
    before = stored.T if turned else stored
    edit = ridge_edit(before, forget, retain, target=targets.mean_retain(), alpha=0.1)
    left = remaining(edit, before, forget, retain, target=targets.mean_retain())
    patch = Patch({name: edit.mT if turned else edit}, fingerprint(model)).apply_(model)
    try:
        after, beside = (seen(which, target=output) for which in prompts)
    finally:
        patch.revert_(model)
    # The mean square distance of the block output from the mean of retain, measured in the edited model.
    away = lambda m: float(m.cov_zz.trace() + (m.mean_z - retain.mean_z).square().sum())  # noqa: E731
    assert math.isclose(away(after) / away(forget), left, rel_tol=1e-6)
    assert left < 0.7
    torch.testing.assert_close(after.m_xx, forget.m_xx)  # the keys are what they were
    shift = beside.mean_z - retain.mean_z
    torch.testing.assert_close(shift, edit.delta() @ retain.mean_x)
    assert 0 < distortion(edit, retain) < 0.7
    assert away(seen("forget", target=output)) == away(forget)


def test_directions_of_topics_are_orthogonal_unit_and_reproducible() -> None:
    u = targets.rmu_directions(16, 5, seed=3)
    torch.testing.assert_close(u @ u.T, torch.eye(5).double())
    assert torch.equal(u, targets.rmu_directions(16, 5, seed=3))
    torch.testing.assert_close(u[:2], targets.rmu_directions(16, 5, seed=3)[:2])
    assert relative(targets.rmu_directions(16, 5, seed=4), u) > 0.1
    gaussian = torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(u[0], gaussian[0] / gaussian[0].norm())
    assert bool(
        ((u * gaussian).sum(1) > 0).all()
    )  # each on the side of its own draw, so uniform on the sphere
    for topics in (0, 17):
        with pytest.raises(InputError, match=f"topics={topics} with d=16"):
            targets.rmu_directions(16, topics)


BAD_NUMBERS = [
    ({"alpha": -1.0}, "got alpha=-1.0; needed a finite number, 0 or more"),
    ({"alpha": math.nan}, "got alpha=nan"),
    ({"beta": math.inf}, "got beta=inf"),
    ({"ridge": -1e-3}, "got ridge=-0.001"),
    ({"rank": 0}, "got rank=0; needed 1 or more"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NUMBERS)
def test_bad_numbers_are_refused_in_a_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows().solve(targets.zero(), **change)


def test_a_singular_problem_is_refused_and_a_ridge_mends_it() -> None:
    r = rows(forget=3)
    for unit in (1.0, 1e-9, 1e9):
        forget = Moments.of(r.keys["forget"] * unit, r.outputs["forget"])
        with pytest.raises(InputError, match=r"second moments of width 8 are singular\. Give ridge above 0"):
            ridge_edit(r.weight, forget, None, target=targets.zero(), ridge=0.0)
        ridge_edit(r.weight, forget, None, target=targets.zero(), ridge=1e-6)
    with pytest.raises(InputError, match="singular"):
        RidgeFactor.of(Moments.of(r.keys["forget"], r.outputs["forget"]), ridge=0.0)
    # With enough rows no ridge is needed.
    edit = r.solve(targets.zero(), ridge=0.0).delta()
    assert (
        relative(edit, least_squares(r, -r.keys["forget"] @ r.weight.T, **{**SETTINGS, "ridge": 0.0})) < 1e-8
    )


def test_bad_moments_are_refused_in_a_sentence() -> None:
    r = rows()
    forget, retain = r.moments("forget"), r.moments("retain")
    spoilt = replace(forget, mean_x=forget.mean_x * math.nan)
    narrow = Moments.of(r.keys["retain"][:, :5], r.outputs["retain"])
    labels = Moments.of(r.keys["forget"], torch.zeros(11, 2))
    zero, mean = targets.zero(), targets.mean_of(U)
    for args, target, error, message in (
        ((r.weight, spoilt, retain), zero, NonFiniteError, "forget: Moments.mean_x holds NaN"),
        ((r.weight, forget, spoilt), zero, NonFiniteError, "retain: Moments.mean_x holds NaN"),
        ((r.weight, Moments.empty(M, D), retain), zero, NotEnoughDataError, "forget: got no rows"),
        ((r.weight, forget, Moments.empty(M, D)), zero, NotEnoughDataError, "retain: got no rows"),
        ((r.weight, forget, narrow), zero, ShapeError, "retain: got keys of width 5; the weight reads 8"),
        ((r.weight.T, forget, retain), zero, ShapeError, "forget: got keys of width 8; the weight reads 5"),
        ((r.weight, labels, retain), mean, ShapeError, r"z: got width 2; the weight \(5, 8\) writes 5"),
        ((r.weight * math.inf, forget, retain), zero, NonFiniteError, "the weight holds NaN"),
        ((r.weight[0], forget, retain), zero, ShapeError, "needed a floating-point matrix"),
        ((r.weight.long(), forget, retain), zero, ShapeError, "needed a floating-point matrix"),
        ((r.weight, forget, retain), targets.mean_of(U[:3]), ShapeError, "vector: got width 3"),
        ((r.weight, forget, retain), targets.values(retain), InputError, "needed those of the same 11"),
    ):
        with pytest.raises(error, match=message):
            ridge_edit(*args, target=target)
    with pytest.raises(ShapeError, match="neighbour: got keys of width 5"):
        r.solve(zero, neighbour=narrow)
    ridge_edit(r.weight, labels, retain, target=zero)  # z is not used


def test_bad_targets_are_refused_in_a_sentence() -> None:
    bad = U.clone()
    bad[1] = math.nan
    for make, error, message in (
        (lambda: targets.rmu(bad), NonFiniteError, "direction holds NaN"),
        (lambda: targets.rmu(0 * U), InputError, "direction of zeros"),
        (lambda: targets.rmu(U, math.inf), InputError, "got c=inf"),
        (lambda: targets.redirect(U, math.nan), InputError, "got coef=nan"),
        (lambda: targets.mean_of(BASIS), ShapeError, r"vector: got \(5, 2\)"),
        (lambda: targets.project(BASIS[:, [0, 0]]), InputError, "dependent columns"),
        (lambda: targets.project(BASIS.T), ShapeError, r"got a basis \(2, 5\)"),
        (lambda: targets.project(BASIS * math.nan), NonFiniteError, "the basis holds NaN"),
        (lambda: targets.project(OBLIQUE, U), InputError, "an eraser, which has its shift"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_bad_requests_to_a_factor_are_refused_in_a_sentence() -> None:
    r = rows()
    factor = RidgeFactor.of(r.moments("retain"))
    keys, e = r.keys["forget"], r.outputs["forget"]
    for args, error, message in (
        ((keys[:, :3], e), ShapeError, r"needed \[n, 8\] and \[n, d\]"),
        ((keys, e[:4]), ShapeError, "needed"),
        ((keys[:0], e[:0]), NotEnoughDataError, "no rows to forget"),
        ((keys * math.nan, e), NonFiniteError, "NaN"),
    ):
        with pytest.raises(error, match=message):
            factor.edit(*args)
    with pytest.raises(InputError, match="got alpha=-1"):
        RidgeFactor.of(r.moments("retain"), alpha=-1.0)
