"""Logit lens: against each family's own last block, hand-written heads, and models of known truth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from knowkit import PLANTED, TOK, TOLD, gold, margin, original, share_left, wrongly_told
from textkit import text_model
from tiny import DECODERS, LAYERS, assert_same, hook_count, reading, snapshot
from torch import Tensor, nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.behaviour import behaviour
from repe_unlearn.audit.depth import ignorance
from repe_unlearn.audit.lens import Tail, affine_ridge, lens
from repe_unlearn.audit.sampling import leak_at_k
from repe_unlearn.audit.states import states
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts


def table(model: nn.Module, facts: Facts = TOLD, **more: object) -> dict[str, tuple[float, ...]]:
    return {s.label: s.y for s in lens(model, TOK, facts, progress=False, **more).curves}  # type: ignore[arg-type]


@pytest.mark.parametrize("family", DECODERS)
def test_after_the_last_block_it_is_what_the_model_says(family: str) -> None:
    model = text_model(family)
    before = snapshot(model)
    last = lens(model, TOK, TOLD, forms=["unseen"], layers=[-1], progress=False)
    said = behaviour(model, TOK, TOLD, progress=False)
    assert list(last.values.values()) == pytest.approx(list(said.values.values()), abs=1e-4)
    earlier = lens(model, TOK, TOLD, forms=["unseen"], layers=[0], progress=False)
    assert list(earlier.values.values()) != pytest.approx(list(said.values.values()), abs=1e-3)  # control
    assert_same(before, model)
    assert hook_count(model) == 0
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]


def _llama(model: nn.Module, h: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(h))  # type: ignore[operator, union-attr]


HEADS = {
    "llama": _llama,
    "gpt2": lambda model, h: model.lm_head(model.transformer.ln_f(h)),
    "granite": lambda model, h: _llama(model, h) / model.config.logits_scaling,
    "cohere": lambda model, h: _llama(model, h) * model.config.logit_scale,
    "gemma2": lambda model, h: (
        model.config.final_logit_softcapping
        * torch.tanh(_llama(model, h) / model.config.final_logit_softcapping)
    ),
}


@pytest.mark.parametrize("family", sorted(HEADS))
def test_every_block_is_read_by_norm_and_head_as_written_by_hand(family: str) -> None:
    model = text_model(family)
    found = table(model, forms=["seen"])
    sites = Architecture.of(model).sites("resid_post")
    for layer, site in enumerate(sites):
        by_hand = []
        for fact in TOLD.only("forget"):
            before, scores = TOK(f"{fact.subject} is in")["input_ids"], []
            for answer in (fact.answer, *fact.distractors):
                ids = [*before, *TOK(f" {answer}")["input_ids"][1:]]
                with reading(model, [site]) as seen, torch.no_grad():
                    model(input_ids=torch.tensor([ids]))
                    logp = HEADS[family](model, seen[site][0]).float().log_softmax(-1)
                scores.append(sum(float(logp[k - 1, ids[k]]) for k in range(len(before), len(ids))))
            by_hand.append(margin(scores[0], scores[1:]))
        assert found["forget"][layer] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)


def test_states_are_those_of_plain_hooks_in_the_order_asked_for() -> None:
    model = text_model("llama")
    sequences = [[256, 5, 6, 7, 8], [256, 9], [256, 10, 11]]
    found = states(model, sequences, [[1, 4], [1], [0, 2]], [0, 2], batch_tokens=9, progress=False)
    sites = Architecture.of(model).sites("resid_post", layers=[0, 2])
    rows = []
    for ids, at in zip(sequences, ([1, 4], [1], [0, 2]), strict=True):
        with reading(model, sites) as seen, torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        rows.append(torch.stack([seen[site][0, at] for site in sites]))
    torch.testing.assert_close(found, torch.cat(rows, 1))


def test_the_head_reads_many_rows_at_once_as_one_by_one() -> None:
    model = text_model("gemma2")
    tail, stream = Tail(model), torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(tail(stream), torch.cat([tail(row[None]) for row in stream]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(error: type[BaseException]) -> None:
    model = text_model("llama")
    before, calls = snapshot(model), []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error

    handle = model.lm_head.register_forward_hook(stop)  # type: ignore[union-attr]
    with pytest.raises(error):
        lens(model, TOK, TOLD, batch_tokens=8, progress=False)
    handle.remove()
    assert_same(before, model)
    assert hook_count(model) == 0
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="layer 9"):
        lens(text_model(), TOK, TOLD, layers=[9])
    with pytest.raises(NotEnoughDataError, match="multi_hop"):
        lens(text_model(), TOK, TOLD, forms=["multi_hop"])
    assert len(table(text_model())["forget"]) == LAYERS


# On models of known truth


def test_the_original_shows_it_and_one_that_never_knew_does_not() -> None:
    model, tokenizer = original()
    whole = lens(model, tokenizer, PLANTED, progress=False)
    never = lens(gold(), tokenizer, PLANTED, progress=False)
    assert (whole.attack, whole.tier, whole.unit) == ("lens", "T1", "nats")
    assert abs(share_left(never, whole)) < 0.1
    assert whole.of(PLANTED, "forget").mean() > 3 > 0 > whole.of(PLANTED, "decoy").mean()
    lies = lens(model, tokenizer, wrongly_told(), progress=False)
    assert share_left(lies, whole) < 0.1  # control


def test_what_the_last_block_hides_is_seen_before_it() -> None:
    model, tokenizer = original()
    whole = lens(model, tokenizer, PLANTED, progress=False)
    hidden = copy.deepcopy(model)
    said = behaviour(model, tokenizer, PLANTED, progress=False)
    with torch.no_grad():  # the last block drowns what it gets
        hidden.model.layers[-1].mlp.down_proj.weight.mul_(-40)  # type: ignore[union-attr]
    left = behaviour(hidden, tokenizer, PLANTED, progress=False)
    assert share_left(left, said) < 0.3
    assert share_left(lens(hidden, tokenizer, PLANTED, progress=False), whole) > 0.5


def test_the_map_of_a_tuned_lens_solves_the_stacked_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).double() * 3 + 1, torch.randn(40, 4, generator=g).double()
    size = float((x - x.mean(0)).square().sum(0).mean())
    rows = torch.cat([x - x.mean(0), (0.3 * size) ** 0.5 * torch.eye(6).double()])
    weight = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(6, 4).double()])).solution
    new = torch.randn(5, 6, generator=g).double()
    expected = (new - x.mean(0)) @ weight + y.mean(0)
    torch.testing.assert_close(affine_ridge(x, y, 0.3)(new), expected)
    assert (affine_ridge(x, y, 0.1)(new) - expected).abs().max() > 1e-3  # control


def test_a_tuned_lens_reads_earlier_blocks_better_and_invents_nothing() -> None:
    model, tokenizer = original()
    settings = {"layers": [0, 1, 3], "forms": ["unseen"], "progress": False}
    plain, tuned = (lens(model, tokenizer, PLANTED, tuned=t, **settings) for t in (False, True))  # type: ignore[arg-type]
    assert (tuned.attack, tuned.curves[0].figure) == ("lens.tuned", "Tuned lens")
    gaps = []
    for scores in (plain, tuned):
        by_role = {series.label: series.y for series in scores.curves}
        gaps.append([a - b for a, b in zip(by_role["forget"], by_role["decoy"], strict=True)])
    assert gaps[1][0] > gaps[0][0]
    assert gaps[1][2] == pytest.approx(gaps[0][2], rel=0.02)  # the last block's own map is the identity
    never = lens(gold(), tokenizer, PLANTED, tuned=True, **settings)  # type: ignore[arg-type]
    assert abs(share_left(never, tuned)) < 0.1
    with pytest.raises(NotEnoughDataError, match="retained facts"):
        lens(text_model(), TOK, TOLD, tuned=True, progress=False)


@pytest.mark.parametrize("attack", [lens, leak_at_k, ignorance])
def test_only_facts_of_some_roles_are_asked_for(attack: Callable) -> None:
    model = text_model()
    more = {"gold": text_model(seed=1)} if attack is ignorance else {}
    found = attack(model, TOK, TOLD, roles=["forget", "decoy"], progress=False, **more)
    everything = attack(model, TOK, TOLD, progress=False, **more)
    some, every = (x.own if attack is ignorance else x.values for x in (found, everything))
    assert (set(some), set(every)) == ({0, 1, 3}, {0, 1, 2, 3})
    if attack is not leak_at_k:
        assert some == pytest.approx({i: every[i] for i in some}, abs=1e-4)
