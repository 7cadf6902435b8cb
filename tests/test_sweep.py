"""Sweep: the grid, its files, the front that nothing beats; and what the spectrum foresees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from unlearnkit import FACTS, NEUTRAL, original

from repe_unlearn.activations import gather
from repe_unlearn.closed_form import closed_form
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    NonFiniteError,
    NotEnoughDataError,
)
from repe_unlearn.measured import Measured
from repe_unlearn.methods import METHODS
from repe_unlearn.moments import Moments
from repe_unlearn.outlook import Outlook, foresee
from repe_unlearn.sites import Site
from repe_unlearn.solvers import Target, ridge_edit
from repe_unlearn.solvers.spectrum import Prediction
from repe_unlearn.sweep import Point, Sweep, front, sweep

BEFORE = Measured(forget_unseen=1.0, retain=0.8, neighbour=0.5)


def point(label: int, forget: float, kept: float, kl: float = 0.01) -> Point:
    row = Measured("npo", {}, 0, forget_unseen=forget, retain=0.8 * kept, neighbour=0.5, kl=kl)
    return Point({"steps": label}, row)


POINTS = (
    point(0, 0.5, 1.0),
    point(1, 0.1, 0.95),
    point(2, 0.1, 0.90),  # beaten by 1
    point(3, 0.0, 0.3),
    Point({"steps": 4}, None, "the loss became NaN"),
    point(5, 0.1, 0.95, kl=0.5),  # beaten by 1
    point(6, 0.3, 1.0),
)
SWEEP = Sweep("npo", BEFORE, POINTS)


def test_the_front_is_what_no_other_beats() -> None:
    assert [p.options["steps"] for p in SWEEP.front()] == [3, 1, 6]
    assert front([(1, 2), (2, 1), (2, 2), (1, 2)], lambda x: x) == [(1, 2), (1, 2), (2, 1)]
    assert front([(math.nan, 0), (1, 1)], lambda x: x) == [(1, 1), (math.nan, 0)]
    assert SWEEP.kept(POINTS[3]) == pytest.approx(0.3)
    assert math.isnan(SWEEP.kept(POINTS[4]))


def test_the_best_within_bounds() -> None:
    assert SWEEP.best().options == {"steps": 1}
    assert SWEEP.best(kept=0.99).options == {"steps": 6}
    assert SWEEP.best(kept=0.2, kl=1.0).options == {"steps": 3}
    with pytest.raises(InputError, match=r"no setting of npo keeps 1\.5.*nearest is steps="):
        SWEEP.best(kept=1.5)
    with pytest.raises(InputError, match="none of 1 settings of npo ran"):
        Sweep("npo", BEFORE, POINTS[4:5]).best()


def test_rows_and_table() -> None:
    rows = SWEEP.rows()
    assert [row["front"] for row in rows] == [False, True, False, True, False, False, True]
    assert rows[4]["error"] == "the loss became NaN"
    assert rows[1]["kept"] == pytest.approx(0.95)
    html = SWEEP._repr_html_()
    assert html.count("<tr>") == 1 + len(POINTS)
    assert "the loss became NaN" in html
    assert "7 points, 1 failed, 3 on the front" in repr(SWEEP)


def test_the_figure_shows_every_point_and_says_what_the_axes_are() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    ax = SWEEP.plot()
    assert "forget accuracy" in ax.get_xlabel()
    assert "share of before" in ax.get_ylabel()
    drawn = [tuple(xy) for line in ax.lines for xy in zip(*line.get_data(), strict=True)]
    for p in POINTS:
        if p.measured is not None:
            assert any(
                math.isclose(x, p.measured.forget_unseen) and math.isclose(y, SWEEP.kept(p)) for x, y in drawn
            ), p
    with pytest.raises(InputError, match="nothing to draw"):
        Sweep("npo", BEFORE, POINTS[4:5]).plot()


def test_points_are_run_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = original()
    ran: list[tuple[Any, Any]] = []

    def attempted(_m: Any, _t: Any, _f: Any, _method: Any, options: dict[str, Any], **how: Any) -> Any:
        ran.append((options["steps"], options["lr"]))
        if options["lr"] > 1:
            raise NonFiniteError("the loss became NaN at step 1")
        return None, Measured("npo", options, how["seed"], forget_unseen=1 / options["steps"], kl=0.0)

    monkeypatch.setattr("repe_unlearn.sweep.attempt", attempted)
    how = {"fixed": {"batch": 2}, "folder": tmp_path, "texts": NEUTRAL[:1], "progress": False}
    first = sweep(model, tokenizer, FACTS, "npo", {"steps": [1, 2], "lr": [0.1, 5.0]}, **how)
    assert ran == [(1, 0.1), (1, 5.0), (2, 0.1), (2, 5.0)]
    assert [p.options for p in first.points][1] == {"steps": 1, "lr": 5.0}
    assert first.points[1].error == "the loss became NaN at step 1"
    assert first.points[0].measured.settings["batch"] == 2  # type: ignore[union-attr]
    again = sweep(model, tokenizer, FACTS, "npo", {"steps": [1, 2, 4], "lr": [0.1, 5.0]}, **how)
    assert ran[4:] == [(4, 0.1), (4, 5.0)]
    for new, old in zip(again.points, first.points, strict=False):
        assert (new.options, new.error) == (old.options, old.error)
        assert repr(new.measured) == repr(old.measured)  # as text, because NaN is not NaN
    del ran[:]
    sweep(model, tokenizer, FACTS, "npo", {"steps": [1], "lr": [0.1]}, **how, seed=1)
    sweep(model, tokenizer, FACTS.only("forget", "retain"), "npo", {"steps": [1], "lr": [0.1]}, **how)
    assert ran == [(1, 0.1)] * 2  # another seed, other facts: other points
    for file in tmp_path.glob("npo-*.json"):
        file.write_text("{")
    with pytest.raises(FileFormatError, match="delete it"):
        sweep(model, tokenizer, FACTS, "npo", {"steps": [1], "lr": [0.1]}, **how)


def test_a_real_sweep_leaves_the_model_alone() -> None:
    model, tokenizer = original()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = sweep(
        model, tokenizer, FACTS, "random", {"relative": [0.01, 3.0]}, texts=NEUTRAL[:2], progress=False
    )
    small, large = (p.measured for p in found.points)
    assert small is not None
    assert large is not None
    assert small.kl < large.kl
    assert small.forget_unseen == found.before.forget_unseen == 1.0
    assert large.relative == pytest.approx(300 * small.relative, rel=1e-6)
    assert all(torch.equal(old[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [({}, "empty grid"), ({"steps": []}, "empty grid"), ({"stepz": [1]}, "npo has no option 'stepz'")],
)
def test_wrong_grids(grid: dict[str, Any], complaint: str) -> None:
    model, tokenizer = original()
    with pytest.raises(InputError, match=complaint):
        sweep(model, tokenizer, FACTS, METHODS["npo"], grid, progress=False)


def test_what_is_foreseen_is_what_the_edit_does() -> None:
    model, tokenizer = original()
    how = {"layers": [2], "ridge": 0.1, "beta": 2.0, "progress": False}
    outlook = foresee(model, tokenizer, FACTS, distortion=0.05, **how)
    ((site, p),) = outlook.predictions.items()
    assert site == Site("model.layers.2.mlp.down_proj", "input")
    assert (outlook.chosen, outlook.best) == ((2,), (site, p))
    assert outlook.alpha == pytest.approx(p.alpha)
    block = Site("model.layers.2")
    rows: dict[str, torch.Tensor] = {}
    outs: dict[str, torch.Tensor] = {}
    wordings: dict[str, list[str]] = {}
    for role in ("forget", "retain", "neighbour"):
        kept = FACTS.only(role, relation="home town") if role == "retain" else FACTS.only(role)  # type: ignore[arg-type]
        prompts = [q.prompt for q in kept.questions("seen")]
        wordings[role] = [q.template for q in kept.questions("seen")]
        contrast = Contrast.from_labels(prompts, [i % 2 for i in range(len(prompts))])
        found = gather(model, tokenizer, contrast, [site, block], progress=False)
        rows[role], outs[role] = found[site].x.double(), found[block].x.double()
    weight = model.get_parameter("model.layers.2.mlp.down_proj.weight").double()
    moments = {role: Moments.of(x, outs[role]) for role, x in rows.items()}
    out = outs["retain"]
    # As in the edit itself: what is written on average in the same wording.
    means = {
        w: out[[i for i, v in enumerate(wordings["retain"]) if v == w]].mean(0) for w in wordings["forget"]
    }
    wanted = torch.stack([means[w] for w in wordings["forget"]]) - outs["forget"]
    delta = ridge_edit(
        weight,
        Moments.of(rows["forget"], wanted),
        moments["retain"],
        target=Target("given", lambda weight, forget, retain: forget),
        alpha=p.alpha,
        ridge=0.1,
        neighbour=moments["neighbour"],
        beta=2.0,
    ).delta()
    missed = wanted - rows["forget"] @ delta.T
    moved = (rows["retain"] @ delta.T).square().sum() / out.square().sum()
    assert p.remaining == pytest.approx(float(missed.square().sum() / wanted.square().sum()), rel=1e-5)
    assert p.distortion == pytest.approx(float(moved), rel=1e-4)
    assert p.distortion <= 0.05
    share = wanted.square().sum() / outs["forget"].square().sum()
    assert outlook.wanted[site] == pytest.approx(float(share), rel=1e-5)
    assert outlook.reach(site) == pytest.approx((1 - p.remaining) * float(share), rel=1e-5)
    less = foresee(model, tokenizer, FACTS, distortion=0.001, **how)
    assert less.best[1].remaining > p.remaining
    with pytest.raises(InputError, match="no edit of any of 1 weights"):
        foresee(model, tokenizer, FACTS, distortion=1e-9, **how)


def test_layers_that_reach_three_quarters_as_far_as_the_best_are_chosen() -> None:
    def row(alpha: float, remaining: float) -> Prediction:
        return Prediction(alpha, remaining, 0.02, math.nan, 3.0, 0.1)

    sites = [Site(f"model.layers.{i}.mlp.down_proj", "input") for i in range(4)]
    rows = (row(1.0, 0.6), row(4.0, 0.2), row(1.0, 0.3), row(9.0, 0.0))
    outlook = Outlook(
        dict(zip(sites, rows, strict=True)),
        # The last weight could do all that is wanted there, and that is next to nothing.
        dict(zip(sites, (0.5, 0.5, 0.5, 0.01), strict=True)),
        {site: i for i, site in enumerate(sites)},
        0.02,
    )
    assert outlook.chosen == (1, 2)
    assert outlook.alpha == pytest.approx(2.0)
    assert outlook.best[0] == sites[1]
    assert [outlook.reach(site) for site in sites] == pytest.approx([0.2, 0.4, 0.35, 0.01])
    assert [r["layer"] for r in outlook.rows()] == [0, 1, 2, 3]
    assert [r["reach"] for r in outlook.rows()] == pytest.approx([0.2, 0.4, 0.35, 0.01])
    assert "layers 1, 2" in repr(outlook)
    assert "changes 40% of the stream" in repr(outlook)
    assert outlook._repr_html_().count("<tr>") == 5


@pytest.mark.parametrize("target", ["zero", "mean_decoy", "redirect", "rmu"])
def test_every_target_of_the_edit_can_be_foreseen(target: str) -> None:
    model, tokenizer = original()
    how = {"layers": [2], "ridge": 0.1, "beta": 2.0, "progress": False}
    outlook = foresee(model, tokenizer, FACTS, target=target, distortion=10.0, **how)
    (p,) = outlook.predictions.values()
    patch = closed_form(
        model, tokenizer, FACTS, target=target, alpha=p.alpha, texts=(), writers=["mlp_out"], **how
    )
    (edit,) = patch.edits.values()
    size = float(edit.delta().norm() / model.get_parameter("model.layers.2.mlp.down_proj.weight").norm())
    assert p.relative == pytest.approx(size, rel=1e-3)


def test_attention_is_measured_by_what_it_adds_to_the_stream() -> None:
    model, tokenizer = original()
    how = {"layers": [2], "ridge": 0.1, "beta": 2.0, "distortion": 0.5, "progress": False}
    outlook = foresee(model, tokenizer, FACTS, writers=["attn_out"], **how)
    ((site, _),) = outlook.predictions.items()
    asked = {role: FACTS.only(role).questions("seen") for role in ("forget", "retain")}
    asked["retain"] = FACTS.only("retain", relation="home town").questions("seen")
    contrast = Contrast.from_classes({role: [q.prompt for q in qs] for role, qs in asked.items()})
    sites = [Site("model.layers.2.self_attn.o_proj"), Site("model.layers.2")]
    found = gather(model, tokenizer, contrast, sites, progress=False)
    n = len(asked["forget"])
    written, stream = (found[s].x.double() for s in sites)
    means: dict[str, list[torch.Tensor]] = {}
    for q, row in zip(asked["retain"], written[n:], strict=True):
        means.setdefault(q.template, []).append(row)
    away = torch.stack([torch.stack(means[q.template]).mean(0) for q in asked["forget"]]) - written[:n]
    share = float(away.square().sum() / stream[:n].square().sum())
    assert outlook.wanted[site] == pytest.approx(share, rel=1e-5)


def test_what_cannot_be_foreseen() -> None:
    model, tokenizer = original()
    with pytest.raises(NotEnoughDataError, match="needs facts with the role forget"):
        foresee(model, tokenizer, FACTS.only("retain"), progress=False)
    with pytest.raises(InputError, match="needed mlp_out, attn_out"):
        foresee(model, tokenizer, FACTS, writers=["mlp_in"], progress=False)
    with pytest.raises(InputError, match=r"got target='nothing'; needed one of mean_retain"):
        foresee(model, tokenizer, FACTS, target="nothing", progress=False)
    known = FACTS.where(lambda fact: fact.role != "decoy")
    with pytest.raises(NotEnoughDataError, match="needs facts with the role 'decoy'"):
        foresee(model, tokenizer, known, target="mean_decoy", progress=False)
