"""What a survey says of a model before any work is done on it."""

from __future__ import annotations

import math
import time

import pytest
import torch
from tiny import LAYERS, D, tiny

from repe_unlearn.architectures import Architecture
from repe_unlearn.closed_form import closed_form
from repe_unlearn.errors import UnsupportedModelError
from repe_unlearn.facts_files import Corpus
from repe_unlearn.survey import Speed, costs, experts, speed, weight_bytes, width, writers
from tests.textkit import text_model, text_tokenizer

M = 48  # inputs of the tiny models' MLP writers


def test_costs_are_those_of_a_hand_count() -> None:
    model = tiny("llama", dtype=torch.float32)
    capture, fit, closed = costs(model, Speed(forward=100.0, product=1e6), tokens=50)
    sites = 2 * LAYERS
    sums = sites * 50 * 32**2 / 1e6
    assert capture.step == f"capture at {sites} sites"
    assert capture.seconds == pytest.approx(50 / 100 + sums)
    assert capture.bytes == sites * 32 * 32 * 8
    assert fit.seconds == pytest.approx(50 / 100 + sums + sites * 32**3 / 1e6)
    assert fit.bytes == 5 * 32 * 32 * 8 + 4 * 50 * 32 * 4
    assert closed.step == "closed form, layers 2 to 2"  # two thirds of three layers on
    assert closed.seconds == pytest.approx(50 / 100 + (50 * (M**2 + D**2) + M**3 + D**3) / 1e6)
    assert closed.bytes == 5 * M * M * 8 + 50 * (M + D) * 8 + 4 * 50 * 32 * 4


def test_more_tokens_and_a_slower_machine_take_longer() -> None:
    model = tiny("gpt2", dtype=torch.float32)
    base = costs(model, Speed(100.0, 1e9))
    for longer in (costs(model, Speed(100.0, 1e9), tokens=2000), costs(model, Speed(50.0, 1e9))):
        assert all(b.seconds > a.seconds for a, b in zip(base, longer, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "gpt_oss"])
def test_writers_are_those_that_closed_form_takes(model_type: str) -> None:
    model, tokenizer = (
        text_model(model_type, dtype=torch.float32, max_position_embeddings=64),
        text_tokenizer(),
    )
    texts = (
        Corpus(("the cook was late", "a guard ran"), name="forget"),
        Corpus(("my old friend knew",), name="keep"),
    )
    for kind, found in writers(model).items():
        assert {*found.layers} | {*found.refused} == set(range(LAYERS))
        for layer in (0, LAYERS - 1):
            run = {"layers": [layer], "writers": [kind], "texts": (), "progress": False}
            if layer in found.layers:
                (edit,) = closed_form(model, tokenizer, *texts, **run).edits.values()
                assert found.width in edit.shape
            else:
                with pytest.raises(UnsupportedModelError, match="experts"):
                    closed_form(model, tokenizer, *texts, **run)


def test_experts_are_counted() -> None:
    assert experts(tiny("llama")) == {}
    model = tiny("mixtral")
    assert experts(model) == dict.fromkeys(range(LAYERS), model.config.num_local_experts)
    steps = [cost.step for cost in costs(model, Speed(1.0, 1.0))]
    assert len(steps) == 2, "no closed form where no MLP is one matrix"


def test_speed_is_measured_and_changes_nothing() -> None:
    model = tiny("llama", dtype=torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = speed(model)
    assert found.forward > 0
    assert found.product > 0
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    assert speed(model).forward < 64 / 0.3
    handle.remove()


@pytest.mark.parametrize("model_type", ["vit", "t5"])
def test_models_that_read_no_text_are_not_run(model_type: str) -> None:
    model = tiny(model_type, dtype=torch.float32)
    assert math.isnan(speed(model).forward)
    assert all(math.isnan(cost.seconds) and cost.bytes > 0 for cost in costs(model, Speed(math.nan, 1e9)))


def test_tied_weights_count_once() -> None:
    tied = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    apart = tiny("llama", dtype=torch.float32, tie_word_embeddings=False)
    assert weight_bytes(apart) - weight_bytes(tied) == 4 * apart.lm_head.weight.numel()
    assert width(tied) == D
    assert len(Architecture.of(tied).layouts) == LAYERS
