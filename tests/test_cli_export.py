"""From a fit to a model that others load, all by the command line; the last step in a process without this package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from auditkit import jsonl, sounds
from folders import save, tiny_llama
from test_cli import ok, refused, run, text_like_llama, tree
from textkit import text_model, text_tokenizer
from tiny import random_plan, tiny

import repe_unlearn as ru
from repe_unlearn import models
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import UnsupportedModelError
from repe_unlearn.export.torch_program import torch_program

IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])

# Runs where repe_unlearn cannot be imported.
READER = """
import sys
sys.modules["repe_unlearn"] = None
import torch
from transformers import AutoModelForCausalLM

kind, folder, base, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base if kind == "lora" else folder)
if kind == "lora":
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, folder)
with torch.no_grad():
    torch.save(model.eval()(torch.load(ids)).logits, out)
"""


def read_elsewhere(kind: str, folder: Path, base: Path, scratch: Path) -> torch.Tensor:
    """Return the logits that a fresh process computes with what was exported."""
    torch.save(IDS, scratch / "ids.pt")
    words = [kind, folder, base, scratch / "ids.pt", scratch / "logits.pt"]
    result = subprocess.run(
        [sys.executable, "-c", READER, *map(str, words)], capture_output=True, text=True, cwd=scratch
    )
    assert result.returncode == 0, result.stderr
    return torch.load(scratch / "logits.pt")


def hooked(model: Path, plan: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits with the plan as hooks, and those of the untouched model."""
    loaded = ru.load(model, progress=False).model
    with ru.apply(loaded, ru.ErasurePlan.load(plan)):
        erased = loaded(IDS).logits
    return erased, loaded(IDS).logits


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another model, an affine and a linear plan, and their patches."""
    place = tmp_path_factory.mktemp("export")
    save(place / "model", text_like_llama(0))
    text_tokenizer().save_pretrained(place / "model")
    save(place / "other", tiny_llama(seed=1))
    data = ("-c", jsonl(place / "sounds.jsonl", sounds()), "--test", "0.4", "--quiet")
    for name, options in {"affine": (), "linear": ("--linear",)}.items():
        plan, patch = place / f"{name}.plan", place / f"{name}.patch"
        ok("fit", place / "model", plan, *data, *options)
        ok("bake", place / "model", plan, "--out", patch, "-q")
    return place


def test_a_checkpoint_in_a_fresh_process_equals_the_hooks(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = ok("export", chain / "model", chain / "affine.patch", "--checkpoint", out, "-q")
    assert said.strip() == f"written: {out}"
    erased, untouched = hooked(chain / "model", chain / "affine.plan")
    found = read_elsewhere("checkpoint", out, chain / "model", tmp_path)
    torch.testing.assert_close(found, erased, rtol=0, atol=1e-4)
    assert (erased - untouched).abs().max() > 1e-2
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, untouched, rtol=0, atol=1e-4)


def test_an_adapter_in_a_fresh_process_equals_the_hooks(chain: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    assert f"written: {out}" in ok("export", chain / "model", chain / "linear.plan", "--lora", out, "-q")
    erased, untouched = hooked(chain / "model", chain / "linear.plan")
    found = read_elsewhere("lora", out, chain / "model", tmp_path)
    torch.testing.assert_close(found, erased, rtol=0, atol=1e-4)
    assert (found - untouched).abs().max() > 1e-2
    said = refused_after_bake(
        "export", chain / "model", chain / "affine.plan", "--lora", tmp_path / "no", "-q"
    )
    assert "biases" in said  # an affine plan has no place in an adapter
    assert not (tmp_path / "no").exists()


def refused_after_bake(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_plan_is_baked_on_the_way_to_the_same_files(chain: Path, tmp_path: Path) -> None:
    said = ok("export", chain / "model", chain / "affine.plan", tmp_path / "a", "-q")
    assert "attn_in │ 2      │ exact" in said
    assert "coverage: 2/2 q_proj" in said
    ok("export", chain / "model", chain / "affine.patch", tmp_path / "b", "-q")
    a, b = (tree(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys()
    differing = {name for name in a if a[name] != b[name]}
    assert differing <= {"repe_manifest.json"}  # it holds the time


def test_a_patch_on_a_folder_never_loads_the_model(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", load)
    ok("export", chain / "model", chain / "affine.patch", "--checkpoint", tmp_path / "out", "-q")
    with pytest.raises(AssertionError, match="was loaded"):
        raise run("export", chain / "model", chain / "affine.plan", tmp_path / "b", "-q").exception  # type: ignore[misc]


def test_a_gguf_file_is_edited_in_its_own_type(chain: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from ggufkit import contents, write

    said = refused("export", chain / "model", chain / "linear.patch", "--gguf", tmp_path / "x.gguf", "-q")
    assert "add --gguf-source" in said
    source, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    write(source, ru.load(chain / "model", progress=False).model)
    ok("export", chain / "model", chain / "linear.patch", "--gguf", out, "--gguf-source", source, "-q")
    before, after = contents(source), contents(out)
    assert before.keys() == after.keys()
    edited = {name for name in before if before[name] != after[name]}
    parts = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    assert edited == {f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in parts}


def test_bake_prints_classes_and_coverage(tmp_path: Path, chain: Path) -> None:
    text_model("gemma2", dtype=torch.float32).save_pretrained(tmp_path / "model")
    text_tokenizer().save_pretrained(tmp_path / "model")
    plan, patch = tmp_path / "plan", tmp_path / "patch"
    ok("fit", tmp_path / "model", plan, "-c", chain / "sounds.jsonl", "--test", "0.4", "-q", "--independent",
       "--sites", "mlp_in,mlp_out", "--layers", "0-1", "--linear")  # fmt: skip
    assert "cannot be baked" in refused("bake", tmp_path / "model", plan, patch, "-q")
    assert not patch.exists()
    said = ok("bake", tmp_path / "model", plan, "--out", patch, "--allow", "erasure-exact", "-q")
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if "│" in line
    ]
    assert ["mlp_in", "2", "exact"] in rows
    assert ["mlp_out", "2", "erasure-exact"] in rows
    assert "2/3 gate_proj, 2/3 up_proj, 2/3 down_proj" in said
    assert f"written: {patch}" in said


def test_wrong_usage_is_exit_code_2(chain: Path, tmp_path: Path) -> None:
    for words in (
        ("bake", chain / "model", chain / "affine.plan"),
        ("bake", chain / "model", chain / "affine.plan", tmp_path / "a", "--out", tmp_path / "b"),
        ("export", chain / "model", chain / "affine.patch"),
    ):
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert "outputs; needed" in " ".join(result.output.replace("│", "").split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--checkpoint", "--lora"])
def test_mistakes_leave_nothing_behind(option: str, chain: Path, tmp_path: Path) -> None:
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    half = tmp_path / "half"
    half.write_bytes((chain / "linear.plan").read_bytes()[:300])
    shutil.copytree(chain / "model", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = tree(tmp_path)
    for words, reason in {
        (chain / "other", chain / "linear.patch", option, out): "fingerprint",
        (chain / "other", chain / "linear.plan", option, out): "fingerprint",
        (chain / "model", chain / "linear.patch", option, taken): "exists",
        (chain / "model", chain / "linear.patch", option, taken, "--force"): "even with force",
        (chain / "model", half, option, out): "not a whole safetensors file",
        (tmp_path / "broken", chain / "linear.plan", option, out): "truncated",
        (tmp_path / "nowhere", chain / "linear.patch", option, out): "No file or folder",
    }.items():
        assert reason in refused("export", *words, "-q"), words
        assert tree(tmp_path) == before, words


def test_force_replaces_what_was_exported(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("export", chain / "model", chain / "linear.patch", "--checkpoint", out, "-q")
    before = tree(out)
    ok("export", chain / "model", chain / "affine.patch", "--checkpoint", out, "-q", "--force")
    assert tree(out)["model.safetensors"] != before["model.safetensors"]


# URLs


def upload(folder: Path, name: str) -> str:
    fsspec.filesystem("memory").put(str(folder), f"/cli/{name}", recursive=True)
    return f"memory://cli/{name}"


def stored(name: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("memory")
    return {path.removeprefix(f"/cli/{name}/"): fs.cat_file(path) for path in fs.find(f"/cli/{name}")}


@pytest.fixture
def store(chain: Path) -> Iterator[str]:
    yield upload(chain / "model", "model")
    fsspec.filesystem("memory").rm("/cli", recursive=True)


def test_a_checkpoint_from_and_to_urls(store: str, chain: Path, tmp_path: Path) -> None:
    patch, out = chain / "affine.patch", tmp_path / "out"
    ok("export", chain / "model", patch, out, "-q")
    wanted = tree(out)
    said = ok("export", store, patch, "--checkpoint", "memory://cli/out", "--workers", 2, "-q")
    assert said.strip() == "written: memory:///cli/out"
    ok("export", f"file://{chain / 'model'}", patch, f"file://{tmp_path / 'local'}", "--workers", 1, "-q")
    for found in (stored("out"), tree(tmp_path / "local")):
        assert found.keys() == wanted.keys()
        assert {name for name in wanted if found[name] != wanted[name]} <= {"repe_manifest.json"}
    assert stored("model")["model.safetensors"] != wanted["model.safetensors"]  # control
    # A file:// URL is a path, so that a plan can be baked on the model behind it.
    ok("export", f"file://{chain / 'model'}", chain / "affine.plan", tmp_path / "baked", "-q")
    assert tree(tmp_path / "baked")["model.safetensors"] == wanted["model.safetensors"]


def test_mistakes_with_urls_are_sentences(store: str, chain: Path, tmp_path: Path) -> None:
    patch, plan = chain / "affine.patch", chain / "affine.plan"
    before = stored("")
    for words, reason in {
        (store, patch, "nonsense://x/out"): "nonsense",
        ("nonsense://x/model", patch, tmp_path / "out"): "nonsense",
        ("memory://cli/nowhere", patch, tmp_path / "out"): "no config.json",
        (store, plan, tmp_path / "out"): "a plan needs the model in memory",
        (store, chain / "linear.patch", "--lora", tmp_path / "out"): "--lora needs the model in memory",
        (chain / "model", patch, store): "exists",
        (store, patch, f"{store}/inside"): "lie apart",
    }.items():
        assert reason in refused("export", *words, "-q"), words
        assert stored("") == before, words
        assert not any(tmp_path.iterdir()), words
    assert run("export", store, patch, tmp_path / "out", "--workers", 0).exit_code == 2


def test_diff_of_urls_is_the_diff_of_the_folders(store: str, chain: Path, tmp_path: Path) -> None:
    ok("export", chain / "model", chain / "linear.patch", tmp_path / "edited", "-q")
    edited = upload(tmp_path / "edited", "edited")
    for name, pair in {
        "paths": (chain / "model", tmp_path / "edited"),
        "urls": (store, edited),
        "mixed": (f"file://{chain / 'model'}", edited),
    }.items():
        words = ("--out", tmp_path / name, "--keep-originals", tmp_path / f"{name}.kept")
        assert "10 edited tensors" in ok("diff", *pair, *words, "-q")
        assert (tmp_path / name).read_bytes() == (tmp_path / "paths").read_bytes()
        assert (tmp_path / f"{name}.kept").read_bytes() == (tmp_path / "paths.kept").read_bytes()
    assert "do not differ" in refused("diff", store, store, "-q")
    assert "no config.json" in refused("diff", store, "memory://cli/nowhere", "-q")


# torch.export


def test_a_program_for_torch_export_equals_the_hooks(chain: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "erased.pt2", chain / "affine.plan"
    said = ok("export", chain / "model", plan, "--torch", out, "-q")
    assert said.strip() == f"written: {out}"  # nothing was baked
    program = torch.export.load(out).module()
    erased, untouched = hooked(chain / "model", plan)
    found = program(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, erased, rtol=0, atol=1e-4)
    assert (found - untouched).abs().max() > 1e-2
    assert "exists" in refused("export", chain / "model", plan, "--torch", out, "-q")
    other = tmp_path / "other.pt2"
    assert "give the plan" in refused(
        "export", chain / "model", chain / "affine.patch", "--torch", other, "-q"
    )
    assert "fingerprint" in refused("export", chain / "other", plan, "--torch", other, "-q")
    assert [path.name for path in tmp_path.iterdir()] == ["erased.pt2"]


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral", dtype=torch.float32)
    plan = random_plan(model, Architecture.of(model).sites("mlp_in"), rank=1)
    with pytest.raises(UnsupportedModelError, match="batched_mm"):
        torch_program(model, plan, tmp_path / "erased.pt2")
    assert not any(tmp_path.iterdir())
