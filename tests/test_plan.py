from __future__ import annotations

import warnings
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from reference import planted
from torch import nn

from repe_unlearn.diagnostics import FitSummary, summarize
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NoConceptWarning,
    NotEnoughDataError,
    NumericalWarning,
    OutputExistsError,
    UnknownSiteError,
)
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.moments import Moments
from repe_unlearn.plan import ErasurePlan, gathered_warnings, solve, solver_name
from repe_unlearn.sites import Site
from repe_unlearn.solvers import leace, mean_difference, random
from repe_unlearn.tensorfile import write_tensors

A, B = Site("0"), Site("1", "input")


def moments() -> dict[Site, Moments]:
    return {A: Moments.of(*planted(5)), B: Moments.of(*planted(5, seed=1))}


def some_plan() -> ErasurePlan:
    return solve(moments(), fingerprint="0123456789abcdef", provenance={"concept": "tense"})


def same(a: ErasurePlan, b: ErasurePlan) -> bool:
    return (
        a.sites == b.sites
        and a.fingerprint == b.fingerprint
        and a.provenance == b.provenance
        and a.diagnostics == b.diagnostics
        and all(
            torch.equal(getattr(a[site], name), getattr(b[site], name))
            for site in a.sites
            for name in ("left", "right", "shift")
        )
    )


def test_solve_gives_every_site_its_own_eraser() -> None:
    plan = some_plan()
    assert plan.sites == (A, B)
    assert len(plan) == 2
    assert plan.rank == 4
    for site, m in moments().items():
        assert plan[site].allclose(leace(m))
    assert not plan[A].allclose(plan[B])
    assert plan.provenance["solver"] == "leace"
    assert plan.provenance["concept"] == "tense"


def test_solve_takes_any_solver_and_writes_its_options_down() -> None:
    plan = solve(moments(), partial(mean_difference, affine=False), fingerprint="f")
    assert plan[A].is_linear
    assert plan.provenance["solver"] == "mean_difference(affine=False)"
    assert solver_name(partial(partial(leace, affine=False), rtol=0.1)) == "leace(affine=False, rtol=0.1)"
    assert solver_name(leace) == "leace"


def test_solve_needs_to_know_the_model() -> None:
    with pytest.raises(InputError, match="model or its fingerprint"):
        solve(moments())
    model = nn.Linear(2, 2)
    assert solve(moments(), model=model).fingerprint == fingerprint(model)


def test_the_worst_residual_is_written_down() -> None:
    assert float(some_plan().provenance["residual"]) < 1e-12
    assert float(solve(moments(), random, fingerprint="f").provenance["residual"]) > 0.3
    m = moments()[A]
    first_only = Eraser(leace(m).left[:, :1], leace(m).right[:1], m.mean_x)
    wanted = (first_only.matrix() @ m.m_xz).norm() / m.m_xz.norm()
    assert summarize(first_only, m).residual == pytest.approx(float(wanted))
    unrelated = Moments.of(torch.tensor([[0.0], [1.0], [0.0], [1.0]]), torch.tensor([0, 0, 1, 1]))
    assert summarize(random(unrelated, rank=1), unrelated).residual == 0.0


def weak_moments() -> dict[Site, Moments]:
    """Site 0 has too few rows, sites 1 and 3 an outlier (3 the wider one), site 2 nothing to be said."""
    x, z = planted(2)
    wide, wider = x.clone(), x.clone()
    wide[:, 3] *= 1e4
    wider[:, 5] *= 1e6
    parts = {"0": (x[:20], z[:20]), "1": (wide, z), "2": (x, z), "3": (wider, z)}
    return {Site(name): Moments.of(*part) for name, part in parts.items()}


def test_every_fit_is_diagnosed_and_warned_of_once_per_kind() -> None:
    moments = weak_moments()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = solve(moments, fingerprint="f")
    assert plan.diagnostics == {site: summarize(plan[site], m) for site, m in moments.items()}
    texts = [str(w.message) for w in caught]
    assert [w.category for w in caught] == [NumericalWarning] * len(texts)
    assert all(w.filename == __file__ for w in caught)
    by_kind = {kind: [t for t in texts if kind in t] for kind in ("2 d rows", "coordinate", "rank 0")}
    assert [len(found) for found in by_kind.values()] == [1, 1, 0]
    assert by_kind["2 d rows"][0].startswith("at 1 of 4 sites (0): 20 rows for d = 12")
    assert by_kind["coordinate"][0].startswith("at 2 of 4 sites, worst at 3: coordinate 5 is")
    assert "leave out" in by_kind["coordinate"][0].lower()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve({Site("2"): moments[Site("2")]}, fingerprint="f")


def test_an_eraser_of_much_of_the_variance_is_warned_of() -> None:
    with pytest.warns(NumericalWarning, match=r"^the eraser moves \d\d % of the variance.*shrinkage"):
        solve({A: moments()[A]}, partial(random, rank=10), fingerprint="f")


def test_rank_zero_is_said_once_whoever_says_it() -> None:
    x, z = planted(2)
    clean = {A: Moments.of(leace(Moments.of(x, z))(x), z)}

    def silent(m: Moments) -> Eraser:
        return Eraser(m.mean_x[:, None][:, :0], m.mean_x[None][:0], m.mean_x)

    for solver, category in ((leace, NoConceptWarning), (silent, NumericalWarning)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert solve(clean, solver, fingerprint="f").rank == 0
        assert [w.category for w in caught] == [category]


def test_diagnostics_belong_to_the_eraser_that_was_fit() -> None:
    plan = some_plan()
    other = plan.replace({A: plan[A], B: plan[B].partial(0.5)})
    assert dict(other.diagnostics) == {A: plan.diagnostics[A]}
    with pytest.raises(TypeError):
        plan.diagnostics[A] = plan.diagnostics[B]  # type: ignore[index]
    with pytest.raises(InputError, match="diagnostics of 1:input, where the plan has no eraser"):
        ErasurePlan({A: plan[A]}, "f", {}, plan.diagnostics)
    with pytest.raises(InputError, match=r"energy: got nan; needed a finite number"):
        FitSummary(3, 2, 1, 1.0, float("nan"), 1.0, 0, 0.0)


def test_files_without_diagnostics_are_read(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "p", GOOD_TENSORS, kind="erasure plan", version=1, header=GOOD_HEADER, force=False
    )
    assert ErasurePlan.load(tmp_path / "p").diagnostics == {}


def test_solve_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one site"):
        solve({}, fingerprint="f")


def test_solve_says_at_which_site_it_failed() -> None:
    x, z = planted(2)
    bad = {A: Moments.of(x, z), B: Moments.of(x, z * 0, classes=2)}
    with pytest.raises(NotEnoughDataError) as caught:
        solve(bad, fingerprint="f")
    assert caught.value.__notes__ == ["at site 1:input"]


def test_solve_gathers_the_warnings_of_many_sites() -> None:
    x, z = planted(2)
    clean = Moments.of(leace(Moments.of(x, z))(x), z)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = solve({A: clean, B: clean, Site("2"): Moments.of(x, z)}, fingerprint="f")
    messages = [str(w.message) for w in caught if w.category is NoConceptWarning]
    assert len(messages) == 1
    assert "(and 1 more sites alike)" in messages[0]
    assert [e.rank for e in plan.erasers.values()] == [0, 0, 1]


def test_other_warnings_pass_through_the_gathering() -> None:
    with pytest.warns(UserWarning, match="unrelated"), gathered_warnings():
        warnings.warn("unrelated", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gathered_warnings():
            pass


def test_a_plan_is_immutable() -> None:
    table = {A: leace(moments()[A])}
    plan = ErasurePlan(table, "f", {"n": 3})  # type: ignore[dict-item]
    table[B] = table[A]
    assert plan.sites == (A,)
    assert plan.provenance["n"] == "3"
    with pytest.raises(TypeError):
        plan.erasers[B] = table[A]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        plan.fingerprint = "g"  # type: ignore[misc]
    other = plan.replace({B: table[A]})
    assert other.sites == (B,)
    assert plan.sites == (A,)
    assert other.provenance == plan.provenance
    with pytest.raises(InputError, match="at least one site"):
        plan.replace({})


def test_requires_its_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plan = ErasurePlan(some_plan().erasers, fingerprint(model))
    plan.require(model)
    with pytest.raises(ModelMismatchError, match=plan.fingerprint):
        plan.require(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(UnknownSiteError):
        plan.require(nn.Sequential(nn.Linear(3, 3)))


def test_repr_and_html_escape() -> None:
    plan = ErasurePlan(some_plan().erasers, "f", {"concept": "<b>"})
    assert repr(plan) == "ErasurePlan(2 sites, rank<=4, concept='<b>', model=f)"
    assert "concept=&#x27;&lt;b&gt;" in plan._repr_html_()
    assert "<td>1:input</td><td>4</td><td>12</td><td></td>" in plan._repr_html_()
    known = some_plan()
    most = max(numbers.energy for numbers in known.diagnostics.values())
    assert f"rank<=4, moves<={100 * most:.2g}% of the variance, concept" in repr(known)
    assert f"<td>12</td><td>{known.diagnostics[B].energy:.2%}</td>" in known._repr_html_()


def test_file_round_trip(tmp_path: Path) -> None:
    plan = some_plan()
    loaded = ErasurePlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert same(loaded, plan)
    assert not same(loaded, solve(moments(), mean_difference, fingerprint=plan.fingerprint))


def test_rank_zero_and_narrow_dtypes_survive_the_file(tmp_path: Path) -> None:
    empty = Eraser(torch.zeros(4, 0).double(), torch.zeros(0, 4).double(), torch.ones(4).double())
    plan = ErasurePlan({A: empty, B: leace(moments()[B]).to(dtype=torch.bfloat16)}, "f")
    loaded = ErasurePlan.load(plan.save(tmp_path / "p"))
    assert same(loaded, plan)
    assert [loaded[s].dtype for s in (A, B)] == [torch.float64, torch.bfloat16]


def test_existing_files_need_force(tmp_path: Path) -> None:
    plan, other = some_plan(), solve(moments(), mean_difference, fingerprint="f")
    path = plan.save(tmp_path / "p")
    with pytest.raises(OutputExistsError):
        other.save(path)
    assert same(ErasurePlan.load(path), plan)
    other.save(path, force=True)
    assert same(ErasurePlan.load(path), other)


def test_a_failing_write_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = some_plan()
    path = plan.save(tmp_path / "p")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for target, force in ((path, True), (tmp_path / "q", False)):
        with pytest.raises(OSError, match="No space left"):
            plan.save(target, force=force)
    assert list(tmp_path.iterdir()) == [path]
    assert same(ErasurePlan.load(path), plan)


@pytest.mark.parametrize("where", [0, 4, 8, 100, 0.5, -1])
def test_truncated_plans_are_refused(tmp_path: Path, where: float) -> None:
    path = some_plan().save(tmp_path / "p")
    whole = path.read_bytes()
    end = int(where * len(whole)) if isinstance(where, float) else where
    path.write_bytes(whole[:end])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        ErasurePlan.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    safetensors.torch.save_file({"0.left": torch.zeros(2, 1)}, path)
    with pytest.raises(FileFormatError, match="something else"):
        ErasurePlan.load(path)
    moments()[A].save(path, force=True)
    with pytest.raises(FileFormatError, match="holds 'moments'; needed 'erasure plan'"):
        ErasurePlan.load(path)
    write_tensors(path, {}, kind="erasure plan", version=2, header={}, force=True)
    with pytest.raises(FileFormatError, match=r"version 2.*Upgrade"):
        ErasurePlan.load(path)


GOOD_HEADER = {"sites": ["0"], "fingerprint": "f", "provenance": {}}
NUMBERS = ("n", "d", "rank", "effective_rank", "energy", "outlier", "widest", "residual")
GOOD_TENSORS = {"0.left": torch.ones(2, 1), "0.right": torch.ones(1, 2), "0.shift": torch.zeros(2)}


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({"0.shift": torch.zeros(3)}, {}),
        ({"0.left": torch.full((2, 1), float("nan"))}, {}),
        ({"0.left": torch.ones(2, 1, dtype=torch.int64)}, {}),
        ({}, {"sites": ["0", "1"]}),
        ({}, {"sites": []}),
        ({}, {"sites": ["0:sideways"]}),
        ({}, {"sites": [3]}),
        ({}, {"sites": 3}),
        ({}, {"provenance": None}),
        ({}, {"diagnostics": None}),
        ({}, {"diagnostics": {"0": {}}}),
        ({}, {"diagnostics": {"0": dict.fromkeys(NUMBERS, "many")}}),
        ({}, {"diagnostics": {"1": dict.fromkeys(NUMBERS, 1)}}),
    ],
)
def test_a_plan_file_that_makes_no_sense_is_refused(tmp_path: Path, tensors: dict, header: dict) -> None:
    path = tmp_path / "p"

    def write(tensors: dict, header: dict) -> None:
        write_tensors(path, tensors, kind="erasure plan", version=1, header=header, force=True)

    write(GOOD_TENSORS, GOOD_HEADER)
    assert len(ErasurePlan.load(path)) == 1
    write({**GOOD_TENSORS, **tensors}, {**GOOD_HEADER, **header})
    with pytest.raises(FileFormatError, match="not a whole plan"):
        ErasurePlan.load(path)
