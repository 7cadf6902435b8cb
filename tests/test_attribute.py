"""Audits of an erased attribute, of models whose truth is known: erased in the weights, untouched, edited at random."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from auditkit import NEUTRAL, jsonl, sounds, spoken
from textkit import text_model, text_tokenizer
from tiny import assert_same, hook_count, snapshot
from torch import nn
from typer.testing import CliRunner

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import Report, audit_contrast
from repe_unlearn.audit.edits import random_edit
from repe_unlearn.cli import app
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, ModelMismatchError, NotEnoughDataError
from repe_unlearn.folding import bake
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sequential import fit_sequential
from repe_unlearn.sites import Site
from repe_unlearn.solvers import leace

FIT, HELDOUT = spoken().split(0.4)
TEXTS = [f"{text} So it is number {i}." for i in range(3) for text in NEUTRAL]


@functools.cache
def llama() -> nn.Module:
    return text_model("llama", dtype=torch.float32)


def plan(sites: tuple[Site, ...]) -> ErasurePlan:
    return fit_sequential(llama(), text_tokenizer(), FIT, sites, leace, select="mean", progress=False)


READERS = (Site("model.layers.0.self_attn.q_proj"), Site("model.layers.0.mlp.up_proj"))


def read() -> tuple[Site, ...]:
    return Architecture.of(llama()).sites("attn_in", "mlp_in", layers=[0])


@functools.cache
def baked() -> Patch:
    """The first block no longer reads the concept: it is gone from what its maps make of the stream, not from the stream."""
    return bake(llama(), plan(read()))


def edited(patch: Patch) -> nn.Module:
    model = copy.deepcopy(llama())
    patch.apply_(model)
    return model


def audited(other: nn.Module | Patch | ErasurePlan, **options: object) -> Report:
    settings = {"fit": FIT, "heldout": HELDOUT, "select": "mean", "neutral": TEXTS, "progress": False}
    return audit_contrast(llama(), other, text_tokenizer(), **settings | options)  # type: ignore[arg-type]


def named(report: Report, name: str) -> list:
    return [check for check in report.checks if check.name == name]


def test_an_eraser_in_the_weights_is_found_at_the_maps_it_was_baked_into() -> None:
    before = snapshot(llama())
    report = audited(edited(baked()), sites=READERS)
    assert_same(before, llama())
    assert hook_count(llama()) == 0
    assert report.passed, report.failed
    assert report.verdict.startswith("Linearly guarded on unseen prompts at all 2 sites")
    assert "an RBF probe" in report.verdict
    for linear in named(report, "probe.refit.linear"):
        assert linear.value <= 0.6 < 0.9 <= linear.control
        assert "random edit 0.9" in linear.note or "random edit 1.0" in linear.note
    for name in ("control.probe_works", "control.random_edit", "control.shuffled_labels"):
        assert [one.passed for one in named(report, name)] == [True], name
    for name in ("probe.refit.mlp", "probe.refit.rbf", "cost.kl.neutral", "cost.log_perplexity.neutral"):
        one = named(report, name)[0]
        assert one.low <= one.value <= one.high
        assert one.control is not None
    assert named(report, "cost.kl.neutral")[0].value > 0
    assert "command" not in report.facts


def test_what_one_block_no_longer_reads_is_still_in_the_stream() -> None:
    """The other site is the negative control: the same patch, read elsewhere, is readable."""
    report = audited(baked())
    layers = Architecture.of(llama()).n_layers
    assert [one.site for one in named(report, "probe.refit.linear")] == [
        str(site) for site in Architecture.of(llama()).sites("resid_post")
    ]
    assert layers <= 8
    assert not report.passed
    assert report.verdict.startswith("Still linearly readable")


def test_a_random_edit_is_still_readable() -> None:
    report = audited(edited(random_edit(baked(), seed=5)), sites=READERS)
    assert not report.passed
    assert report.verdict.startswith("Still linearly readable on unseen prompts at 2 of 2 sites")


def test_a_probe_that_fails_before_concludes_nothing() -> None:
    """Labels that the texts do not show: nothing is readable after the edit, and nothing was before."""
    rows = [one for one in sounds() if one["label"] == "bee"]
    flipped = {who: "ab"[i % 2] for i, who in enumerate(dict.fromkeys(one["group"] for one in rows))}
    made_up = Contrast.from_labels(
        [one["text"] for one in rows],
        [flipped[one["group"]] for one in rows],
        groups=[one["group"] for one in rows],
        templates=[one["template"] for one in rows],
        name="nothing",
    )
    fit, heldout = made_up.split(0.4)
    report = audited(baked(), fit=fit, heldout=heldout, sites=READERS)
    assert not report.passed
    assert report.verdict.startswith("No conclusion")


def test_a_plan_is_verified_at_its_own_sites() -> None:
    report = audited(plan(read()))
    assert [one.site for one in named(report, "probe.refit.linear")] == [str(site) for site in read()]
    assert named(report, "bake.equals_hook.logits")


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="do not differ"):
        audited(copy.deepcopy(llama()))
    with pytest.raises(ModelMismatchError):
        audited(text_model("llama", dtype=torch.float32, num_hidden_layers=1))
    with pytest.raises(InputError, match="also fitting prompts"):
        audited(baked(), heldout=FIT)
    with pytest.raises(NotEnoughDataError, match="8"):
        audited(baked(), neutral=NEUTRAL, sites=READERS)
    with pytest.raises(InputError, match="no site"):
        audited(baked(), sites=())
    reals = Contrast.from_reals(HELDOUT.texts, [float(i % 7) for i in range(len(HELDOUT))])
    with pytest.raises(InputError, match="class labels"):
        audited(baked(), heldout=reals, sites=READERS)


def test_the_command_line_takes_any_two_checkpoints(tmp_path: Path) -> None:
    tokenizer, run = text_tokenizer(), CliRunner().invoke
    for name, model in (("base", llama()), ("edited", edited(baked()))):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        tokenizer.save_pretrained(tmp_path / name)
    data = jsonl(tmp_path / "sounds.jsonl", sounds())
    words = ["audit", str(tmp_path / "base"), str(tmp_path / "edited"), "--contrast", str(data), "--quiet"]
    done = run(app, [*words, "--out", str(tmp_path / "report")])
    assert done.exit_code == 3, done.output
    assert "Still linearly readable" in " ".join(done.output.split())
    report = Report.from_json((tmp_path / "report" / "report.json").read_text())
    assert report.facts["command"].startswith("repe-unlearn audit ")
    assert "--contrast" in report.facts["command"]
    done = run(app, [*words, "--site", str(READERS[0]), "--out", str(tmp_path / "gone")])
    assert done.exit_code == 0, done.output
    assert "Linearly guarded" in " ".join(done.output.split())
    command = Report.from_json((tmp_path / "gone" / "report.json").read_text()).facts["command"]
    assert f"--site {READERS[0]}" in command
    words[2] = str(tmp_path / "base")
    same = run(app, [*words, "--out", str(tmp_path / "other")])
    assert same.exit_code == 1
    assert "do not differ" in " ".join(same.output.split())
    mixed = run(app, [*words, "--minutes", "3", "--out", str(tmp_path / "other")])
    assert mixed.exit_code == 1
    assert "--facts" in mixed.output
    assert not (tmp_path / "other").exists()
