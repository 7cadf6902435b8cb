"""Diagnoses of whole plans: each eraser is judged on the activations that it was made for."""

from __future__ import annotations

import warnings

import pytest
from textkit import pairs, text_model, text_tokenizer
from tiny import hook_count
from torch import nn

from repe_unlearn.activations import capture, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import diagnose_plan, random_plan
from repe_unlearn.diagnostics import Diagnosis, diagnose
from repe_unlearn.errors import ModelMismatchError, NumericalWarning
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan, solve
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site

OPTIONS = {"select": "mean", "progress": False}
FIT, HELDOUT = pairs(54).split(test=0.4)
TOKENIZER = text_tokenizer()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return text_model("llama")


@pytest.fixture(scope="module")
def sites(model: nn.Module) -> tuple[Site, ...]:
    return Architecture.of(model).sites("attn_in", "mlp_out")


@pytest.fixture(scope="module")
def together(model: nn.Module, sites: tuple[Site, ...]) -> ErasurePlan:
    return fit_sequential(model, TOKENIZER, FIT, sites, **OPTIONS)


def judged(model: nn.Module, plan: ErasurePlan, **options: object) -> dict[Site, Diagnosis]:
    return diagnose_plan(model, TOKENIZER, plan, HELDOUT, progress=False, permutations=19, **options)  # type: ignore[arg-type]


def by_hand(model: nn.Module, plan: ErasurePlan, site: Site, earlier: list[Site]) -> Diagnosis:
    """One site, with the erasers of some others applied as hooks."""
    others = {s: plan[s] for s in earlier}
    if others:
        with apply(model, plan.replace(others)):
            rows = gather(model, TOKENIZER, HELDOUT, [site], **OPTIONS)[site]
    else:
        rows = gather(model, TOKENIZER, HELDOUT, [site], **OPTIONS)[site]
    clusters = [HELDOUT.pairs[i] for i in rows.owner.tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        return diagnose(plan[site], rows.x, rows.z, clusters=clusters, permutations=19)


def test_a_sequential_plan_is_judged_with_the_earlier_sites_erased(
    model: nn.Module, together: ErasurePlan
) -> None:
    found = judged(model, together)
    assert tuple(found) == together.sites
    for i, site in enumerate(together.sites):
        assert found[site] == by_hand(model, together, site, list(together.sites[:i])), site
    last = together.sites[-1]
    assert found[last] != by_hand(model, together, last, [])  # control: the untouched model is something else
    assert hook_count(model) == 0


def test_an_independent_plan_is_judged_on_the_untouched_model(
    model: nn.Module, sites: tuple[Site, ...]
) -> None:
    moments = capture(model, TOKENIZER, FIT, sites, **OPTIONS)
    plan = solve(moments, model=model, provenance={"select": "mean"})
    found = judged(model, plan)
    for site in sites:
        assert found[site] == by_hand(model, plan, site, []), site


def test_tells_a_plan_from_a_random_one(model: nn.Module, sites: tuple[Site, ...]) -> None:
    plan = solve(capture(model, TOKENIZER, FIT, sites, **OPTIONS), model=model, provenance={"select": "mean"})
    ours, control = judged(model, plan), judged(model, random_plan(plan))
    first = sites[0]
    assert ours[first].before.low > 0.6
    assert ours[first].before == control[first].before
    assert ours[first].after.correlation < 0.5 < control[first].after.correlation


@pytest.mark.filterwarnings("error::repe_unlearn.errors.NumericalWarning")
def test_warns_once_for_all_sites(model: nn.Module, together: ErasurePlan) -> None:
    with pytest.warns(NumericalWarning) as caught:
        judged(model, together)
    rows = [str(w.message) for w in caught if "fewer than 2 d rows" in str(w.message)]
    assert len(rows) == 1
    assert rows[0].startswith(f"at {len(together)} of {len(together)} sites, worst at ")
    assert all(w.filename == __file__ for w in caught)


def test_another_model_is_refused(together: ErasurePlan) -> None:
    with pytest.raises(ModelMismatchError):
        judged(text_model("llama", seed=1), together)
