"""Unlearning by gradient descent: against plain torch, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import trainkit
from textkit import PAD, text_model
from tiny import DECODERS, assert_same, snapshot, tiny
from torch import nn
from trainkit import FORGET, RETAIN, TOKENIZER

from repe_unlearn import train
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, UnsupportedModelError
from repe_unlearn.patch import Patch
from repe_unlearn.train.losses import nll
from repe_unlearn.train.samples import in_order, pad, tokenise
from repe_unlearn.train.trainee import choose, trainee


@contextmanager
def patched(model: nn.Module, patch: Patch) -> Iterator[nn.Module]:
    patch.apply_(model)
    try:
        yield model
    finally:
        patch.revert_(model)


def plain_loss(model: nn.Module, samples: list[train.Sample], *, own: bool = False) -> torch.Tensor:
    """The mean NLL of the completions in plain torch; own: as transformers computes it, in float32."""
    batch = next(in_order(tokenise(samples, TOKENIZER, max_length=None), len(samples), PAD))
    labels = torch.where(batch.counts, batch.ids, -100)
    out = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels, use_cache=False)
    return out.loss if own else nn.functional.cross_entropy(out.logits[:, :-1].mT, labels[:, 1:])


@torch.no_grad()
def loss_of(model: nn.Module, samples: list[train.Sample]) -> float:
    return float(plain_loss(model, samples))


@pytest.fixture
def knowing() -> nn.Module:
    model = trainkit.knowing()
    assert loss_of(model, FORGET) < 0.2
    assert loss_of(model, RETAIN) < 0.2
    return model


def short(model: nn.Module, method: str | train.Objective = "grad_diff", **options: object) -> train.Run:
    settings = {"steps": 3, "lr": 1e-3, "accumulate": 1, "progress": False, **options}
    return train.unlearn(model, TOKENIZER, FORGET, RETAIN, method=method, **settings)  # type: ignore[arg-type]


def test_losses_are_those_of_transformers() -> None:
    model = text_model()
    history = short(model, steps=1).history
    assert history[0].forget == pytest.approx(-loss_of(model, FORGET), rel=1e-10)
    assert history[0].retain == pytest.approx(loss_of(model, RETAIN), rel=1e-10)
    assert history[0].retain == pytest.approx(float(plain_loss(model, RETAIN, own=True)), rel=1e-6)
    assert abs(loss_of(model, FORGET) - loss_of(model, RETAIN)) > 0.01  # so that they cannot be mixed up


def test_three_steps_are_those_of_a_plain_loop() -> None:
    model = text_model()
    plain = copy.deepcopy(model).requires_grad_()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        (2.0 * plain_loss(plain, RETAIN) - plain_loss(plain, FORGET)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step()
    twice = replace(train.METHODS["grad_diff"], alpha=2.0)
    run = short(model, twice)
    assert len(run.patch) == len(list(model.parameters()))
    with patched(model, run.patch):
        for name, wanted in plain.named_parameters():
            assert torch.allclose(model.get_parameter(name), wanted, atol=1e-12), name
    for changes in ({"clip": None}, {"weight_decay": 0.5}, {"lr": 2e-3}):
        other = short(model, twice, **changes).patch.edits["model.norm.weight"]
        assert float((other.left - run.patch.edits["model.norm.weight"].left).norm()) > 1e-6, changes


def test_accumulated_batches_are_one_large_batch() -> None:
    model = text_model()
    same = train.from_pairs([("ab", "cd"), ("ef", "gh"), ("ij", "kl"), ("mn", "op")])

    def run(batch: int, accumulate: int) -> Patch:
        return train.unlearn(
            model,
            TOKENIZER,
            same,
            method="grad_ascent",
            steps=1,
            lr=1e-3,
            batch=batch,
            accumulate=accumulate,
            progress=False,
        ).patch

    name = "model.norm.weight"
    large, split, half = run(4, 1).edits[name], run(2, 2).edits[name], run(2, 1).edits[name]
    assert torch.allclose(large.left, split.left, atol=1e-12)
    assert not torch.allclose(large.left, half.left, atol=1e-9)


@pytest.mark.parametrize("name", ["grad_ascent", "grad_diff", "grad_diff_kl", "npo", "simnpo"])
def test_every_method_forgets_and_the_retain_loss_retains(knowing: nn.Module, name: str) -> None:
    before = snapshot(knowing)
    run = short(knowing, name, steps=30)
    assert_same(before, knowing)
    kept = loss_of(knowing, RETAIN)
    with patched(knowing, run.patch):
        forgotten, retained = loss_of(knowing, FORGET), loss_of(knowing, RETAIN)
    assert forgotten > 2.0
    if name != "grad_ascent":
        assert retained < kept + 0.3
        method = train.METHODS[name]
        without = short(knowing, replace(method, alpha=0.0), steps=30)  # the control: nothing holds the rest
        with patched(knowing, without.patch):
            assert loss_of(knowing, RETAIN) > retained + 1.0


def test_the_kl_retain_loss_is_zero_at_first_and_npo_starts_at_two_over_beta_log_two() -> None:
    model = text_model()
    assert short(model, "grad_diff_kl", steps=1).history[0].retain == pytest.approx(0.0, abs=1e-12)
    first = short(model, "npo", steps=1, batch=2).history[0].forget
    assert first == pytest.approx(20 * 0.6931471805599453, rel=1e-12)


def test_one_seed_one_patch(knowing: nn.Module) -> None:
    def norm_weight(seed: int) -> torch.Tensor:
        return (
            short(knowing, seed=seed, batch=2, parameters="model.norm").patch.edits["model.norm.weight"].left
        )

    assert torch.equal(norm_weight(1), norm_weight(1))
    assert not torch.equal(norm_weight(1), norm_weight(2))


def test_only_chosen_parameters_are_in_the_patch() -> None:
    model = text_model()
    writers = train.mlp_writers(model, [-1])
    assert writers == ("model.layers.2.mlp.down_proj.weight",)
    assert tuple(short(model, parameters=writers).patch.edits) == writers
    assert len(short(model, parameters=r"layers\.\d\.mlp").patch) == 9


def test_low_rank_training(knowing: nn.Module) -> None:
    run = short(knowing, "npo", steps=40, lr=2e-2, lora_rank=2)
    assert {edit.rank for edit in run.patch.edits.values()} == {2}
    assert all(name.endswith("proj.weight") or name == "lm_head.weight" for name in run.patch.edits)
    with patched(knowing, run.patch):
        assert loss_of(knowing, FORGET) > 2.0
    # The loss that the loop saw last, before its last step, is that of the patch of one step less.
    earlier = short(knowing, "npo", steps=39, lr=2e-2, lora_rank=2)
    with patched(knowing, earlier.patch):
        assert loss_of(knowing, RETAIN) == pytest.approx(run.history[-1].retain, rel=1e-3)
    with pytest.raises(InputError, match="leaves no matrix"):
        short(knowing, lora_rank=2, parameters="norm")


def test_half_precision_weights_are_trained_in_single(knowing: nn.Module) -> None:
    model = copy.deepcopy(knowing).bfloat16()
    run = short(model, parameters="down_proj", lr=1e-7, steps=2, weight_decay=0.0)
    change = next(iter(run.patch.edits.values())).left.abs()
    assert 1e-8 < float(change.median()) < 1e-6  # bfloat16 itself would have rounded it all away
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_head_is_trained_once() -> None:
    model = text_model(tie_word_embeddings=True)
    run = short(model, parameters="embed|lm_head")
    assert list(run.patch.edits) == ["model.embed_tokens.weight"]
    run.patch.apply_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_prediction_is_the_same_whether_the_head_runs_everywhere() -> None:
    model = text_model()
    batch = pad(tokenise(FORGET, TOKENIZER, max_length=None), [0, 1, 2], PAD)
    with trainee(model, choose(model, "norm")) as trained:
        logp, counts = trained.logp(batch)
        assert logp.shape[1] < batch.ids.shape[1] - 1  # prompts are left out
        trained._accepted = {}  # a model that knows no logits_to_keep
        everywhere, same = trained.logp(batch)
    full = model(input_ids=batch.ids, attention_mask=batch.mask).logits.log_softmax(-1)
    wanted = full[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0][batch.counts[:, 1:]]
    assert torch.allclose(logp[counts], wanted, atol=1e-12)
    assert torch.allclose(everywhere[same], wanted, atol=1e-12)


def test_flags_and_modes_come_back() -> None:
    model = text_model()
    model.requires_grad_(True)
    model.model.norm.requires_grad_(False)
    model.train()
    model.lm_head.eval()
    short(model)
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.model.training
    assert not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_model_alone(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    model.requires_grad_(True)
    before = snapshot(model)
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW, *args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise kind
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(kind):
        short(model)
    assert_same(before, model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_interrupted_forward_leaves_the_model_alone() -> None:
    model = text_model()
    before = snapshot(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        short(model)
    handle.remove()
    assert_same(before, model)


def test_a_loss_that_is_not_a_number_ends_the_run() -> None:
    model = text_model()
    before = snapshot(model)
    bad = train.Objective(lambda logp, counts, _: nll(logp, counts) * float("nan"))
    with pytest.raises(NonFiniteError, match="the loss became nan at step 1; the model is as it was"):
        short(model, bad)
    assert_same(before, model)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"method": "dpo"}, InputError, "got method='dpo'; needed one of grad_ascent, "),
        ({"steps": 0}, InputError, "got steps=0"),
        ({"batch": 1.5}, InputError, "got batch=1.5"),
        ({"lr": 0.0}, InputError, "got lr=0.0"),
        ({"clip": -1.0}, InputError, "got clip=-1.0"),
        ({"lora_rank": 0}, InputError, "got lora_rank=0"),
        ({"parameters": "no_such"}, InputError, "leaves no parameter"),
        ({"parameters": "("}, InputError, "no regular expression"),
        ({"parameters": ["lm_head.bias"]}, InputError, r"\['lm_head.bias'\], which this model does not have"),
    ],
)
def test_unusable_settings_are_refused(options: dict, error: type, said: str) -> None:
    model = text_model()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        short(model, **options)
    assert_same(before, model)


def test_a_retain_loss_needs_samples_and_gradient_ascent_does_not() -> None:
    model = text_model()
    with pytest.raises(NotEnoughDataError, match="npo needs some"):
        train.unlearn(model, TOKENIZER, FORGET, progress=False)
    run = train.unlearn(model, TOKENIZER, FORGET, method="grad_ascent", steps=1, accumulate=1, progress=False)
    assert run.history[0].retain != run.history[0].retain


def test_models_that_do_not_continue_a_text_are_refused() -> None:
    for family in ("bert", "t5"):
        with pytest.raises(UnsupportedModelError, match="does not predict the next token"):
            short(tiny(family, vocab_size=260))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family(family: str) -> None:
    model = text_model(family, dtype=torch.float32)
    writers = train.mlp_writers(model)
    run = short(model, parameters=writers, steps=2, lr=1e-4)
    assert set(run.patch.edits) == set(writers)
    assert run.history[1].forget < run.history[0].forget or run.history[1].retain < run.history[0].retain
    assert all(edit.norm() > 0 for edit in run.patch.edits.values())
    with patched(model, run.patch):
        assert torch.isfinite(plain_loss(model, FORGET))


@pytest.mark.real
@pytest.mark.slow
def test_a_few_steps_on_the_small_real_model() -> None:
    from repe_unlearn.models import load

    model, tokenizer, _ = load(progress=False)
    forget = train.from_pairs([("The capital of France is", "Paris"), ("The capital of Italy is", "Rome")])
    retain = train.from_pairs([("The capital of Japan is", "Tokyo"), ("The capital of Egypt is", "Cairo")])
    run = train.unlearn(
        model,
        tokenizer,
        forget,
        retain,
        method="npo",
        steps=5,
        lr=5e-5,
        accumulate=1,
        parameters=train.mlp_writers(model, range(14, 20)),
        progress=False,
    )
    assert run.history[-1].forget < run.history[0].forget - 0.05
    assert run.history[-1].retain < run.history[0].retain
