"""Whole audits of models whose truth is known, small enough for every run; more models in benchmarks/verifier.py."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from folders import save, tiny_llama
from knowkit import PLANTED, gold, original
from plantedkit import neutral_text
from torch import nn
from typer.testing import CliRunner

from repe_unlearn import train
from repe_unlearn.audit import audit, card, compare
from repe_unlearn.audit.card import require_audit
from repe_unlearn.audit.check import Check
from repe_unlearn.audit.edits import random_edit
from repe_unlearn.audit.report import Report
from repe_unlearn.audit.verdict import Thresholds
from repe_unlearn.cli import app
from repe_unlearn.difference import diff
from repe_unlearn.edit import Edit
from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, OutputExistsError
from repe_unlearn.export import checkpoint
from repe_unlearn.patch import Patch
from repe_unlearn.plan import ErasurePlan
from repe_unlearn.sites import Site

_RETAINED = {f.subject for f in [f for f in PLANTED if f.role == "retain"][:24]}
FACTS = PLANTED.where(
    lambda f: f.relation in PLANTED.relations[:2] and (f.role != "retain" or f.subject in _RETAINED)
)
NEUTRAL = neutral_text(FACTS)[::10]
# A few dozen facts show a leak or its absence to within a fifth; what is retained is small, and moves with every edit.
LINES = Thresholds(margin=0.25, kl=5.0, log_perplexity=5.0, neighbours=0.9)


@functools.cache
def dense() -> Patch:
    """A change of one matrix by some hundredths of its norm."""
    base = original()[0]
    name = "model.layers.1.mlp.down_proj.weight"
    change = torch.randn(base.get_parameter(name).shape, generator=torch.Generator().manual_seed(0))
    return Patch({name: Edit(0.02 * change, None, "noise")}, _print(base))


def _print(model: nn.Module) -> str:
    from repe_unlearn.fingerprints import fingerprint

    return fingerprint(model)


def audited(edited: object, only: Sequence[str] = (), **options: object) -> Report:
    base, tokenizer = original()
    settings = {"only": only, "neutral": NEUTRAL, "thresholds": LINES, "progress": False, **options}
    return audit(base, edited, tokenizer, FACTS, **settings)  # type: ignore[arg-type]


def found(report: Report, name: str) -> Check:
    return next(one for one in report.checks if one.name == name)


@functools.cache
def untouched() -> Report:
    return audited(dense(), ["lens"])


def test_a_small_random_edit_is_not_forgotten_and_the_models_are_left_as_they_were() -> None:
    base = original()[0]
    before = {name: p.clone() for name, p in base.named_parameters()}
    report = untouched()
    assert report.facts["verdict"] == "NOT_FORGOTTEN"
    assert not report.passed
    assert found(report, "leak.behaviour.unseen").value > 0.9
    assert found(report, "leak.behaviour.unseen").control > 0.9  # the random edit
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_model_that_never_knew_passes() -> None:
    report = audited(gold(), ["lens"])
    assert report.facts["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert report.passed
    assert "T1" in report.facts["attacker"]
    assert found(report, "leak.lens").high < 0.25
    assert "relearn" in report.facts["not attacked"]


def test_an_edit_that_breaks_the_model_is_damaged() -> None:
    loud = {n: Edit(60 * e.left, None, "noise") for n, e in dense().edits.items()}
    report = audited(Patch(loud, dense().fingerprint), (), thresholds=Thresholds(margin=0.25))
    assert "DAMAGED" in report.facts["verdict"]
    assert found(report, "cost.kl.retain").passed is False
    assert "damaged" in report.facts["why"]


def test_a_hook_claims_no_more_than_what_asking_shows() -> None:
    base = original()[0]
    d = base.config.hidden_size
    u = torch.eye(d, 1, dtype=torch.float64)
    plan = ErasurePlan(
        {Site("model.layers.1.mlp"): Eraser(u, u.T, torch.zeros(d, dtype=u.dtype))}, _print(base)
    )
    report = audited(plan, None)
    assert "T0" in report.facts["attacker"]
    assert {one.name for one in report.checks if one.name.startswith("leak.")} <= {
        "leak.behaviour.seen",
        "leak.behaviour.unseen",
        "leak.behaviour.in_context",
        "leak.leak_at_k",
    }
    assert "drops the hook" in report.facts["not attacked"]


def test_an_interrupted_audit_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repe_unlearn.audit import attacks

    whole = numbers(untouched())
    lens, runs = attacks.lens, []

    def interrupted(*args: object, **options: object) -> object:
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(args)
        return lens(*args, **options)

    monkeypatch.setattr(attacks, "lens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited(dense(), ["lens"], resume=tmp_path)
    done = {path.name.rpartition("-")[0] for path in tmp_path.iterdir()}
    assert {"behaviour-edited", "behaviour-original", "lens-original", "retention"} <= done
    assert "lens-edited" not in done
    monkeypatch.setattr(attacks, "behaviours", None)  # never asked again
    monkeypatch.setattr(attacks, "lens", lens)
    again = audited(dense(), ["lens"], resume=tmp_path)
    assert numbers(again) == whole


def numbers(report: Report) -> dict[str, tuple[float, ...]]:
    return {c.name: (c.value, c.low, c.high) for c in report.checks if c.value == c.value}  # type: ignore[misc]


def test_no_time_leaves_attacks_out_and_says_so() -> None:
    report = audited(dense(), ["lens", "perturb"], minutes=1e-3)
    assert [c for c in report.checks if c.name.startswith("leak.")]  # asking is always done
    assert not [c for c in report.checks if c.name.startswith("leak.lens")]
    assert re.search(r"lens \(about \d+ s\), no time", report.facts["not attacked"])


def test_the_report_says_the_verdict_first_and_reads_back() -> None:
    report = untouched()
    assert Report.from_json(report.to_json()).to_markdown() == report.to_markdown()
    assert "**NOT\\_FORGOTTEN" in report.to_markdown() or "**NOT_FORGOTTEN" in report.to_markdown()
    page = report.to_html()
    assert page.index("NOT FORGOTTEN") < page.index("What comes back") < page.index("Whole model")
    assert "What the edit costs" in page
    assert "Logit lens" in page
    old = report.to_json().replace('"schema": 2', '"schema": 1')
    assert Report.from_json(re.sub(r',\s*"rows": \[[^\]]*\]', "", old)).series[0].rows == ()


def test_a_card_tells_the_verdict_and_lies_in_the_exported_model(tmp_path: Path) -> None:
    section = card(untouched())
    assert section.startswith("## Unlearning audit\n\n**NOT_FORGOTTEN")
    assert "leak.behaviour.unseen" in section
    assert "no proof of erasure" in section
    with pytest.raises(InputError, match="no verdict"):
        card(Report("verify", "", (), (), {}))
    model = tiny_llama()
    source = tmp_path / "source"
    save(source, model)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    patch = Patch(
        {"model.norm.weight": Edit(torch.ones_like(model.model.norm.weight), None, "x")}, _print(model)
    )
    out = checkpoint(source, patch, tmp_path / "out", card=section, progress=False)
    assert (out / "README.md").read_text().startswith("---\nlicense: mit\n---\n# Mine\n\n## Unlearning audit")
    assert (source / "README.md").read_text().endswith("# Mine\n")


def test_two_audits_side_by_side(tmp_path: Path) -> None:
    other = audited(dense(), ["perturb.int8"])
    both = compare(untouched(), other, names=("A", "B"))
    table = both.to_markdown()
    assert re.search(r"\| verdict \| NOT_FORGOTTEN \| NOT_FORGOTTEN \|", table)
    assert re.search(r"\| leak.lens \| [^|]+ \| not run \|", table)
    assert re.search(r"\| leak.perturb.int8 \| not run \| [^|]+ \|", table)
    assert both.save(tmp_path).read_text().startswith("<!doctype html>")
    with pytest.raises(OutputExistsError):
        both.save(tmp_path)
    with pytest.raises(InputError, match="two different"):
        compare(other, other, names=("A", "A"))
    with pytest.raises(InputError, match="no verdict"):
        require_audit(Report("verify", "", (), (), {}))


def test_the_command_line_writes_a_report_and_exits_with_3_unless_it_is_gone(tmp_path: Path) -> None:
    base, tokenizer = original()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    patch = dense().save(tmp_path / "patch.safetensors")
    facts = FACTS.to_jsonl(tmp_path / "facts.jsonl")
    out = tmp_path / "report"
    words = ["audit", str(tmp_path / "base"), str(patch or tmp_path / "patch.safetensors")]
    words += ["--facts", str(facts), "--tier", "0", "--quiet", "--out", str(out), "--only"]
    unknown = CliRunner().invoke(app, [*words, "magic"])
    assert unknown.exit_code == 1
    assert "'magic'" in unknown.output
    words += ["behaviour", "--kept", str(facts)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3, done.output
    assert "NOT_FORGOTTEN" in done.output
    report = Report.from_json((out / "report.json").read_text())
    assert report.facts["command"].startswith("repe-unlearn audit ")
    assert "--only behaviour" in report.facts["command"]
    assert f"--kept {facts}" in report.facts["command"]
    assert found(report, "cost.kept.planted").bound == "<= 0.02"
    assert {c.name.split(".")[1] for c in report.checks if c.name.startswith("leak.")} == {"behaviour"}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "already there" in " ".join(again.output.split())
    neither = CliRunner().invoke(app, [*words[:3], "--out", str(tmp_path / "other")])
    assert neither.exit_code == 1
    assert "--contrast" in neither.output


def npo(steps: int, lr: float) -> Patch:
    base, tokenizer = original()
    forget, retain = (FACTS.samples("seen", roles=[role]) for role in ("forget", "retain"))
    options = {"method": "npo", "steps": steps, "lr": lr, "batch": 32, "accumulate": 1, "progress": False}
    return train.unlearn(base, tokenizer, forget, retain, **options).patch  # type: ignore[arg-type]


@pytest.mark.slow
def test_npo_is_hidden_or_overshoots() -> None:
    report = audited(npo(30, 1e-3), ["relearn.retain_only"])
    assert report.facts["verdict"].startswith("HIDDEN") or "OVERSHOOT" in report.facts["verdict"]


@pytest.mark.slow
def test_a_random_edit_as_large_as_npo_is_not_forgotten() -> None:
    base = original()[0]
    edited = copy.deepcopy(base)
    patch = random_edit(npo(30, 1e-3), seed=3)
    patch.apply_(edited)
    assert diff(base, edited).edits.keys() == patch.edits.keys()
    assert audited(edited, []).facts["verdict"].startswith("NOT_FORGOTTEN")
