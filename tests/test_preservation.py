from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from auditkit import NEUTRAL
from textkit import text_model, text_tokenizer
from tiny import assert_same, hook_count, random_plan, snapshot
from torch import nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.preservation import Condition, costs
from repe_unlearn.errors import InputError
from repe_unlearn.hooks import apply
from repe_unlearn.plan import ErasurePlan


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


@pytest.fixture(scope="module")
def plan(llama: nn.Module) -> ErasurePlan:
    return random_plan(llama, Architecture.of(llama).sites("attn_in", "mlp_in"))


def test_no_edit_costs_exactly_nothing(llama: nn.Module, plan: ErasurePlan) -> None:
    conditions: dict[str, Condition] = {
        "same": contextlib.nullcontext,
        "edited": lambda: apply(llama, plan),
        "same again": contextlib.nullcontext,
    }
    found = costs(llama, text_tokenizer(), NEUTRAL, conditions)
    assert list(found) == list(conditions)
    for name in ("same", "same again"):
        assert (found[name].kl_mean, found[name].kl_p95, found[name].top1) == (0.0, 0.0, 1.0)
        assert found[name].perplexity == found[name].base_perplexity
    edited = found["edited"]
    assert edited.kl_mean > 0.01
    assert edited.top1 < 1
    assert edited.base_perplexity == found["same"].base_perplexity != edited.perplexity


def test_against_plain_torch(llama: nn.Module, plan: ErasurePlan) -> None:
    tokenizer = text_tokenizer()
    found = costs(llama, tokenizer, NEUTRAL, {"edited": lambda: apply(llama, plan)})["edited"]
    kl, same, base_loss, loss, targets = [], [], 0.0, 0.0, 0
    for text in NEUTRAL:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        p = llama(ids).logits[0]
        with apply(llama, plan):
            q = llama(ids).logits[0]
        kl.append(
            nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(
                -1
            )
        )
        same.append(p.argmax(-1) == q.argmax(-1))
        base_loss += float(nn.functional.cross_entropy(p[:-1], ids[0, 1:], reduction="sum"))
        loss += float(nn.functional.cross_entropy(q[:-1], ids[0, 1:], reduction="sum"))
        targets += ids.shape[1] - 1
    each = torch.cat(kl)
    assert found.tokens == len(each) == targets + len(NEUTRAL)
    assert found.kl_mean == pytest.approx(float(each.mean()), rel=1e-4)
    assert found.kl_p95 == pytest.approx(float(torch.quantile(each, 0.95)), rel=1e-4)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()))
    assert found.base_perplexity == pytest.approx(math.exp(base_loss / targets), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(loss / targets), rel=1e-4)


def test_a_bigger_edit_costs_more(llama: nn.Module, plan: ErasurePlan) -> None:
    strengths = (0.05, 0.2, 1.0)
    found = costs(
        llama,
        text_tokenizer(),
        NEUTRAL,
        {str(s): (lambda s=s: apply(llama, plan, strength=s)) for s in strengths},
    )
    small, middle, whole = (found[str(s)].kl_mean for s in strengths)
    assert 0 < small < middle < whole


def test_the_model_is_restored_also_after_an_error(llama: nn.Module, plan: ErasurePlan) -> None:
    before = snapshot(llama)
    costs(llama, text_tokenizer(), NEUTRAL, {"edited": lambda: apply(llama, plan)})
    assert_same(before, llama)
    assert hook_count(llama) == 0

    @contextlib.contextmanager
    def fails() -> Iterator[None]:
        with apply(llama, plan):
            yield
            raise RuntimeError("inside the condition")

    with pytest.raises(RuntimeError, match="inside"):
        costs(llama, text_tokenizer(), NEUTRAL, {"edited": fails})
    assert_same(before, llama)
    assert hook_count(llama) == 0


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_texts_that_predict_nothing_are_refused(llama: nn.Module, texts: list[str]) -> None:
    with pytest.raises(InputError, match="no neutral text of two tokens or more"):
        costs(llama, text_tokenizer(), texts, {"same": contextlib.nullcontext})


def test_short_texts_among_others_are_left_out(llama: nn.Module) -> None:
    found = costs(llama, text_tokenizer(), ["", "abc"], {"same": contextlib.nullcontext})["same"]
    assert found.tokens == 4  # <s> a b c
