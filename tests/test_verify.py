from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from auditkit import NEUTRAL, spoken
from textkit import text_model, text_tokenizer
from tiny import assert_same, hook_count, random_plan, snapshot
from torch import nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import Report, verify
from repe_unlearn.audit import random_plan as control_of
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, ModelMismatchError, NotEnoughDataError, VerificationError
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site
from repe_unlearn.solvers import leace, random

module = importlib.import_module(
    "repe_unlearn.audit.battery"
)  # the function of that name hides it from import

PROBES = (
    "probe.transferred.linear",
    "probe.refit.linear",
    "probe.refit.mlp",
    "probe.refit.rbf",
    "gap.heldout",
)
FIT, HELDOUT = spoken().split(0.4)

look = partial(verify, fit=FIT, heldout=HELDOUT, neutral=NEUTRAL, progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return text_tokenizer()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def plans(llama: nn.Module, tokenizer: PreTrainedTokenizerFast) -> Callable[..., ErasurePlan]:
    def make(solver: Callable, fit: Contrast = FIT) -> ErasurePlan:
        sites = Architecture.of(llama).sites("attn_in", "mlp_in", layers=[0])
        return fit_sequential(llama, tokenizer, fit, sites, solver, select="mean", progress=False)

    return make


@pytest.fixture(scope="module")
def plan(plans: Callable[..., ErasurePlan]) -> ErasurePlan:
    return plans(leace)


@pytest.fixture(scope="module")
def report(llama: nn.Module, tokenizer: PreTrainedTokenizerFast, plan: ErasurePlan) -> Report:
    before = snapshot(llama)
    made = look(llama, tokenizer, plan, others={"halfway": plan.replace(half(plan))})
    assert_same(before, llama)
    assert hook_count(llama) == 0
    return made


def half(plan: ErasurePlan) -> dict:
    return {site: plan[site].partial(0.5) for site in plan.sites}


def named(report: Report, name: str) -> list:
    return [check for check in report.checks if check.name == name]


def test_a_good_eraser_passes_with_three_numbers_at_every_site(report: Report, plan: ErasurePlan) -> None:
    assert report.passed, report.failed
    report.raise_if_failed()
    for name in PROBES:
        rows = named(report, name)
        assert [row.site for row in rows] == [str(site) for site in plan.sites], name
        for row in rows:
            assert row.control is not None, name
            assert row.low is not None, name
            assert row.high is not None, name
            assert row.low <= row.value <= row.high, name
            assert row.value < row.control, name  # less is found than in the untouched model
    for row in named(report, "probe.refit.linear"):
        assert row.value <= 0.6 < 0.9 <= row.control
        assert "random eraser 0.9" in row.note or "random eraser 1.0" in row.note
    assert report.verdict.startswith("Linearly guarded on unseen prompts at all 2 sites")
    assert "An MLP probe reads up to" in report.verdict
    assert "Not attacked" in report.verdict


def test_controls_cost_and_equivalence_are_in_the_report(report: Report) -> None:
    for name in ("control.probe_works", "control.random_eraser", "control.shuffled_labels", "fit.residual"):
        assert [check.passed for check in named(report, name)] == [True], name
    whole, part = (named(report, f"cost.kl_mean.{name}")[0].value for name in ("this_plan", "halfway"))
    assert 0 < part < whole
    logits, tokens = named(report, "bake.equals_hook.logits")[0], named(report, "bake.equals_hook.tokens")[0]
    assert logits.value <= 1e-4 < 0.1 < logits.control
    assert tokens.value == 1.0
    assert not named(report, "export.equals_bake.bits")  # nothing exported, nothing claimed
    assert {series.figure for series in report.series} >= {
        "Linear probe, trained and tested on unseen prompts",
        "Linear probe, trained on fitting prompts",
        "MLP probe, trained and tested on unseen prompts",
        "RBF probe, trained and tested on unseen prompts",
        "Distance of held-out class means",
        "Removal against cost",
        "Learning curve: gap left against number of fitting pairs",
    }
    assert report.facts["concept"] == "sounds"
    assert f"{len(FIT)} fitting, {len(HELDOUT)} held out" in report.facts["probe prompts"]
    assert report.facts["not attacked"]


def test_the_report_saves_and_reads_back(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = report.save(tmp_path / "report")
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    assert Report.from_json((page.parent / "report.json").read_text()).to_json() == report.to_json()
    assert json.loads((page.parent / "report.json").read_text())["passed"] is True
    assert "Linearly guarded" in page.read_text()


def test_a_broken_eraser_fails(
    llama: nn.Module, tokenizer: PreTrainedTokenizerFast, plans: Callable[..., ErasurePlan]
) -> None:
    bad = look(llama, tokenizer, plans(random))
    assert not bad.passed
    failed = {check.name for check in bad.failed}
    assert {"probe.refit.linear", "fit.residual"} <= failed
    assert all(check.passed is False for check in named(bad, "probe.refit.linear"))
    assert "Still linearly readable on unseen prompts at 2 of 2 sites" in bad.verdict
    # the controls hold: it is the eraser that is bad and not the measurement
    assert not failed & {"control.probe_works", "control.random_eraser", "control.shuffled_labels"}
    with pytest.raises(VerificationError, match=r"probe\.refit\.linear"):
        bad.raise_if_failed()


def test_half_an_eraser_fails_too(
    llama: nn.Module, tokenizer: PreTrainedTokenizerFast, plan: ErasurePlan
) -> None:
    bad = look(llama, tokenizer, plan.replace(half(plan)))
    assert "probe.refit.linear" in {check.name for check in bad.failed}


@pytest.mark.parametrize("leaked", [FIT, HELDOUT])
def test_leaked_prompts_are_refused(
    llama: nn.Module, tokenizer: PreTrainedTokenizerFast, plans: Callable[..., ErasurePlan], leaked: Contrast
) -> None:
    plan = plans(leace, leaked)
    with pytest.raises(InputError, match=rf"{len(leaked)} held-out prompts are also fitting prompts.*split"):
        verify(llama, tokenizer, plan, fit=leaked, heldout=leaked, neutral=NEUTRAL, progress=False)
    one = replace(HELDOUT, examples=(*HELDOUT.examples, FIT.examples[0]))
    with pytest.raises(InputError, match="1 held-out prompts are also fitting prompts"):
        verify(llama, tokenizer, plan, fit=FIT, heldout=one, neutral=NEUTRAL, progress=False)


@pytest.mark.parametrize("step", ["gather", "learning_curve", "costs", "outputs"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    llama: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    plan: ErasurePlan,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from repe_unlearn.audit import equivalence

    owner = equivalence if step == "outputs" else module
    real, calls = getattr(owner, step), []

    def failing(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == {"gather": 4, "outputs": 3}.get(step, 1):  # under hooks, and on baked weights
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, step, failing)
    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt):
        look(llama, tokenizer, plan, probe_prompts=48)
    assert_same(before, llama)
    assert hook_count(llama) == 0


def test_another_model_and_unusable_contrasts(
    llama: nn.Module, tokenizer: PreTrainedTokenizerFast, plan: ErasurePlan
) -> None:
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        look(text_model("llama", seed=1), tokenizer, plan)
    few = FIT.sample(10)
    with pytest.raises(NotEnoughDataError, match="10 pairs; a learning curve needs at least 12"):
        verify(llama, tokenizer, plan, fit=few, heldout=HELDOUT, neutral=NEUTRAL, progress=False)
    one_group = Contrast.from_pairs([(f"he {i}", f"she {i}") for i in range(12)], groups=["same"] * 12)
    with pytest.raises(NotEnoughDataError, match="one content group"):
        verify(llama, tokenizer, plan, fit=FIT, heldout=one_group, neutral=NEUTRAL, progress=False)
    reals = Contrast.from_reals(HELDOUT.texts, [float(i % 7) for i in range(len(HELDOUT))])
    with pytest.raises(InputError, match="class labels"):
        verify(llama, tokenizer, plan, fit=FIT, heldout=reals, neutral=NEUTRAL, progress=False)
    assert hook_count(llama) == 0


# Models and plans that cannot be baked


class Unknown(nn.Module):
    """A model of no family: bag of embeddings, one layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(260, 24), nn.Linear(24, 24), nn.Linear(24, 260)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: object = None, use_cache: bool = False
    ) -> object:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(self.mix(self.embed(input_ids))))


def test_an_unknown_architecture_is_verified_without_bake(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = Unknown().eval().requires_grad_(False)
    plan = fit_sequential(model, tokenizer, FIT, [Site("mix")], select="mean", progress=False)
    found = look(model, tokenizer, plan)
    (row,) = named(found, "bake.possible")
    assert row.passed is None
    assert "Unknown" in row.note
    assert "add a row" in row.note
    assert found.passed, found.failed
    assert not named(found, "bake.equals_hook.logits")
    # an export that was asked for and cannot be held against anything must not look like a pass
    asked = look(model, tokenizer, plan, exported=tmp_path)
    assert not asked.passed
    assert [check.name for check in asked.failed] == ["export.equals_bake.bits"]


def test_a_hook_only_plan_is_verified_without_bake(
    llama: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    sites = Architecture.of(llama).sites("resid_post", layers=[0])
    plan = fit_sequential(llama, tokenizer, FIT, sites, select="mean", progress=False)
    (row,) = named(look(llama, tokenizer, plan, probe_prompts=96), "bake.possible")
    assert "skip path" in row.note


# Parts


def test_the_random_control_has_the_same_rank_and_other_directions(llama: nn.Module) -> None:
    plan = random_plan(llama, Architecture.of(llama).sites("attn_in"), rank=3)
    control = control_of(plan, seed=1)
    assert control.sites == plan.sites
    assert control.fingerprint == plan.fingerprint
    for site in plan.sites:
        assert control[site].rank == 3
        assert control[site].is_orthogonal
        assert torch.equal(control[site].shift, plan[site].shift)
        assert not control[site].allclose(plan[site])
    assert control[plan.sites[0]].allclose(control_of(plan, seed=1)[plan.sites[0]])
    assert not control[plan.sites[0]].allclose(control_of(plan, seed=2)[plan.sites[0]])


def test_units_and_samples_of_paired_and_unpaired_contrasts() -> None:
    assert FIT.units() == (len(FIT) // 2, 2.0)
    lopsided = Contrast.from_classes(
        {"a": [f"a{i}" for i in range(300)], "b": [f"b{i}" for i in range(30)]}, name="lopsided"
    )
    assert lopsided.units() == (30, 2.0)
    reals = Contrast.from_reals([f"t{i}" for i in range(9)], range(9))
    assert reals.units() == (9, 1.0)
    for contrast in (FIT, lopsided):
        for most in (48, 100, 10**6):
            part = module.at_most(contrast, most, 0)
            assert 2 <= len(part) <= max(most, 2)
            assert {*part.labels} == {0, 1}
    assert module.at_most(lopsided, 10**6, 0) is lopsided
