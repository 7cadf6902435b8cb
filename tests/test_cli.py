from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from auditkit import jsonl, sounds, spoken
from click.testing import Result
from folders import save, tiny_llama
from textkit import text_model, text_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import repe_unlearn as ru
from repe_unlearn import demo, models
from repe_unlearn.cli import app

COMMANDS = (
    "demo", "info", "discover", "fit", "bake", "export", "diff", "revert", "verify", "unlearn", "audit", "compare", "localize",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _messages_as_before() -> Iterator[None]:
    """The command line redirects warnings for its process; here it shares one with other tests."""
    show = warnings.showwarning
    with warnings.catch_warnings():
        yield
    warnings.showwarning = show


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ok(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """Return the one line that a refused command writes to stderr."""
    result = run(*words)
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    assert not result.stdout.strip()
    return lines[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another model, and prompts."""
    place = tmp_path_factory.mktemp("cli")
    save(place / "model", text_like_llama(0))
    text_tokenizer().save_pretrained(place / "model")
    save(place / "other", tiny_llama(seed=1))
    jsonl(place / "sounds.jsonl", sounds())
    return place


def text_like_llama(seed: int) -> torch.nn.Module:
    return text_model("llama", dtype=torch.float32, seed=seed, num_hidden_layers=2)


OPTIONS = ("--test", "0.4", "--layers", "0", "--quiet")


@pytest.fixture(scope="module")
def chain(place: Path) -> Path:
    """The same folder after fit and bake."""
    ok("fit", place / "model", place / "plan.safetensors", "-c", place / "sounds.jsonl", *OPTIONS)
    ok("bake", place / "model", place / "plan.safetensors", place / "patch.safetensors", "-q")
    return place


# Help


def test_help_lists_every_command_and_the_exit_codes() -> None:
    text = ok("--help")
    for command in COMMANDS:
        assert command in text
    for code in ("0 done", "1 an error", "2 wrong usage", "3 a check"):
        assert code in " ".join(text.split())
    assert run().exit_code in (0, 2)  # no command: help
    assert ok("--version") == f"repe-unlearn {ru.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ("--out", "--concept", "--model", "--quick", "--seed", "--force", "--quiet")),
        ("info", ("MODEL", "smollm2-135m", "--quiet")),
        ("discover", ("MODEL", "families.py", "--quiet")),
        (
            "fit",
            ("MODEL", "OUT", "--contrast", "--pairs", "--sites", "--layers", "--solver", "--linear", "--select",
             "--test", "--independent", "--seed", "--force", "attn_in", "leace", "mean_difference", ".jsonl/.csv"),
        ),
        ("bake", ("MODEL", "PLAN", "OUT", "--out", "--allow", "erasure-exact", "--force")),
        ("export", ("MODEL", "PATCH|PLAN", "OUT", "--checkpoint", "--lora", "--allow", "--force", "transformers")),
        ("compare", ("REPORT_A", "REPORT_B", "--names", "--out", "--force", "exit code is 0")),
        ("localize", ("MODEL", "--facts", "--form", "--pairs", "--kind", "mlp_out", "--method", "--out", "--force")),
        ("verify", ("MODEL", "PLAN", "--out", "--contrast", "--exported", "--prompts", "--force", "code 3")),
    ],
)  # fmt: skip
def test_help_of_every_command(command: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(ok(command, "--help").split())
    for word in words:
        assert word in text, word


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("fit").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("verify", "m", "p", "--prompts", "47").exit_code == 2  # too few for 12 fitting pairs


# The chain


def test_fit_bake_export_verify(chain: Path, tmp_path: Path) -> None:
    plan = ru.ErasurePlan.load(chain / "plan.safetensors")
    assert len(plan) == 2
    assert plan.provenance["contrast"] == str(chain / "sounds.jsonl")
    assert plan.fingerprint == ru.load(chain / "model", progress=False).fingerprint

    out = ok("export", chain / "model", chain / "patch.safetensors", tmp_path / "out", "-q")
    assert out.strip() == f"written: {tmp_path / 'out'}"  # on one line, however long
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.attention_bias is True
    patched = ru.load(chain / "model", progress=False).model
    ru.Patch.load(chain / "patch.safetensors").apply_(patched)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(plain(ids).logits, patched(ids).logits)

    out = ok(
        "verify", chain / "model", chain / "plan.safetensors", "--out", tmp_path / "report",
        "--exported", tmp_path / "out", "-q",
    )  # fmt: skip
    assert "Linearly guarded on unseen prompts at all 2 sites" in out
    assert f"report: {tmp_path / 'report' / 'report.html'}\n" in out
    report = ru.Report.from_json((tmp_path / "report" / "report.json").read_text())
    assert report.passed
    (bits,) = (check for check in report.checks if check.name == "export.equals_bake.bits")
    assert bits.value == 1.0
    assert bits.control == 0.0


def test_verify_of_a_bad_eraser_is_exit_code_3(place: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    fit = ("fit", place / "model", plan, "-c", place / "sounds.jsonl", "--solver", "random", *OPTIONS)
    assert "written: " in ok(*fit)
    result = run("verify", place / "model", plan, "--out", tmp_path / "report", "-q")
    assert result.exit_code == 3, result.output
    assert "Still linearly readable" in result.stdout
    report = ru.Report.from_json((tmp_path / "report" / "report.json").read_text())
    assert report.facts["command"].startswith(f"repe-unlearn verify {place / 'model'} {plan} --prompts 560")
    assert (tmp_path / "report" / "report.html").is_file()  # a failed report is a result


def test_few_prompts_held_out_are_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repe_unlearn import audit

    done = ru.Report("", "", (ru.Check.at_most("x", 0, 1),), (), {})
    monkeypatch.setattr(audit, "verify", lambda *_, **__: done)
    plan, said = tmp_path / "plan.safetensors", []
    for share in ("0.2", "0.6"):
        fit = ok(
            "fit",
            place / "model",
            plan,
            "-c",
            place / "sounds.jsonl",
            "--layers",
            "0",
            "-q",
            "--test",
            share,
            "--force",
        )
        result = run("verify", place / "model", plan, "--out", tmp_path / "report", "-q", "--force")
        heldout = int(re.search(r"prompts to fit on, (\d+) held out", fit)[1])  # type: ignore[index]
        said.append((heldout, f"{heldout} held-out prompts: chance alone" in result.stderr))
    assert [told for _, told in said] == [heldout < 100 for heldout, _ in said] == [True, False], said


def test_fit_and_verify_share_the_split(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(*args: object, fit: ru.Contrast, heldout: ru.Contrast, **options: object) -> ru.Report:
        seen.update(fit=fit, heldout=heldout)
        return ru.Report("", "", (ru.Check.at_most("x", 0, 1),), (), {})

    from repe_unlearn import audit

    monkeypatch.setattr(audit, "verify", spy)
    plan = tmp_path / "plan.safetensors"
    ok("fit", place / "model", plan, "-c", place / "sounds.jsonl", "--pairs", "40", "--seed", "7", *OPTIONS)
    ok("verify", place / "model", plan, "--out", tmp_path / "report", "-q", "--seed", "1")
    fit, heldout = spoken().split(0.4, seed=7)
    assert seen["heldout"].texts == heldout.texts
    assert seen["fit"].texts == fit.sample(40, 7).texts
    assert not {*seen["fit"].texts} & {*heldout.texts}


def test_the_same_from_a_csv_file_and_from_pairs(place: Path, tmp_path: Path) -> None:
    rows = sounds()
    with (tmp_path / "sounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pairs = [
        {"negative": a["text"], "positive": b["text"], "group": a["group"], "template": a["template"]}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    files = [place / "sounds.jsonl", tmp_path / "sounds.csv", jsonl(tmp_path / "pairs.jsonl", pairs)]
    plans = []
    for i, file in enumerate(files):
        ok("fit", place / "model", tmp_path / f"{i}.safetensors", "-c", file, *OPTIONS)
        plans.append(ru.ErasurePlan.load(tmp_path / f"{i}.safetensors"))
    first = plans[0]
    for plan in plans[1:]:
        assert plan.sites == first.sites
        assert all(plan[site].allclose(first[site]) for site in first.sites)


def test_prompts_without_pairs(place: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["label"], "group": row["group"]} for row in sounds()]
    lopsided = jsonl(tmp_path / "lopsided.jsonl", rows[::2] + rows[1::6])
    plan = tmp_path / "plan.safetensors"
    assert "written" in ok("fit", place / "model", plan, "-c", lopsided, *OPTIONS)
    some = tmp_path / "some.safetensors"
    ok("fit", place / "model", some, "-c", lopsided, "--pairs", "100", *OPTIONS)
    assert int(ru.ErasurePlan.load(some).provenance["prompts"]) < int(
        ru.ErasurePlan.load(plan).provenance["prompts"]
    )
    result = run("verify", place / "model", plan, "--out", tmp_path / "report", "--prompts", "100", "-q")
    assert result.exit_code in (0, 3), result.output


def test_options_of_fit(place: Path, tmp_path: Path) -> None:
    data = ("-c", place / "sounds.jsonl", "--test", "0.4", "--quiet")
    ok("fit", place / "model", tmp_path / "a.safetensors", *data, "--sites", "mlp_out, final", "--layers", "0-1,1",
       "--linear", "--independent", "--select", "last", "--solver", "mean_difference")  # fmt: skip
    plan = ru.ErasurePlan.load(tmp_path / "a.safetensors")
    assert [str(s) for s in plan.sites] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.norm",
    ]  # fmt: skip
    assert not any(bool(plan[s].shift.any()) for s in plan.sites)
    facts = plan.provenance
    assert (facts["solver"], facts["fit"], facts["select"]) == (
        "mean_difference(affine=False)", "independent", "last",
    )  # fmt: skip
    before = (tmp_path / "a.safetensors").read_bytes()
    ok("fit", place / "model", tmp_path / "a.safetensors", *data, "--layers", "1", "--force")
    assert (tmp_path / "a.safetensors").read_bytes() != before


def test_an_odd_output_path_is_printed_as_it_is(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "[bold]x[/bold].safetensors"
    assert f"written: {out}" in ok("fit", place / "model", out, "-c", place / "sounds.jsonl", *OPTIONS)
    assert out.is_file()


# Info


@pytest.mark.parametrize(
    ("model_type", "reasons"),
    [
        ("llama", ["hook only: the residual stream", "skip path", "exact"]),
        ("gpt2", ["hook only: the residual stream", "lm_head has no bias", "exact"]),
        (
            "gemma2",
            ["hook only: the residual stream", "has no bias and the config of gemma2", "erasure-exact"],
        ),
    ],
)
def test_info(tmp_path: Path, model_type: str, reasons: list[str]) -> None:
    text_model(model_type, dtype=torch.float32).save_pretrained(tmp_path / "model")
    text_tokenizer().save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    found = ok("info", tmp_path / "model", "--quiet")
    rows = {line.split("│")[1].strip(): line for line in found.splitlines() if line.startswith("│")}
    assert {"attn_in", "mlp_in", "attn_out", "mlp_out", "resid_pre", "resid_post", "final"} <= {*rows}
    text = " ".join(found.replace("│", " ").split())
    assert f"({model_type})" in text
    assert ru.load(tmp_path / "model", progress=False).fingerprint in text
    sites, edits = found.split("weights that closed_form can edit")
    flat = flattened(sites)
    for reason in reasons:
        assert reason in flat, (reason, flat)
    edits, estimates = edits.split("estimates for 1,000 tokens")
    assert "3 of 3" in edits
    steps = flattened(estimates)
    assert "capture at 6 sites fit in sequence at 6 sites closed form, layers 2 to 2" in steps
    assert "not measured" not in steps
    assert tree(tmp_path) == before


def flattened(table: str) -> str:
    """Join the folded cells of every column of a rich table."""
    cells: list[list[str]] = []
    for line in table.splitlines():
        if line.startswith("│"):
            cells.append([cell.strip() for cell in line.strip("│").split("│")])
    return " | ".join(" ".join(part for part in column if part) for column in zip(*cells, strict=True))


# Errors: one line, before any work where that is possible, nothing left behind


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded before the mistake was seen")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(demo, "load", load)


@pytest.mark.usefixtures("never_loads")
def test_an_output_that_exists_is_refused_before_any_work(chain: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("mine")
    before = tree(tmp_path)
    plan, patch = chain / "plan.safetensors", chain / "patch.safetensors"
    for words in (
        ("fit", chain / "model", taken, "-c", chain / "sounds.jsonl"),
        ("bake", chain / "model", plan, taken),
        ("export", chain / "model", patch, taken),
        ("demo", "--model", chain / "model", "--out", taken),
    ):
        said = refused(*words)
        assert str(taken) in said
        assert "exists" in said
        assert "--force" in said
    said = refused("verify", chain / "model", plan, "--out", tmp_path / "report")
    assert "report.md" in said
    assert "force" in said
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("never_loads")
def test_mistakes_that_need_no_model(chain: Path, tmp_path: Path) -> None:
    out, model, plan = tmp_path / "out", chain / "model", chain / "plan.safetensors"
    data = ("-c", chain / "sounds.jsonl")
    short = jsonl(tmp_path / "short.jsonl", [{"text": "a", "label": "x"}] * 4)
    unlabelled = jsonl(tmp_path / "unlabelled.jsonl", [{"text": "a b", "kind": "x"}])
    blank = jsonl(tmp_path / "blank.jsonl", [{"text": text, "label": "x"} for text in ("a b", " ")])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "x"}\n{"text": \n')
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(plan.read_bytes()[:200])
    before = tree(tmp_path)
    for words, said in {
        ("fit", model, out, *data, "--solver", "magic"): "got solver 'magic'; needed one of leace",
        ("fit", model, out, *data, "--layers", "zero"): "got layers 'zero'; needed numbers and ranges",
        ("fit", model, out, *data, "--layers", "-1"): "got layers '-1'",
        ("fit", model, out, *data, "--layers", "1-0"): "got layers '1-0'",
        ("fit", model, out, *data, "--test", "1.5"): "test=1.5: the held-out share",
        (
            "fit",
            model,
            out,
            "-c",
            "joy",
        ): "got contrast 'joy'; needed gender, tense, or a .jsonl or .csv file",
        ("fit", model, out, "-c", tmp_path / "none.jsonl"): "there is no file",
        ("fit", model, out, "-c", unlabelled): "'label'",
        ("fit", model, out, "-c", blank): "blank.jsonl, row 2: column 'text' is empty",
        ("fit", model, out, "-c", broken): "line 2: bad JSON",
        ("fit", model, out, "-c", short): "x",
        ("bake", model, tmp_path / "none.safetensors", out): "is not a file; needed a erasure plan",
        ("bake", model, truncated, out): "not a whole safetensors file",
        ("bake", model, chain / "patch.safetensors", out): "holds 'patch'; needed 'erasure plan'",
        ("bake", model, model / "model.safetensors", out): "a safetensors file of something else",
        ("export", model, model / "model.safetensors", out): "needed a patch or erasure plan file",
        ("export", model, truncated, out): "not a whole safetensors file",
        ("export", model, tmp_path / "none.safetensors", out): "is not a file",
        ("verify", model, tmp_path / "none.safetensors", "--out", out): "is not a file",
        ("verify", model, truncated, "--out", out): "not a whole safetensors file",
        ("verify", model, plan, "--out", out, "-c", "joy"): "got contrast 'joy'",
    }.items():
        assert said in refused(*words), words
        assert tree(tmp_path) == before, words
        assert not out.exists()


def test_mistakes_that_the_model_shows(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out, model, plan = tmp_path / "out", chain / "model", chain / "plan.safetensors"
    data = ("-c", chain / "sounds.jsonl", "--quiet")
    hooked = ("--sites", "resid_post", "--layers", "0")
    ok("fit", model, tmp_path / "hooked.safetensors", *data, *hooked)
    before = tree(tmp_path)
    for words, said in {
        ("fit", model, out, *data, "--sites", "nose"): "got site kinds ['nose']; needed some of attn_in",
        ("fit", model, out, *data, "--layers", "0-7"): "got layer 2; this model has layers 0 to 1",
        ("verify", model, plan, "--out", out, "--exported", tmp_path / "none", "-q"): "is no folder",
        ("fit", model, out, *data, "--select", "first"): "got Select kind 'first'",
        ("fit", tmp_path / "nowhere", out, *data): "No file or folder",
        ("fit", "someone/unknown", out, *data): "'someone/unknown' is no existing path",
        ("info", tmp_path / "nowhere"): "No file or folder",
        ("bake", chain / "other", plan, out, "-q"): "fingerprint",
        ("verify", chain / "other", plan, "--out", out, "-q"): "fingerprint",
        ("export", chain / "other", chain / "patch.safetensors", out, "-q"): "fingerprint",
        ("bake", model, plan, out, "--allow", "roughly", "-q"): "got allow='roughly'",
        ("bake", model, tmp_path / "hooked.safetensors", out, "-q"): "cannot be baked",
        ("demo", "--model", model, "--out", out, "--concept", "joy", "-q"): "joy",
    }.items():
        said_now = refused_after_steps(*words) if words[0] == "demo" else refused(*words)
        assert said in said_now, words
        assert tree(tmp_path) == before, words
        assert not out.exists()


def refused_after_steps(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_plan_from_python_has_no_recipe(chain: Path, tmp_path: Path) -> None:
    plan = ru.ErasurePlan.load(chain / "plan.safetensors")
    bare = ru.ErasurePlan(plan.erasers, plan.fingerprint).save(tmp_path / "bare.safetensors")
    said = refused("verify", chain / "model", bare, "--out", tmp_path / "report")
    assert "does not record its contrast, pairs, test, seed" in said
    assert "from Python" in said
    odd = ru.ErasurePlan(plan.erasers, plan.fingerprint, {**plan.provenance, "pairs": "many"})
    odd.save(tmp_path / "odd.safetensors")
    said = refused("verify", chain / "model", tmp_path / "odd.safetensors", "--out", tmp_path / "report")
    assert "fit it again" in said
    assert not (tmp_path / "report").exists()


def test_a_full_disk_is_one_line_too(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    out = tmp_path / "out"
    data = ("-c", chain / "sounds.jsonl", *OPTIONS)
    assert "No space left on device" in refused("fit", chain / "model", out, *data)
    assert "No space left" in refused("bake", chain / "model", chain / "plan.safetensors", out, "-q")
    assert not list(tmp_path.iterdir())


# Ctrl-C


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("fit", "repe_unlearn.sequential.named_solve"),
        ("fit", "safetensors.torch.save_file"),
        ("bake", "repe_unlearn.folding.bake"),
        ("bake", "safetensors.torch.save_file"),
        ("export", "repe_unlearn.export.checkpoint._write_weights"),
        ("export", "repe_unlearn.export.checkpoint._write_index"),
        ("verify", "repe_unlearn.audit.probes.mlp"),
        ("verify", "repe_unlearn.audit.report.write_together"),
        ("info", "repe_unlearn.folding.bake"),
    ],
)
def test_ctrl_c_leaves_nothing(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, where: str
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    name, _, attribute = where.rpartition(".")
    monkeypatch.setattr(module_named(name), attribute, interrupted)
    out, model, plan = tmp_path / "out", chain / "model", chain / "plan.safetensors"
    words = {
        "fit": ("fit", model, out, "-c", chain / "sounds.jsonl", *OPTIONS),
        "bake": ("bake", model, plan, out, "-q"),
        "export": ("export", model, chain / "patch.safetensors", out, "-q"),
        "verify": ("verify", model, plan, "--out", out, "--prompts", "48", "-q"),
        "info": ("info", model, "-q"),
    }[command]
    before = tree(chain)
    result = run(*words)
    assert result.exit_code == 130, (result.output, result.exception)
    assert result.stderr.splitlines()[-1] == "interrupted; nothing half-written was left behind"
    assert not list(tmp_path.iterdir())
    assert tree(chain) == before


def module_named(name: str) -> object:
    # A function of the same name may hide a module as an attribute of its package.
    import importlib

    return importlib.import_module(name)
