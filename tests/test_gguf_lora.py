"""GGUF adapters: what llama.cpp adds to the file's weights is what the patch adds to the model's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ggufkit
import pytest
import torch
from tiny import oblique, random_plan, tiny, token_ids
from torch import Tensor, nn

from repe_unlearn import export
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, ModelMismatchError, OutputExistsError, UnsupportedModelError
from repe_unlearn.export import gguf_names
from repe_unlearn.fingerprints import fingerprint
from repe_unlearn.folding import bake
from repe_unlearn.patch import Edit, Patch
from repe_unlearn.plan import ErasurePlan

READS = ("attn_in", "mlp_in")


def made(family: str = "llama", **settings: Any) -> nn.Module:
    """Return a model whose values bfloat16 holds."""
    model = tiny(family, dtype=torch.float32, **{**ggufkit.SETTINGS.get(family, {}), **settings})
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def everywhere(model: nn.Module, *, size: float = 1.0, embedding: bool = True) -> Patch:
    """Return random edits of rank 1 of every matrix that an adapter reaches, experts too; ranks differ on purpose."""
    edits = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if p.ndim < 2 or name.endswith("wpe.weight") or ("embed_tokens" in name and not embedding):
            continue
        generator = torch.Generator().manual_seed(i)
        rank = 1 + i % 2
        left = size * torch.randn(*p.shape[:-1], rank, generator=generator)
        right = torch.randn(*p.shape[:-2], rank, p.shape[-1], generator=generator)
        edits[name] = Edit(left, right / p.shape[-1] ** 0.5, "random")
    return Patch(edits, fingerprint(model))


def reads(model: nn.Module, *kinds: Any) -> Patch:
    return bake(model, random_plan(model, Architecture.of(model).sites(*kinds or READS), affine=False))


def products(adapter: Path) -> dict[str, Tensor]:
    """Return what llama.cpp adds to each tensor, by its own rule: alpha / rank · B A, in the shape of the file."""
    reader = gguf.GGUFReader(adapter)
    held = {t.name: torch.tensor(t.data.astype("float64")) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {}
    for name in {name.rpartition(".")[0] for name in held}:
        a, b = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        a = a.T if name == "token_embd.weight" else a
        added = b @ a * (alpha / b.shape[-1])
        found[name] = added.T if name == "token_embd.weight" else added
    return found


def values(path: Path) -> dict[str, Tensor]:
    return {t.name: torch.tensor(t.data.astype("float64")) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", [*sorted(set(ggufkit.SETTINGS) - {"qwen2_moe", "qwen3_moe"}), "mixtral"])
def test_the_products_are_what_the_patched_file_has_more(family: str, tmp_path: Path) -> None:
    """Held against the file of the patched model, made by the converter's rules: row order, transposes, experts."""
    tied = family == "gemma2"  # which llama.cpp always ties
    model = made(family, tie_word_embeddings=tied)
    patch = everywhere(model, embedding=not tied)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    out = export.gguf_lora(source, patch, tmp_path / "a.gguf", model=model)
    before, found = values(source), products(out)
    patch.apply_(model)
    after = values(ggufkit.write(tmp_path / "p.gguf", model))
    assert set(found) == {name for name in before if not torch.equal(before[name], after[name])}
    for name, added in found.items():
        moved = (after[name] - before[name]).reshape(added.shape)
        assert (added - moved).abs().max() <= 1e-5 < 1e-2 < moved.abs().max(), name


def test_rows_of_q_and_k_left_in_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    patch = reads(model)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    right = products(export.gguf_lora(source, patch, tmp_path / "a.gguf"))
    monkeypatch.setitem(gguf_names._ROWS, "llama", replace(gguf_names._ROWS["llama"], rotated=False))
    with pytest.raises(ModelMismatchError, match=r"q_proj.*off by"):
        export.gguf_lora(source, patch, tmp_path / "b.gguf", model=model)
    wrong = products(export.gguf_lora(source, patch, tmp_path / "b.gguf", check_fingerprint=False))
    assert {name.split(".")[2] for name in right if not torch.allclose(right[name], wrong[name])} == {
        "attn_q",
        "attn_k",
    }


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    model = made()
    patch = everywhere(model)
    out = export.gguf_lora(
        ggufkit.write(tmp_path / "m.gguf", model), patch, tmp_path / "a.gguf", dtype=torch.float16
    )
    facts = ggufkit.metadata(out)
    assert facts["general.architecture"] == "llama"
    assert (facts["general.type"], facts["adapter.type"], facts["adapter.lora.alpha"]) == (
        "adapter",
        "lora",
        2.0,
    )
    assert facts["repe_unlearn.fingerprint"] == patch.fingerprint
    held = ggufkit.contents(out)
    assert {kind for kind, _ in held.values()} == {"F16"}
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in gguf.GGUFReader(out).tensors}
    assert {shape[-2] for name, shape in shapes.items() if name.endswith("a") and "token" not in name} == {2}
    assert shapes["token_embd.weight.lora_a"] == (97, 2)  # looked up by token


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    model = made()
    source = ggufkit.write(tmp_path / "m.gguf", model)
    patch = reads(model)
    name, edit = next(iter(patch.edits.items()))
    out = tmp_path / "a.gguf"

    def refused(error: type[Exception], words: str, edits: dict[str, Edit], **options: Any) -> None:
        with pytest.raises(error, match=words):
            export.gguf_lora(source, replace(patch, edits=edits), out, **options)

    refused(InputError, "biases", {"model.layers.0.self_attn.q_proj.bias": Edit(torch.ones(32), None, "one")})
    refused(InputError, "vector", {"model.norm.weight": Edit(torch.ones(32), None, "one")})
    refused(InputError, "max_rank", {name: Edit(edit.delta(), None, "dense")})
    refused(InputError, "float16", dict(patch.edits), dtype=torch.bfloat16)
    refused(ModelMismatchError, "no tensor", {"model.layers.0.nothing.weight": edit})
    refused(ModelMismatchError, r"shape \[32, 31\]", {name: Edit(edit.left, edit.right[:, 1:], "narrow")})  # type: ignore[index]
    with pytest.raises(ModelMismatchError, match="fingerprint"):
        export.gguf_lora(source, replace(patch, fingerprint="0" * 16), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    export.gguf_lora(source, replace(patch, edits={name: Edit(edit.delta(), None, "dense")}), out, max_rank=2)
    torch.testing.assert_close(
        products(out)["blk.0.attn_q.weight"],
        ggufkit.permuted(edit.delta(), 4).double(),
        rtol=0,
        atol=1e-5,
    )
    with pytest.raises(OutputExistsError):
        export.gguf_lora(source, patch, out)
    assert export.gguf_lora(source, patch, out, force=True) == out


def test_tables_that_llama_cpp_cannot_adapt_are_refused(tmp_path: Path) -> None:
    tied = made(tie_word_embeddings=True)
    source = ggufkit.write(tmp_path / "m.gguf", tied)
    with pytest.raises(UnsupportedModelError, match="one tensor for embedding and head"):
        export.gguf_lora(source, reads(tied, "final"), tmp_path / "a.gguf")
    gpt2 = made("gpt2")
    edit = Edit(torch.ones(1024, 1), torch.ones(1, 32), "position")
    patch = Patch({"transformer.wpe.weight": edit}, fingerprint(gpt2))
    with pytest.raises(UnsupportedModelError, match="without asking"):
        export.gguf_lora(ggufkit.write(tmp_path / "g.gguf", gpt2), patch, tmp_path / "a.gguf")


# In llama.cpp


def engine(path: Path, adapter: Path | None = None) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    lora = None if adapter is None else str(adapter)
    return llama_cpp.Llama(str(path), lora_path=lora, n_ctx=64, n_threads=1, logits_all=True, verbose=False)


def scores(llama: Any, ids: list[int]) -> Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)].copy())


def followed(logits: Any, ids: list[int], count: int) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(text)[-1].argmax()))
    return text[len(ids) :]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3"])
def test_llama_cpp_with_the_adapter_computes_what_the_patched_model_does(family: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = made(family, tie_word_embeddings=False)
    patch = everywhere(model, size=0.3)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    adapter = export.gguf_lora(source, patch, tmp_path / "a.gguf", model=model)
    ids = token_ids(1, 12)[0].tolist()

    @torch.no_grad()
    def ours(text: list[int]) -> Tensor:
        return model(torch.tensor([text])).logits[0]

    before = ours(ids)
    plain, adapted = engine(source), engine(source, adapter)
    patch.apply_(model)
    wanted = ours(ids)
    assert (
        scores(adapted, ids) - wanted
    ).norm() < 5e-3 * wanted.norm()  # keys and values are cached in 16 bits
    assert (scores(plain, ids) - before).norm() < 5e-3 * before.norm()
    assert (wanted - before).norm() > 0.1 * wanted.norm()
    assert followed(lambda text: scores(adapted, text), ids, 8) == followed(ours, ids, 8)


@pytest.mark.slow
def test_what_a_tied_file_would_do_to_llama_cpp(tmp_path: Path) -> None:
    """Why it is refused: the process dies, or computes something else. If neither happens, allow it."""
    pytest.importorskip("llama_cpp")
    model = made(tie_word_embeddings=True)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    whole = made(tie_word_embeddings=False)
    name = "model.embed_tokens.weight"
    edit = Edit(torch.randn(97, 1), torch.randn(1, 32), "random")
    beside = ggufkit.write(tmp_path / "w.gguf", whole)
    adapter = export.gguf_lora(beside, Patch({name: edit}, fingerprint(whole)), tmp_path / "a.gguf")
    code = (
        "import sys, llama_cpp\n"
        "e = llama_cpp.Llama(sys.argv[1], lora_path=sys.argv[2], n_ctx=64, logits_all=True, verbose=False)\n"
        "e.eval([5, 6, 7])\nprint('alive')"
    )
    died = {
        path.name: subprocess.run(
            [sys.executable, "-c", code, str(path), str(adapter)],
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
        ).stdout.strip()
        != "alive"
        for path in (source, beside)
    }
    assert died == {"m.gguf": True, "w.gguf": False}


@pytest.mark.slow
@pytest.mark.real
def test_the_real_small_model_packed_as_it_is(tmp_path: Path) -> None:
    """The 4-bit file itself with an adapter that rounds nothing: greedy tokens are those of the baked model."""
    pytest.importorskip("llama_cpp")
    from repe_unlearn.gguf_cache import builtin_gguf
    from repe_unlearn.models import load

    model = load(progress=False, dtype=torch.float32).model
    sites = Architecture.of(model).sites(*READS, "attn_out", "mlp_out")
    erasers = {site: oblique(1, d=576, affine=False, seed=i) for i, site in enumerate(sites)}
    patch = bake(model, ErasurePlan(erasers, fingerprint(model)))
    source = builtin_gguf()[0]
    adapter = export.gguf_lora(source, patch, tmp_path / "a.gguf", model=model)
    assert adapter.stat().st_size < 0.05 * source.stat().st_size
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    plain, adapted = engine(source), engine(source, adapter)

    @torch.no_grad()
    def ours(text: list[int]) -> Tensor:
        return model(torch.tensor([text])).logits[0]

    before = ours(ids)
    rounding = float((scores(plain, ids) - before).norm())  # llama.cpp packs activations to 8 bits
    patch.apply_(model)
    wanted = ours(ids)
    off = float((scores(adapted, ids) - wanted).norm())
    assert off < 1.5 * rounding < 0.5 * float((before - wanted).norm())
    assert followed(lambda text: scores(adapted, text), ids, 4) == followed(ours, ids, 4)
