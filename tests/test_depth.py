"""Depth: against plain hooks, and on models of known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from knowkit import PLANTED, TOK, TOLD, gold, margin, original, share_left
from textkit import text_model
from tiny import LAYERS, assert_same, hook_count, reading, snapshot
from torch import nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.behaviour import behaviour
from repe_unlearn.audit.depth import depth, ignorance
from repe_unlearn.errors import InputError, ModelMismatchError, NotEnoughDataError
from repe_unlearn.facts import Fact

# Families that pass the stream in different ways, and one that drops more than one thing behind it.
SOME = ("llama", "gpt2", "falcon", "bloom", "gemma2", "mixtral", "qwen3_next")


def handed(
    base: nn.Module, source: nn.Module, prompt: str, fact: Fact, layer: int, by: str | None = None
) -> float:
    """Margin of base when a block hands on, before each token of an answer, what that block of source does.

    With ``by`` the source is run on another prompt that goes on with the same tokens.
    """
    (site,) = Architecture.of(base).sites("resid_post", layers=[layer])
    before, scores = TOK(prompt)["input_ids"], []
    other = TOK(by if by is not None else prompt)["input_ids"]
    for answer in (fact.answer, *fact.distractors):
        tail = TOK(f" {answer}")["input_ids"][1:]
        with reading(source, [site]) as seen, torch.no_grad():
            source(input_ids=torch.tensor([[*other, *tail]]))

        def put(_m: object, _args: object, output: object, seen: dict = seen, tail: list = tail) -> object:
            x = (output[0] if isinstance(output, tuple) else output).clone()  # type: ignore[index, union-attr]
            for k in range(len(tail)):
                x[0, len(before) - 1 + k] = seen[site][0, len(other) - 1 + k]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = base.get_submodule(site.path).register_forward_hook(put)
        ids = [*before, *tail]
        with torch.no_grad():
            logp = base(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        handle.remove()
        scores.append(sum(float(logp[k - 1, ids[k]]) for k in range(len(before), len(ids))))
    return margin(scores[0], scores[1:])


def prompts(fact: Fact) -> list[str]:
    return [text.format(subject=fact.subject) for text in TOLD.templates["fact"]["unseen"]]


@pytest.mark.parametrize("family", SOME)
def test_every_block_costs_what_plain_hooks_say(family: str) -> None:
    base, source = text_model(family), text_model(family, seed=1)
    before = [snapshot(m) for m in (base, source)]
    found = ignorance(base, TOK, TOLD, gold=source, progress=False, batch_tokens=100)
    assert list(found.cost) == list(range(LAYERS))
    for layer in found.cost:
        kept = {
            i: np.mean([handed(base, source, p, f, layer) for p in prompts(f)]) for i, f in enumerate(TOLD)
        }
        assert found.kept[layer] == pytest.approx(kept, abs=1e-4)
        own = behaviour(base, TOK, TOLD, progress=False).values
        lost = np.mean([own[i] - kept[i] for i in (0, 1)])  # the two that are to be forgotten
        assert found.cost[layer] == pytest.approx(lost, abs=1e-4)
    assert found.kept[LAYERS - 1] != pytest.approx(
        dict(found.own), abs=1e-2
    )  # control: it does cost something
    assert found.floor == pytest.approx(
        behaviour(base, TOK, TOLD, progress=False).of(TOLD, "decoy").mean(), abs=1e-4
    )
    for model, state in zip((base, source), before, strict=True):
        assert_same(state, model)
        assert hook_count(model) == 0


def test_a_decoy_stands_in_where_there_is_no_gold_model() -> None:
    base = text_model("llama")
    found = ignorance(base, TOK, TOLD, progress=False)
    assert found.floor == pytest.approx(behaviour(base, TOK, TOLD, progress=False).values[3], abs=1e-4)
    assert found.source == "decoys"
    assert set(found.own) == {0, 1, 2}  # the only decoy has nobody to stand in for it
    for layer in found.cost:
        for i in found.own:
            by = dict(zip(prompts(TOLD.facts[i]), prompts(TOLD.facts[3]), strict=True))
            kept = [handed(base, base, p, TOLD.facts[i], layer, by[p]) for p in by]
            assert found.kept[layer][i] == pytest.approx(np.mean(kept), abs=1e-4)


def test_scores_are_margins_less_costs_in_shares_of_not_knowing() -> None:
    base, source, edited = (text_model("llama", seed=seed) for seed in (0, 1, 4))
    found = replace_cost(ignorance(base, TOK, TOLD, gold=source, progress=False))
    scores = depth(edited, TOK, TOLD, base=base, reference=found, progress=False)
    own = behaviour(base, TOK, TOLD, progress=False).values
    known = np.mean([own[0], own[1]])
    for i, fact in enumerate(TOLD):
        lost = sum(
            own[i] - np.mean([handed(base, edited, p, fact, k) for p in prompts(fact)]) for k in (1, 2)
        )
        assert scores.values[i] == pytest.approx(
            own[i] - lost / ((2.0 + 3.0) / (known - found.floor)), abs=1e-3
        )
    score = []
    for i, costs in ((i, (1.5, 2.0, 2.5)) for i in (0, 1)):
        here = [
            own[i] - np.mean([handed(base, edited, p, TOLD.facts[i], k) for p in prompts(TOLD.facts[i])])
            for k in range(LAYERS)
        ]
        score.append(np.clip(here, 0, costs).sum() / 6.0)
    assert 0 < np.mean(score) < 1
    assert float(scores.facts["UDS"]) == pytest.approx(np.mean(score), abs=1e-3)
    assert scores.facts["blocks that count"] == "1, 2"


def replace_cost(found):
    """A random model knows nothing, so not knowing costs it nothing: say what it costs."""
    kept = {k: {i: own - 1.5 - 0.5 * k for i, own in found.own.items()} for k in found.kept}
    return replace(found, cost={0: -1.0, 1: 2.0, 2: 3.0}, kept=kept, floor=-50.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(error: type[BaseException]) -> None:
    model = text_model("llama")
    before, calls = snapshot(model), []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise error

    handle = model.lm_head.register_forward_hook(stop)  # type: ignore[union-attr]
    with pytest.raises(error):
        ignorance(model, TOK, TOLD, gold=text_model("llama", seed=1), batch_tokens=60, progress=False)
    handle.remove()
    assert_same(before, model)
    assert hook_count(model) == 0


def test_bad_input_is_refused() -> None:
    base = text_model("llama")
    with pytest.raises(ModelMismatchError, match="same shape"):
        depth(text_model("gpt2"), TOK, TOLD, base=base)
    with pytest.raises(ModelMismatchError, match="whose parameters differ"):
        ignorance(base, TOK, TOLD, gold=text_model("llama", num_hidden_layers=2))
    with pytest.raises(NotEnoughDataError, match="no gold model, and no decoy"):
        ignorance(base, TOK, TOLD.only("forget", "retain"), progress=False)
    with pytest.raises(NotEnoughDataError, match="to be forgotten"):
        ignorance(base, TOK, TOLD.only("retain", "decoy"), gold=base, progress=False)
    with pytest.raises(NotEnoughDataError, match="does not know these facts"):
        depth(base, TOK, TOLD, base=base, gold=base, progress=False)
    with pytest.raises(InputError, match="layer 7"):
        ignorance(base, TOK, TOLD, gold=base, layers=[7])


# On models of known truth


@pytest.mark.parametrize("source", ["gold model", "decoys"])
def test_the_original_holds_it_all_and_one_that_never_knew_nothing(source: str) -> None:
    base, tokenizer = original()
    never = gold()
    reference = ignorance(
        base,
        tokenizer,
        PLANTED,
        gold=never if source == "gold model" else None,
        layers=[1, 3],
        progress=False,
    )
    assert reference.source == source
    assert reference.counted == (1, 3)
    settings = {"base": base, "reference": reference, "progress": False}
    whole = depth(base, tokenizer, PLANTED, **settings)  # type: ignore[arg-type]
    said = behaviour(base, tokenizer, PLANTED, progress=False)
    assert dict(whole.values) == pytest.approx(dict(said.values), abs=1e-3)
    assert float(whole.facts["UDS"]) == pytest.approx(0.0, abs=1e-3)
    gone = depth(never, tokenizer, PLANTED, **settings)  # type: ignore[arg-type]
    assert abs(share_left(gone, whole)) < 0.1
    assert float(gone.facts["UDS"]) > (0.99 if source == "gold model" else 0.8)
    assert gone.of(PLANTED, "retain").mean() > 3  # control: what gold knows is handed on
    assert (whole.attack, whole.tier, whole.unit) == ("depth", "T1", "nats")
    assert "forget" in {s.label for s in whole.curves}
    assert f"forget, {source}" in {s.label for s in whole.curves}
