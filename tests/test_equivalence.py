from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import save, tiny_llama
from safetensors.torch import load_file, save_file
from tiny import assert_same, hook_count, random_plan, snapshot

from repe_unlearn import export
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import equivalence
from repe_unlearn.audit.equivalence import Outputs, hooked_and_baked, outputs, reloaded
from repe_unlearn.errors import FileFormatError, NotBakeableError
from repe_unlearn.folding import bake
from repe_unlearn.models import load

PROMPTS = [[10, 20, 30], [40, 50, 60, 70, 80, 90]]
NEW = 12


def test_outputs_compare_bit_for_bit() -> None:
    a = Outputs((torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])), (1, 2))
    b = Outputs((torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0 + 1e-6]])), (1, 2))
    assert a.same_bits(a)
    assert a.far_from(a) == 0.0
    assert not a.same_bits(b)
    assert a.far_from(b) == pytest.approx(1e-6, rel=0.1)
    assert not a.same_bits(replace(a, logits=(a.logits[0].double(), a.logits[1] + 1)))


def test_hook_and_bake_agree_and_the_model_is_restored() -> None:
    model = tiny_llama(dtype=torch.float64)
    plan = random_plan(model, Architecture.of(model).sites("attn_in", "mlp_in"))
    before = snapshot(model)
    base, hooked, baked = hooked_and_baked(model, plan, PROMPTS, new_tokens=NEW)
    assert_same(before, model)
    assert hook_count(model) == 0
    assert [tuple(logits.shape) for logits in hooked.logits] == [(3, 258), (6, 258)]
    assert hooked.far_from(baked) < 1e-9 < 0.1 < hooked.far_from(base)
    assert hooked.tokens == baked.tokens
    assert len(hooked.tokens) <= NEW
    assert base.same_bits(outputs(model, PROMPTS, NEW))
    # control: weights that do something else are told apart
    other = bake(model, plan.replace({site: plan[site].partial(0.9) for site in plan.sites}))
    _, hooked, wrong = hooked_and_baked(model, plan, PROMPTS, patch=other, new_tokens=NEW)
    assert hooked.far_from(wrong) > 1e-3
    assert_same(before, model)


def test_the_model_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    plan = random_plan(model, Architecture.of(model).sites("attn_in"))
    before = snapshot(model)
    for failing in (1, 2, 3):  # untouched, hooked, baked
        calls = []

        def third_time(*args: object, _failing: int = failing, _calls: list = calls) -> Outputs:
            _calls.append(1)
            if len(_calls) == _failing:
                raise KeyboardInterrupt
            return outputs(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(equivalence, "outputs", third_time)
            with pytest.raises(KeyboardInterrupt):
                hooked_and_baked(model, plan, PROMPTS, new_tokens=NEW)
        assert_same(before, model)
        assert hook_count(model) == 0


def test_what_cannot_be_baked_is_said_before_anything_runs() -> None:
    model = tiny_llama()
    plan = random_plan(model, Architecture.of(model).sites("resid_post", layers=[0]))
    with pytest.raises(NotBakeableError, match="skip path"):
        hooked_and_baked(model, plan, PROMPTS)


def test_an_export_is_reloaded_bit_for_bit_and_a_changed_weight_is_seen(tmp_path: Path) -> None:
    loaded = load(save(tmp_path / "model"), progress=False)
    plan = random_plan(loaded.model, Architecture.of(loaded.model).sites("attn_in", "mlp_in"))
    patch = bake(loaded.model, plan)
    folder = export.checkpoint(loaded.source, patch, tmp_path / "out", progress=False)
    base, _, baked = hooked_and_baked(loaded.model, plan, PROMPTS, patch=patch, new_tokens=NEW)
    # One element of one embedding, of a token that only the second prompt holds: the first must agree all the same.
    weights = load_file(folder / "model.safetensors")
    assert PROMPTS[1][-1] not in (*PROMPTS[0], *baked.tokens)
    weights["model.embed_tokens.weight"][PROMPTS[1][-1], 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = reloaded(folder, PROMPTS, new_tokens=NEW)
    whole, damaged = (replace(again, logits=again.logits[i : i + 1]) for i in (0, 1))
    assert whole.same_bits(replace(baked, logits=baked.logits[:1]))
    assert again.tokens == baked.tokens
    assert not whole.same_bits(replace(base, logits=base.logits[:1]))
    assert not damaged.same_bits(replace(baked, logits=baked.logits[1:]))
    assert 0 < again.far_from(baked) < 0.5
    assert not again.same_bits(baked)


def test_a_broken_folder_says_what_the_other_process_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match=r"plain transformers could not load .*model") as caught:
        reloaded(folder, PROMPTS, new_tokens=NEW)
    assert "Traceback" in str(caught.value)
    assert "safetensors" in str(caught.value).lower()
