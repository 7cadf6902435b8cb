"""Control vectors: the layout that llama.cpp reads, and refusals of what it would take for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ggufkit
import numpy as np
import pytest
import torch
from tiny import random_plan, tiny

from repe_unlearn import export
from repe_unlearn.architectures import Architecture
from repe_unlearn.errors import InputError, NonFiniteError, OutputExistsError, ShapeError
from repe_unlearn.folding import bake


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
