"""GGUF export: what plain transformers and llama.cpp load from the patched file is the patched model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ggufkit
import pytest
import torch
from tiny import oblique, random_plan, tiny, tiny_inputs, token_ids
from torch import Tensor, nn

from repe_unlearn import export
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    ModelMismatchError,
    NumericalWarning,
    OutputExistsError,
    UnsupportedModelError,
)
from repe_unlearn.export import gguf_names
from repe_unlearn.export.gguf_file import encode, new_entry
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan

READS = ("attn_in", "mlp_in")


def made(family: str = "llama", **settings: Any) -> nn.Module:
    """Return a model whose values bfloat16 holds, as those of real checkpoints: norms in GGUF are off by 1."""
    model = tiny(family, dtype=torch.float32, **{**ggufkit.SETTINGS.get(family, {}), **settings})
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def everywhere(model: nn.Module, *, embedding: bool = True) -> Patch:
    """Return random edits of every matrix of a model, the experts and the biases."""
    edits = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if (parameter.ndim == 1 and not name.endswith("bias")) or ("embed" in name and not embedding):
            continue
        generator = torch.Generator().manual_seed(i)
        if parameter.ndim == 2:
            left = torch.randn(parameter.shape[0], 1, generator=generator)
            edits[name] = Edit(left, torch.randn(1, parameter.shape[1], generator=generator), "random")
        else:
            edits[name] = Edit(torch.randn(parameter.shape, generator=generator), None, "random")
    return Patch(edits, fingerprint(model))


def reads(model: nn.Module, *kinds: Any, affine: bool = False) -> Patch:
    arch = Architecture.of(model)
    return bake(model, random_plan(model, arch.sites(*kinds or READS), affine=affine))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def furthest(model: nn.Module, other: nn.Module) -> float:
    ours, theirs = parameters(model), parameters(other)
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out.parent / f"{out.name}.repe_manifest.json").read_text())


@pytest.mark.parametrize("family", sorted(ggufkit.SETTINGS))
def test_transformers_loads_the_patched_model(family: str, tmp_path: Path) -> None:
    model = made(family)
    patch = everywhere(model, embedding=family != "gemma2")
    source = ggufkit.write(tmp_path / "model.gguf", model)
    tied = getattr(model.config, "tie_word_embeddings", False)
    out = export.gguf(source, patch, tmp_path / "patched.gguf")
    loaded = ggufkit.load(out)
    patch.apply_(model)
    assert furthest(loaded, model) == 0.0
    assert loaded.config.tie_word_embeddings == tied
    assert furthest(ggufkit.load(source), model) > 0.1


def test_logits_are_those_of_the_patched_model(tmp_path: Path) -> None:
    model = made()
    patch = reads(model, *READS, "final", "attn_out", "mlp_out")
    out = export.gguf(ggufkit.write(tmp_path / "m.gguf", model), patch, tmp_path / "p.gguf")
    inputs = tiny_inputs("llama")
    before = model(**inputs).logits
    after = patch.apply_(model) and model(**inputs).logits
    assert (ggufkit.load(out)(**inputs).logits - after).abs().max() < 1e-5
    assert (before - after).abs().max() > 0.1


def test_rows_of_q_and_k_left_in_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    monkeypatch.setitem(gguf_names._ROWS, "llama", replace(gguf_names._ROWS["llama"], rotated=False))
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        export.gguf(source, patch, tmp_path / "p.gguf")
    with pytest.raises(ModelMismatchError, match=r"q_proj.*off by"):
        export.gguf(source, patch, tmp_path / "p.gguf", model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    wrong = export.gguf(source, patch, tmp_path / "p.gguf", check_fingerprint=False)
    patch.apply_(model)
    assert furthest(ggufkit.load(wrong), model) > 0.1


def test_everything_else_is_copied_byte_for_byte(tmp_path: Path) -> None:
    model = made()
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", model, "BF16")
    out = export.gguf(source, patch, tmp_path / "p.gguf")
    before, after = ggufkit.contents(source), ggufkit.contents(out)
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    kinds = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    assert changed == {f"blk.{i}.{kind}.weight" for i in range(3) for kind in kinds}
    assert ggufkit.metadata(source) == ggufkit.metadata(out)
    # The header too, and no byte of an unedited tensor moved.
    old, new = source.read_bytes(), out.read_bytes()
    assert len(old) == len(new)
    assert sum(a != b for a, b in zip(old, new, strict=True)) <= sum(len(before[n][1]) for n in changed)
    assert old[: old.index(before["token_embd.weight"][1])] == new[: new.index(after["token_embd.weight"][1])]


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 5e-3)])
def test_what_rounding_costs_is_in_the_manifest(kind: str, bound: float, tmp_path: Path) -> None:
    model = made()
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", model, kind)
    out = export.gguf(source, patch, tmp_path / "p.gguf", model=model)
    report = manifest(out)
    assert set(report["edited"]) == set(patch.edits)
    assert report["fingerprint"] == patch.fingerprint
    for numbers in report["edited"].values():
        assert abs(numbers["undone"]) < bound
        assert numbers["error"] < 4 * bound
        assert numbers["type"] == kind
    patch.apply_(model)
    assert furthest(ggufkit.load(out), model) < 8 * bound


def test_packed_tensors_are_refused_then_measured(tmp_path: Path) -> None:
    model = made(intermediate_size=64)  # types pack 32 elements at a time
    edits = {
        name: Edit(edit.left * 1e-2, edit.right, edit.rule)
        for name, edit in reads(model, "attn_in").edits.items()
    }
    patch = Patch(edits, fingerprint(model))
    source = ggufkit.write(tmp_path / "m.gguf", model, "Q4_1")
    with pytest.raises(UnsupportedModelError, match=r"9 edited tensors.*Q4_1"):
        export.gguf(source, patch, tmp_path / "p.gguf", model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]

    with pytest.warns(NumericalWarning, match="undoes"):
        rounded = export.gguf(source, patch, tmp_path / "p.gguf", model=model, requantise=True)
    assert {kind for kind, _ in ggufkit.contents(rounded).values()} == {"Q4_1", "F32"}
    name = "model.layers.0.self_attn.v_proj.weight"
    delta = patch.edits[name].delta()
    moved = parameters(ggufkit.load(rounded))[name] - parameters(ggufkit.load(source))[name]
    kept = float((moved.detach().double() * delta).sum() / delta.square().sum())
    assert manifest(rounded)["edited"][name]["undone"] == pytest.approx(1 - kept, abs=1e-4)

    wide = export.gguf(source, patch, tmp_path / "w.gguf", model=model, requantise="F16")
    held, before = ggufkit.contents(wide), ggufkit.contents(source)
    assert {n for n in held if held[n] != before[n]} == {
        f"blk.{i}.attn_{x}.weight" for i in range(3) for x in "qkv"
    }
    assert held["blk.0.attn_q.weight"][0] == "F16"
    assert max(abs(n["undone"]) for n in manifest(wide)["edited"].values()) < 0.02
    assert furthest(ggufkit.load(wide), ggufkit.load(source)) > 1e-3


def test_a_model_loaded_from_a_packed_file_needs_no_model_argument(tmp_path: Path) -> None:
    source = ggufkit.write(tmp_path / "m.gguf", made(intermediate_size=64), "Q8_0")
    model = ggufkit.load(source)
    patch = reads(model)
    out = export.gguf(source, patch, tmp_path / "p.gguf", requantise="f32")
    patch.apply_(model)
    assert furthest(ggufkit.load(out), model) == 0.0


def test_mixtral_which_only_llama_cpp_reads(tmp_path: Path) -> None:
    model = made("mixtral")
    patch = everywhere(model)
    name = "model.layers.0.mlp.experts.down_proj"
    shared = Edit(torch.randn(4, 32, 1), torch.randn(1, 48), "one right for all experts")
    patch = replace(patch, edits={**patch.edits, name: shared})
    source = ggufkit.write(tmp_path / "m.gguf", model)
    with pytest.raises(ModelMismatchError, match="model="):
        export.gguf(source, patch, tmp_path / "p.gguf")
    out = export.gguf(source, patch, tmp_path / "p.gguf", model=model)
    patch.apply_(model)
    wanted = ggufkit.contents(ggufkit.write(tmp_path / "w.gguf", model))
    assert ggufkit.contents(out) == wanted
    assert ggufkit.contents(source) != wanted


def test_mistral_is_llama_to_llama_cpp(tmp_path: Path) -> None:
    model = made("mistral")
    out = export.gguf(ggufkit.write(tmp_path / "m.gguf", model), reads(model), tmp_path / "p.gguf")
    assert out.is_file()


def test_types_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="F16"):
        encode(torch.zeros(2, 256), new_entry("x", "Q6_K", (2, 256)))
    with pytest.raises(UnsupportedModelError, match="packs 256"):
        new_entry("x", "Q6_K", (2, 32))
    model = made(intermediate_size=64)
    source = ggufkit.write(tmp_path / "m.gguf", model, "Q4_1")
    with pytest.raises(InputError, match="NO_SUCH"):
        export.gguf(source, reads(model), tmp_path / "p.gguf", model=model, requantise="no_such")


def test_new_biases_are_added_in_the_files_row_order(tmp_path: Path) -> None:
    model = made()
    patch = reads(model, "attn_in", affine=True)
    assert patch.new_biases
    assert patch.zero_biases
    out = export.gguf(ggufkit.write(tmp_path / "m.gguf", model), patch, tmp_path / "p.gguf")
    held = ggufkit.contents(out)
    for projection, heads in (("q", 4), ("k", 2), ("v", 0)):
        wanted = patch.edits[f"model.layers.1.self_attn.{projection}_proj.bias"].delta().float()
        wanted = ggufkit.permuted(wanted, heads) if heads else wanted
        kind, data = held[f"blk.1.attn_{projection}.bias"]
        assert kind == "F32"
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), wanted)
    assert "blk.1.attn_output.bias" not in held  # zero: llama.cpp needs no tensor for it
    assert len(manifest(out)["added"]) == 9


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    model = made("qwen3")
    name = "model.layers.0.self_attn.o_proj.bias"
    patch = Patch({name: Edit(torch.ones(32), None, "one")}, fingerprint(model), {name: (32,)})
    with pytest.raises(UnsupportedModelError, match=r"attn_output\.bias"):
        export.gguf(ggufkit.write(tmp_path / "m.gguf", model), patch, tmp_path / "p.gguf")


def test_a_tied_head_becomes_a_tensor_of_its_own(tmp_path: Path) -> None:
    model = made(tie_word_embeddings=True)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    assert "output.weight" not in ggufkit.contents(source)
    patch = reads(model, "final")
    assert patch.tied
    with pytest.raises(UnsupportedModelError, match="adapter"):
        export.gguf(source, replace(patch, adapter=True), tmp_path / "p.gguf")
    out = export.gguf(source, patch, tmp_path / "p.gguf")
    loaded = ggufkit.load(out)
    embedding = model.get_input_embeddings().weight.clone()
    patch.apply_(model)
    assert furthest(loaded, model) == 0.0
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert not torch.equal(loaded.get_output_embeddings().weight, embedding)

    name = "model.embed_tokens.weight"
    model.lm_head.weight = model.model.embed_tokens.weight
    only = Patch(
        {name: everywhere(made(tie_word_embeddings=True)).edits[name]}, patch.fingerprint, tied=patch.tied
    )
    loaded = ggufkit.load(export.gguf(source, only, tmp_path / "q.gguf"))
    assert torch.equal(loaded.get_output_embeddings().weight, embedding)
    assert not torch.equal(loaded.get_input_embeddings().weight, embedding)


def test_a_head_that_llama_cpp_always_ties_is_refused(tmp_path: Path) -> None:
    model = made("gemma2", tie_word_embeddings=True)
    patch = reads(model, "final")
    with pytest.raises(UnsupportedModelError, match="ties"):
        export.gguf(ggufkit.write(tmp_path / "m.gguf", model), patch, tmp_path / "p.gguf")


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, other = made(), tiny("llama", dtype=torch.float32, seed=1)
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", other)
    with pytest.raises(ModelMismatchError, match="this file has"):
        export.gguf(source, patch, tmp_path / "p.gguf")
    with pytest.raises(ModelMismatchError, match="this model has"):
        export.gguf(source, patch, tmp_path / "p.gguf", model=other)
    with pytest.raises(ModelMismatchError, match="off by"):
        export.gguf(source, patch, tmp_path / "p.gguf", model=model)
    foreign = Patch({"model.layers.0.nothing.weight": Edit(torch.ones(2, 2), None, "x")}, "")
    with pytest.raises(ModelMismatchError, match="no tensor"):
        export.gguf(source, foreign, tmp_path / "p.gguf", check_fingerprint=False)
    turned = Patch({"model.layers.0.mlp.down_proj.weight": Edit(torch.ones(48, 32), None, "turned")}, "")
    with pytest.raises(ModelMismatchError, match="shape"):
        export.gguf(source, turned, tmp_path / "p.gguf", check_fingerprint=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_bad_files_and_places(tmp_path: Path) -> None:
    model = made()
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    whole = source.read_bytes()
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(whole[:-4000])
    text.write_text("no GGUF file at all, just words")
    out = tmp_path / "p.gguf"
    for path, words in ((cut, "truncated"), (text, "no GGUF file"), (tmp_path / "none.gguf", "not a file")):
        with pytest.raises(FileFormatError, match=words):
            export.gguf(path, patch, out)
    part = ggufkit.write(tmp_path / "part.gguf", model, **{"split.count": 2})
    with pytest.raises(FileFormatError, match="parts"):
        export.gguf(part, patch, out)
    bloom = tmp_path / "bloom.gguf"
    bloom.write_bytes(whole.replace(b"llama", b"bloom"))
    with pytest.raises(UnsupportedModelError, match=r"bloom.*supported"):
        export.gguf(bloom, patch, out)
    with pytest.raises(InputError, match="one file"):
        export.gguf(source, patch, source, force=True)
    out.write_text("mine")
    with pytest.raises(OutputExistsError):
        export.gguf(source, patch, out)
    assert out.read_text() == "mine"
    assert not (tmp_path / "p.gguf.repe_manifest.json").exists()
    assert export.gguf(source, patch, out, force=True) == out
    assert source.read_bytes() == whole
    again = export.gguf(out, patch, tmp_path / "q.gguf", check_fingerprint=False)
    assert manifest(again)["previous"]["fingerprint"] == patch.fingerprint
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_the_patched_model_does(family: str, tmp_path: Path) -> None:
    """With new biases too (llama), which transformers would not load from the file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = made(family)
    small = {
        name: Edit(edit.left * 0.1, edit.right, edit.rule) for name, edit in everywhere(model).edits.items()
    }
    patches = [Patch(small, fingerprint(model))]
    if family == "llama":
        patches.append(reads(model, "attn_in", affine=True))
    source = ggufkit.write(tmp_path / "m.gguf", model)
    ids = token_ids(1, 12)[0].tolist()

    def theirs(path: Path) -> Tensor:
        engine = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        engine.eval(ids)
        return torch.tensor(engine.scores[: len(ids)].copy())

    def ours() -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    before = ours()
    assert (theirs(source) - before).norm() < 5e-3 * before.norm()  # keys and values are cached in 16 bits
    for number, patch in enumerate(patches):
        out = export.gguf(source, patch, tmp_path / f"p{number}.gguf", model=model)
        patch.apply_(model)
        wanted = ours()
        patch.revert_(model)
        assert (theirs(out) - wanted).norm() < 5e-3 * wanted.norm()
        assert (wanted - before).norm() > 0.1 * wanted.norm()


@pytest.mark.slow
@pytest.mark.real
def test_the_real_small_model_in_llama_cpp(tmp_path: Path) -> None:
    """The packed file itself, edited: llama.cpp goes on with the text as the patched model in transformers does."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from repe_unlearn.gguf_cache import builtin_gguf
    from repe_unlearn.models import load

    model = load(progress=False, dtype=torch.float32).model
    # Every matrix of every block: none stays packed, for which llama.cpp would round activations to 8 bits.
    sites = Architecture.of(model).sites(*READS, "attn_out", "mlp_out")
    erasers = {site: oblique(1, d=576, affine=False, seed=i) for i, site in enumerate(sites)}
    patch = bake(model, ErasurePlan(erasers, fingerprint(model)))
    out = export.gguf(builtin_gguf()[0], patch, tmp_path / "p.gguf", requantise="F16")
    assert max(abs(numbers["undone"]) for numbers in manifest(out)["edited"].values()) < 1e-3
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"

    def follow(logits: Any) -> list[int]:
        text = list(ids)
        for _ in range(4):
            text.append(int(logits(text)[-1].argmax()))
        return text

    def ours(text: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([text])).logits[0]

    engine = llama_cpp.Llama(str(out), n_ctx=64, n_threads=1, logits_all=True, verbose=False)

    def theirs(text: list[int]) -> Tensor:
        engine.reset()
        engine.eval(text)
        return torch.tensor(engine.scores[: len(text)].copy())

    before = ours(ids)
    patch.apply_(model)
    wanted, got = ours(ids), theirs(ids)
    assert (got - wanted).norm() < 0.1 * (before - wanted).norm()
    assert follow(theirs) == follow(ours)
