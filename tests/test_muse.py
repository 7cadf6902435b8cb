"""MUSE's metrics by hand, and where the reference code is wrong and ours is not."""

from __future__ import annotations

import contextlib

import pytest
import scipy.stats
import torch
from auditkit import NEUTRAL
from textkit import text_model, text_tokenizer
from torch import nn

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import muse
from repe_unlearn.audit.likelihoods import greedy
from repe_unlearn.audit.preservation import costs
from repe_unlearn.audit.rouge import rouge_l
from repe_unlearn.errors import InputError
from repe_unlearn.hooks import apply
from tests.tiny import random_plan


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama", max_position_embeddings=256)


def taught(text: str) -> nn.Module:
    """Return a tiny model that says one text by heart."""
    model = text_model("llama", max_position_embeddings=256)
    model.requires_grad_(True)
    ids = torch.tensor([text_tokenizer()(text)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


PASSAGE = ("it was the best of", " times it was the worst")


@pytest.fixture(scope="module")
def knows() -> nn.Module:
    return taught("".join(PASSAGE))


def test_verbatim_memory_of_a_taught_and_an_untaught_model(llama: nn.Module, knows: nn.Module) -> None:
    tokenizer, passage, model = text_tokenizer(), PASSAGE, knows
    options = {"max_new_tokens": len(passage[1]), "progress": False}
    assert muse.verbmem(model, tokenizer, [passage], **options).tolist() == [1.0]
    assert muse.verbmem(llama, tokenizer, [passage], **options).tolist() == [0.0]


def test_the_continuation_is_cut_to_what_is_generated(knows: nn.Module) -> None:
    tokenizer, passage, model = text_tokenizer(), PASSAGE, knows
    long = [(passage[0], passage[1] + " and much more that was never generated")]
    assert muse.verbmem(model, tokenizer, long, max_new_tokens=len(passage[1]), progress=False).tolist() == [
        1.0
    ]
    # " times it" against " times it": 9 of the tokens
    assert muse.verbmem(model, tokenizer, long, max_new_tokens=9, progress=False).tolist() == [1.0]


def test_knowledge_memory_shows_the_examples_and_stops_at_the_next_question() -> None:
    prompt = "Question: who?\nAnswer: me\n\nQuestion: two?\nAnswer:"
    model = taught(prompt + " four\n\nQuestion: six?")
    tokenizer, examples = text_tokenizer(), [("who?", "me")]
    options = {"max_new_tokens": 20, "progress": False}
    questions = [("two?", "four"), ("two?", ["five", "four"]), ("two?", "five")]
    found = muse.knowmem(model, tokenizer, questions, examples=examples, **options)
    assert found.tolist() == [1.0, 1.0, 0.0]
    whole = greedy(model, tokenizer, [prompt], **options)[0]
    assert rouge_l("four", whole).f1 < 1, "without the stop the next question would count"


def test_the_examples_are_shown_before_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def answers(_model: object, _tokenizer: object, prompts: list[str], **_: object) -> list[str]:
        seen.extend(prompts)
        return ["you"]

    monkeypatch.setattr(muse, "greedy", answers)
    found = muse.knowmem(nn.Identity(), None, [("who?", "you two")], examples=[("a?", "b"), ("c?", "d")])
    assert seen == ["Question: a?\nAnswer: b\n\nQuestion: c?\nAnswer: d\n\nQuestion: who?\nAnswer:"]
    assert found == pytest.approx([2 / 3])  # F1, not the recall of TOFU


def test_stops() -> None:
    assert muse.until_stop("Paris\nQuestion: x\n\n") == "Paris"
    assert muse.until_stop("Question: x") == ""
    assert muse.until_stop("no stop\nhere") == "no stop\nhere"


def test_privleak_by_hand() -> None:
    # the definition on AUCs of "looks unseen", 1 - ours: (0.002 - 0.5) / 0.5
    assert muse.privleak(0.998, 0.5) == pytest.approx(-99.6)
    assert muse.privleak(0.25, 0.5) == pytest.approx(50.0)
    assert muse.privleak(0.52, 0.52) == 0.0
    assert muse.privleak(1.0, 0.3) == -100.0
    # near a gold AUC of 1 it has no upper bound, which says nothing of the edit
    assert muse.privleak(0.0, 0.98) == pytest.approx(4900.0)


def test_privleak_needs_a_gold_model() -> None:
    with pytest.raises(InputError, match="trained without the forget set"):
        muse.privleak(0.5, None)
    with pytest.raises(InputError, match="divide by 0"):
        muse.privleak(0.5, 1.0)
    with pytest.raises(InputError, match=r"auc=1.2"):
        muse.privleak(1.2, 0.5)


def test_divergence_is_between_distributions_not_logits(llama: nn.Module) -> None:
    tokenizer = text_tokenizer()
    plan = random_plan(llama, Architecture.of(llama).sites("mlp_in"))
    cost = costs(llama, tokenizer, NEUTRAL[:1], {"edited": lambda: apply(llama, plan)})["edited"]
    ids = tokenizer(NEUTRAL[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a = llama(ids).logits[0]
        with apply(llama, plan):
            b = llama(ids).logits[0]
    expected = scipy.stats.entropy(a.softmax(-1).numpy(), b.softmax(-1).numpy(), axis=-1).mean()
    assert cost.kl_mean == pytest.approx(expected, rel=1e-5)
    assert costs(llama, tokenizer, NEUTRAL[:1], {"same": contextlib.nullcontext})["same"].kl_mean == 0.0
    # What the reference's baseline minimises: logits in place of log-probabilities. It is no divergence.
    raw = nn.functional.kl_div(b, a.softmax(-1), reduction="batchmean")
    shifted = nn.functional.kl_div(b + 1, a.softmax(-1), reduction="batchmean")
    assert float(raw) != pytest.approx(expected, rel=0.01)
    assert float(shifted) == pytest.approx(float(raw) - 1), (
        "adding a constant to all logits changes no distribution"
    )


def test_bad_input(llama: nn.Module) -> None:
    tokenizer = text_tokenizer()
    with pytest.raises(InputError, match="passage 1 has an empty continuation"):
        muse.verbmem(llama, tokenizer, [("a", "b"), ("a", "")])
    with pytest.raises(InputError, match="no prompts"):
        muse.verbmem(llama, tokenizer, [])
    with pytest.raises(InputError, match=r"question 0 .* is among the examples"):
        muse.knowmem(llama, tokenizer, [("who? ", "me")], examples=[("who?", "me")])
    with pytest.raises(InputError, match=r"question 0 .* has no answer"):
        muse.knowmem(llama, tokenizer, [("who?", [" "])], examples=[])
