"""Control vectors: the layout that llama.cpp reads, and refusals of what it would take for something else."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ggufkit
import numpy as np
import pytest
import torch
from tiny import D, random_plan, tiny, token_ids
from torch import Tensor

from repe_unlearn import export
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, NonFiniteError, OutputExistsError, ShapeError
from repe_unlearn.folding import bake
from repe_unlearn.taps import tap


def test_the_layout_that_llama_cpp_reads(tmp_path: Path) -> None:
    directions = {3: torch.randn(8, dtype=torch.float64), 1: torch.randn(8).to(torch.bfloat16)}
    out = export.control_vector(directions, tmp_path / "deep" / "calm.gguf", model_hint="llama")
    held = ggufkit.contents(out)
    assert list(held) == ["direction.1", "direction.3"]
    for layer, vector in directions.items():
        kind, data = held[f"direction.{layer}"]
        assert kind == "F32"
        assert np.array_equal(np.frombuffer(data, np.float32), vector.float().numpy())
    facts = ggufkit.metadata(out)
    assert facts["general.architecture"] == "controlvector"
    assert facts["controlvector.model_hint"] == "llama"
    assert facts["controlvector.layer_count"] == 2
    with pytest.raises(OutputExistsError):
        export.control_vector(directions, out, model_hint="llama")
    export.control_vector({2: torch.ones(8)}, out, model_hint="llama", force=True)
    assert list(ggufkit.contents(out)) == ["direction.2"]
    assert [path.name for path in out.parent.iterdir()] == ["calm.gguf"]


def test_erasures_are_no_additions(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = random_plan(model, Architecture.of(model).sites("attn_in"), affine=False)
    for wrong in (plan, bake(model, plan)):
        with pytest.raises(InputError, match="subtracts what each token has"):
            export.control_vector(wrong, tmp_path / "x.gguf", model_hint="llama")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("directions", "error", "words"),
    [
        ({}, InputError, "no direction"),
        ({0: torch.ones(4)}, InputError, "layer 0"),
        ({-1: torch.ones(4)}, InputError, "layer -1"),
        ({"1": torch.ones(4)}, InputError, "layer '1'"),
        ({1: torch.ones(1, 4)}, ShapeError, "one width"),
        ({1: torch.ones(4), 2: torch.ones(5)}, ShapeError, "one width"),
        ({1: torch.zeros(4)}, InputError, "all zeros"),
        ({1: torch.tensor([1.0, torch.nan])}, NonFiniteError, "layer 1"),
        ({1: torch.full((2,), 1e300, dtype=torch.float64)}, NonFiniteError, "layer 1"),
    ],
)
def test_bad_directions_leave_nothing(
    directions: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        export.control_vector(directions, tmp_path / "x.gguf", model_hint="llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_llama_cpp_adds_it_where_a_hook_adds_it(tmp_path: Path) -> None:
    """The file is read as llama.cpp's own tools read it, and handed to llama.cpp's own call."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny("llama", dtype=torch.float32)
    source = ggufkit.write(tmp_path / "m.gguf", model)
    directions = {1: 3 * torch.randn(D), 2: 3 * torch.randn(D)}
    held = ggufkit.contents(export.control_vector(directions, tmp_path / "v.gguf", model_hint="llama"))
    buffer = b"".join(held[f"direction.{layer}"][1] for layer in (1, 2))  # from layer 1 on
    prompt = token_ids(1, 8)[0].tolist()

    def engine() -> Any:
        return llama_cpp.Llama(str(source), n_ctx=64, n_threads=1, logits_all=True, verbose=False)

    def theirs(llama: Any, ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.tensor(llama.scores[: len(ids)].copy())

    @torch.no_grad()
    def ours(ids: list[int], layers: tuple[int, ...]) -> Tensor:
        sites = {
            site: directions[n]
            for n in layers
            for site in Architecture.of(model).sites("resid_post", layers=[n])
        }
        with tap(model, {site: lambda x, d=d: x + d for site, d in sites.items()}):
            return model(torch.tensor([ids])).logits[0]

    def follow(logits: Any) -> list[int]:
        text = list(prompt)
        for _ in range(8):
            text.append(int(logits(text)[-1].argmax()))
        return text

    plain, steered = engine(), engine()
    data = (ctypes.c_float * (2 * D)).from_buffer_copy(buffer)
    assert llama_cpp.llama_set_adapter_cvec(steered._ctx.ctx, data, 2 * D, D, 1, 2) == 0
    wanted = ours(prompt, (1, 2))
    close = 5e-3 * wanted.norm()  # keys and values are cached in 16 bits
    assert (theirs(steered, prompt) - wanted).norm() < close
    assert (theirs(plain, prompt) - ours(prompt, ())).norm() < close
    for layers in ((), (1,), (2,)):  # controls: both are there, each at its own layer
        assert (wanted - ours(prompt, layers)).norm() > 20 * close
    assert follow(lambda ids: theirs(steered, ids)) == follow(lambda ids: ours(ids, (1, 2)))
    assert follow(lambda ids: ours(ids, (1, 2))) != follow(lambda ids: ours(ids, ()))
