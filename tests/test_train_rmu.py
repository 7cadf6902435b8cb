"""RMU by gradient descent: against plain torch, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from textkit import PAD, text_model, text_tokenizer
from tiny import assert_same, hook_count, snapshot
from torch import Tensor, nn

import repe_unlearn.train.steer as module
from repe_unlearn import train
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.train.samples import in_order, tokenise

FORGET = train.from_texts(["the cat sat", "a dog ran far away", "one two"])
RETAIN = train.from_texts(["my hat fits", "we saw rain today", "four five"])
TOKENIZER = text_tokenizer()
LAYER = 1


def hidden(model: nn.Module, samples: list[train.Sample]) -> tuple[Tensor, Tensor]:
    """The stream behind the block at every position, and which positions are real, in plain transformers."""
    batch = next(in_order(tokenise(samples, TOKENIZER, max_length=None), len(samples), PAD))
    out = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True, use_cache=False)
    return out.hidden_states[LAYER + 1], batch.mask.bool()


def run(model: nn.Module, forget: Any = FORGET, **options: Any) -> train.Run:
    settings = {"layer": LAYER, "steps": 3, "lr": 1e-3, "progress": False, **options}
    return train.rmu(model, TOKENIZER, forget, RETAIN, **settings)


@pytest.mark.parametrize("positions", ["tokens", "padded"])
def test_three_steps_are_those_of_a_plain_loop(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    u = torch.nn.functional.normalize(torch.arange(32, dtype=torch.float64), dim=0)
    monkeypatch.setattr(module, "directions", lambda n, d, generator, uniform: u[None])
    plain = copy.deepcopy(model)
    trained = [plain.model.layers[i].mlp.down_proj.weight.requires_grad_() for i in (0, 1)]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    frozen, real = hidden(model, RETAIN)
    for _ in range(3):
        (f, is_real), (r, _) = hidden(plain, FORGET), hidden(plain, RETAIN)
        at_f, at_r = (is_real, real) if positions == "tokens" else (is_real | True, real | True)
        optimiser.zero_grad()
        (((f[at_f] - 7 * u) ** 2).mean() + 50 * ((r[at_r] - frozen[at_r]) ** 2).mean()).backward()
        optimiser.step()
    found = run(model, c=7.0, alpha=50.0, positions=positions, sinks=0)
    assert len(found.patch) == 2
    other = run(model, c=7.0, alpha=50.0, positions=positions, sinks=1)
    for i, wanted in enumerate(trained):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        assert torch.allclose(found.patch.edits[name].apply(model.get_parameter(name)), wanted, atol=1e-12)
        assert not torch.allclose(other.patch.edits[name].left, found.patch.edits[name].left, atol=1e-6)


def test_it_steers_the_forget_texts_and_holds_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    u = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    monkeypatch.setattr(module, "directions", lambda n, d, generator, uniform: u[None])
    before = snapshot(model)

    def measure(alpha: float) -> tuple[float, float]:
        found = run(model, c=10.0, alpha=alpha, steps=80, lr=2e-2)
        (r, real), (f, real_f) = hidden(model, RETAIN), hidden(model, FORGET)
        found.patch.apply_(model)
        moved = (hidden(model, RETAIN)[0] - r)[real].norm() / r[real].norm()
        h = hidden(model, FORGET)[0]
        found.patch.revert_(model)
        rows = real_f.clone()
        rows[:, 0] = False
        along = torch.cosine_similarity(h[rows], u[None]).mean()
        assert abs(float(torch.cosine_similarity(f[rows], u[None]).mean())) < 0.3
        return float(along), float(moved)

    along, moved = measure(10.0)
    loose_along, loose_moved = measure(0.0)  # the control: nothing holds the retain texts
    assert along > 0.6
    assert loose_along > 0.9
    assert moved < 0.3 * loose_moved
    assert_same(before, model)


def test_the_forward_stops_behind_the_layer_and_the_original_is_run_once_per_text() -> None:
    model = text_model()
    calls = [0, 0, 0]

    def count(layer: int) -> Any:
        def hook(*_: object) -> None:
            calls[layer] += 1

        return hook

    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(model.model.layers)]
    run(model, steps=5)
    for handle in handles:
        handle.remove()
    # Per step one forward of each set; the first batch of forgetting and of retaining once more, for c and h0.
    assert calls == [12, 12, 0]


def test_adaptive_c_is_a_multiple_of_the_mean_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    u = torch.eye(32, dtype=torch.float64)[:1]
    monkeypatch.setattr(module, "directions", lambda n, d, generator, uniform: u)
    h, real = hidden(model, FORGET)
    length = 5.0 * float(h[real].norm(dim=1).mean())
    wanted = float(((h[real] - length * u) ** 2).mean())
    assert run(model, c="adaptive", sinks=0, steps=1).history[0].forget == pytest.approx(wanted, rel=1e-10)
    assert run(model, c=20.0, sinks=0, steps=1).history[0].forget != pytest.approx(wanted, rel=1e-2)


def test_only_completions_may_count() -> None:
    model = text_model()
    pair, text = train.from_pairs([("the cat", "sat")]), train.from_texts(["the cat sat"])

    def loss(samples: list[train.Sample], positions: str) -> float:
        return run(model, samples, positions=positions, sinks=0, steps=1).history[0].forget

    assert loss(pair, "tokens") == loss(text, "tokens")
    assert loss(pair, "completion") != pytest.approx(loss(text, "completion"), rel=1e-6)


def test_topics_take_turns_with_vectors_of_their_own() -> None:
    model = text_model()
    topics = {"a": FORGET[:1], "b": FORGET[:1]}
    history = run(model, topics, steps=2, lr=1e-12).history
    assert history[0].forget != pytest.approx(history[1].forget, rel=1e-3)
    alone = run(model, {"a": FORGET[:1]}, steps=2, lr=1e-12).history
    assert alone[0].forget == pytest.approx(alone[1].forget, rel=1e-6)


def test_gaussian_directions_are_orthogonal_and_those_of_the_reference_code_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    own = module.directions(3, 4096, generator)
    assert torch.allclose(own @ own.T, torch.eye(3), atol=1e-5)
    theirs = module.directions(2, 4096, generator, uniform=True)
    assert float(theirs[0] @ theirs[1]) == pytest.approx(0.75, abs=0.02)
    assert abs(float(own.sum(1)[0]) / 64) < 0.1  # cosine with the vector of ones
    assert float(theirs.sum(1)[0]) / 64 == pytest.approx(3**0.5 / 2, abs=0.02)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "mlp.down_proj.weight"),
        ("gpt_neox", "mlp.dense_4h_to_h.weight"),
        ("gpt2", "mlp.c_proj.weight"),
        ("phi3", "mlp.down_proj.weight"),
    ],
)
def test_writers_come_from_the_row_of_the_family(family: str, name: str) -> None:
    patch = run(text_model(family), layers=[-2], steps=1).patch
    (found,) = patch.edits
    assert found.endswith(f".1.{name}")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layer": 9}, InputError, "got layer 9"),
        ({"layers": [0, 2]}, InputError, r"got layers=\[0, 2\] for layer=1"),
        ({"layers": []}, InputError, r"got layers=\[\]"),
        ({"c": -1.0}, InputError, "got c=-1.0"),
        ({"c": "auto"}, InputError, "got c='auto'"),
        ({"positions": "last"}, InputError, "got positions='last'"),
        ({"sinks": 12}, InputError, "no position that counts"),
        ({"batch": 0}, InputError, "got batch=0"),
        ({"forget": {}}, NotEnoughDataError, "no forget or no retain"),
        ({"forget": []}, NotEnoughDataError, "no forget or no retain"),
    ],
)
def test_unusable_settings_are_refused(options: dict, error: type, said: str) -> None:
    model = text_model()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        run(model, **options)
    assert_same(before, model)
    assert hook_count(model) == 0


def test_no_hook_stays_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    model = text_model()
    before = snapshot(model)
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert_same(before, model)
    assert hook_count(model) == 0


@pytest.mark.real
@pytest.mark.slow
def test_a_few_steps_on_the_small_real_model() -> None:
    from repe_unlearn.models import load

    model, tokenizer, _ = load(progress=False)
    found = train.rmu(
        model,
        tokenizer,
        train.from_texts(["The capital of France is Paris.", "The capital of Italy is Rome."]),
        train.from_texts(
            ["Bees find their way by the position of the sun.", "Bread rises because of yeast."]
        ),
        layer=12,
        c="adaptive",
        steps=12,
        lr=1e-3,
        progress=False,
    )
    assert found.history[-1].forget < 0.95 * found.history[0].forget
    assert len(found.patch) == 3
