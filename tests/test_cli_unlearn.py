"""The command `unlearn`, on a folder with the small model that knows planted facts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from unlearnkit import FACTS, original, saved

from repe_unlearn.answers import answers
from repe_unlearn.audit.report import Report
from repe_unlearn.cli import app
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts
from repe_unlearn.measured import patched
from repe_unlearn.models import load
from repe_unlearn.outlook import foresee
from repe_unlearn.patch import Patch

NPO = ["--method", "npo", "-o", "lr=3e-3", "-o", "steps=30"]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["unlearn", *map(str, args)], env={"COLUMNS": "200"})


def said(result: Any) -> str:
    return " ".join(re.sub(r"[│┃]", " ", result.output).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the facts beside it."""
    folder = saved(tmp_path_factory.mktemp("model"))
    (folder / "retain.txt").write_text("I met nobody in the park .\n\nYesterday nobody came to see us .\n")
    (folder / "forget.txt").write_text(
        "\n\n".join(f"{q.prompt}{q.answer} ." for q in FACTS.questions("seen", roles=["forget"]))
    )
    return folder


def test_end_to_end(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        folder / "knows",
        "--forget",
        folder / "facts.jsonl",
        "--out",
        out,
        *NPO,
        "--seed",
        1,
        "--checkpoint",
        "-q",
    )
    assert result.exit_code in (0, 3), result.output
    assert {p.name for p in out.iterdir()} == {
        "patch.safetensors", "report.html", "report.md", "report.json", "model",
    }  # fmt: skip
    report = Report.from_json((out / "report.json").read_text())
    assert (result.exit_code == 0) == report.passed
    checks = {check.name: check for check in report.checks}
    assert checks["forget_unseen"].value < 0.3 < checks["forget_unseen"].control
    assert checks["retain.kept"].value > 0.8
    assert report.facts["method"] == "npo"
    assert json.loads(report.facts["settings"])["steps"] == 30
    assert report.facts["seed"] == "1"
    text = said(result)
    assert "known: 8 of 8 forget, 16 of 32 retain" not in text
    assert "8 of 8 forget" in text
    assert "forget, unseen wordings (greedy accuracy) 1" in text
    patch, (model, tokenizer) = Patch.load(out / "patch.safetensors"), original()
    with patched(model, patch):
        live = answers(model, tokenizer, FACTS, "unseen", roles=["forget"], progress=False)
    assert live.accuracy("forget") == checks["forget_unseen"].value
    stored = load(out / "model", progress=False)
    again = answers(stored.model, stored.tokenizer, FACTS, "unseen", roles=["forget"], progress=False)
    assert again.accuracy("forget") == live.accuracy("forget")
    result = run(folder / "knows", "--forget", folder / "facts.jsonl", "--out", out, *NPO, "-q")
    assert result.exit_code == 1
    assert "exists" in said(result)


def test_the_spectrum_chooses_layers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = ["--forget", folder / "facts.jsonl", "--out", out]
    result = run(folder / "knows", *where, *NPO, "-o", "steps=2", "--auto", "--layers", "1-2", "-q")
    assert result.exit_code in (0, 3), result.output
    assert "predicted" in said(result)
    assert "Outlook(" in said(result)
    report = Report.from_json((out / "report.json").read_text())
    layers = json.loads(report.facts["settings"])["layers"]
    assert set(layers) <= {1, 2}
    names = Patch.load(out / "patch.safetensors").edits
    assert list(names) == [f"model.layers.{i}.mlp.down_proj.weight" for i in layers]


def test_what_is_foreseen_is_the_edit_that_is_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = ["--forget", folder / "facts.jsonl", "--out", out, "--known", "0", "-q"]
    how = ["--method", "closed_form_zero", "-o", "ridge=0.1", "-o", "beta=2"]
    result = run(folder / "knows", *where, *how, "--auto", "--layers", "1-3")
    assert result.exit_code in (0, 3), result.output
    settings = json.loads(Report.from_json((out / "report.json").read_text()).facts["settings"])
    loaded = load(folder / "knows", progress=False)
    facts = Facts.read(folder / "facts.jsonl")
    options = {"layers": [1, 2, 3], "ridge": 0.1, "beta": 2.0, "progress": False}
    zero, other = (
        foresee(loaded.model, loaded.tokenizer, facts, target=target, **options)
        for target in ("zero", "mean_retain")
    )
    assert (settings["layers"], settings["alpha"]) == (list(zero.chosen), pytest.approx(zero.alpha))
    assert settings["alpha"] != pytest.approx(other.alpha)  # control


def test_free_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    texts = ["--forget", folder / "forget.txt", "--retain", folder / "retain.txt"]
    result = run(folder / "knows", *texts, "--out", out, "--method", "grad_ascent", "-o", "steps=2", "-q")
    assert result.exit_code == 3, result.output  # nothing is judged, so nothing passed
    assert "forget text (nats per token)" in said(result)
    assert "no bounds of its own" in said(result)
    assert (out / "report.html").is_file()


def test_nothing_is_left_of_a_run_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise InputError("the disk says no")

    monkeypatch.setattr(Report, "save", fail)
    arguments = ["--forget", folder / "facts.jsonl", "--out", tmp_path / "out", "--method", "random", "-q"]
    result = run(folder / "knows", *arguments)
    assert result.exit_code == 1
    assert "error: the disk says no" in said(result)
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_result_is_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    arguments = ["--forget", folder / "facts.jsonl", "--out", out, "--method", "random", "-q", "--force"]
    result = run(folder / "knows", *arguments)
    assert result.exit_code == 1
    assert "is not replaced even with --force" in said(result)
    (out / "thesis.txt").rename(out / "patch.safetensors")
    result = run(folder / "knows", *arguments)
    assert result.exit_code == 3, result.output  # a random edit makes nothing forgotten
    assert "Not reached: forget_unseen 1 (needed <= 0.15)" in said(result)
    assert Patch.load(out / "patch.safetensors").provenance["method"] == "random"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--forget", "capitals:Atlantis"], "got forget='Atlantis'"),
        (["--forget", "capitols"], "got 'capitols'; needed one of capitals, planted"),
        (["--forget", "missing.jsonl"], "no file"),
        (["--forget", "{folder}/forget.txt"], "needed --retain"),
        (["--forget", "{folder}/facts.jsonl", "--method", "nop"], "got the method 'nop'"),
        (["--forget", "{folder}/facts.jsonl", "--method", "npo", "-o", "stepz=1"], "no option 'stepz'"),
        (["--forget", "{folder}/facts.jsonl", "--method", "npo", "-o", "steps"], "needed NAME=VALUE"),
        (["--forget", "{folder}/facts.jsonl", "--method", "random", "--alpha", "1"], "no option 'alpha'"),
        (
            ["--forget", "{folder}/facts.jsonl", "--method", "rmu", "--layers", "b"],
            "needed numbers and ranges",
        ),
        (
            ["--forget", "{folder}/facts.jsonl", "--method", "rmu", "--layers", "50"],
            "got layer 50; this model",
        ),
        (
            [
                "--forget",
                "{folder}/forget.txt",
                "--retain",
                "{folder}/retain.txt",
                "--method",
                "npo",
                "--auto",
            ],
            "--auto needs facts",
        ),
    ],
)
def test_mistakes_are_answered_in_words(
    folder: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    method = [] if "--method" in given else ["--method", "npo"]
    result = run(folder / "knows", *given, *method, "--out", tmp_path / "out", "-q")
    assert result.exit_code == 1, result.output
    assert complaint in said(result)
    assert not (tmp_path / "out").exists()


def test_a_model_that_knows_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = ["--forget", "planted", "--out", tmp_path / "out", "--method", "npo", "-q"]
    result = run(folder / "knows", *arguments)
    assert result.exit_code == 1
    assert "knows none of the facts to forget" in said(result)
