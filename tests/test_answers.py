"""Answers: the numbers of one shared pass are those of one plain forward per answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from folders import byte_tokenizer
from textkit import text_model, text_tokenizer
from tiny import hook_count, snapshot
from torch import nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.answers import Answers, answers, continuation
from repe_unlearn.errors import InputError, NonFiniteError, UnsupportedModelError
from repe_unlearn.facts import Fact, Facts, Question

# Answers of one and of several tokens (bytes), some of which begin alike, and prompts that begin alike.
FACTS = Facts(
    (
        Fact("Rome", "is", "red", ("rust", "re", "blue")),
        Fact("Romania", "is", "a", ("ab", "b"), "retain"),
        Fact("Oz", "is", "none", (), "decoy"),
    ),
    {"is": {"seen": ["{subject} is", "In {subject} it is"], "unseen": ["{subject}"]}},
)
TOKENIZER = text_tokenizer()


def plain(model: nn.Module, prompt: str, text: str) -> tuple[float, bool]:
    """Log-probability of a continuation and whether greedy decoding says it: one forward, no padding, no sharing."""
    start = len(TOKENIZER(prompt)["input_ids"])  # bytes: prompt and text do not merge
    ids = TOKENIZER(prompt + text)["input_ids"]
    logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    at = range(start, len(ids))
    return sum(float(logp[i - 1, ids[i]]) for i in at), all(int(logp[i - 1].argmax()) == ids[i] for i in at)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return text_model()


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_numbers_are_those_of_a_plain_forward_per_option(model: nn.Module, batch_tokens: int) -> None:
    found = answers(model, TOKENIZER, FACTS, batch_tokens=batch_tokens, progress=False)
    assert len(found.questions) == 9
    for i, question in enumerate(found.questions):
        right, exact = plain(model, question.prompt, question.answer)
        wrong = [plain(model, question.prompt, option)[0] for option in question.options]
        assert found.logp[i] == pytest.approx(right, abs=1e-5)
        assert found.exact[i] == exact
        if wrong:
            mean = math.log(sum(map(math.exp, wrong)) / len(wrong))
            assert found.margin[i] == pytest.approx(right - mean, abs=1e-5)
            assert found.chosen[i] == (right > max(wrong))
        else:
            assert math.isnan(found.margin[i])
            assert not found.chosen[i]
    # Control: another model gives other numbers.
    other = answers(text_model(seed=1), TOKENIZER, FACTS, progress=False)
    assert np.abs(other.logp - found.logp).max() > 0.1


def test_what_greedy_decoding_says_is_exact(model: nn.Module) -> None:
    prompt = "Rome is"
    ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
    # Bytes from 32 to 126 only: text that comes back as it is.
    allowed = [TOKENIZER.convert_tokens_to_ids(c) for c in map(chr, range(33, 127))]
    banned = torch.full((260,), -1e4, dtype=torch.float64)
    banned[allowed] = 0.0
    speaker = text_model()
    speaker.lm_head.register_forward_hook(lambda _m, _a, out: out + banned.to(out.dtype))
    said = ids
    for _ in range(3):
        said = torch.cat([said, speaker(said).logits[:, -1:].argmax(-1)], 1)
    text = TOKENIZER.decode(said[0, ids.shape[1] :])
    assert len(text) == 3
    wrong = text[:2] + ("x" if text[2] != "x" else "y")
    asked = [Question(prompt, option, (), 0, "seen", "") for option in (text, wrong)]
    found = answers(speaker, TOKENIZER, FACTS, questions=asked, progress=False)
    assert found.exact.tolist() == [True, False]


def test_one_run_per_distinct_beginning() -> None:
    model = text_model()
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    asked = [Question("ab", option, (), 0, "seen", "") for option in (" x", " y", " z", " xy", " xyz")]
    answers(model, TOKENIZER, FACTS, questions=asked, progress=False)
    assert rows == [1]  # "<s>ab xy" asks all of them
    rows.clear()
    answers(
        model, TOKENIZER, FACTS, questions=[*asked, Question("ac", " x", (), 0, "seen", "")], progress=False
    )
    assert sum(rows) == 2


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before, hooks = snapshot(model), hook_count(model)
    answers(model, TOKENIZER, FACTS, progress=False)
    assert hook_count(model) == hooks
    after = snapshot(model)
    assert before["fingerprint"] == after["fingerprint"]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_training_mode_answers_without_dropout_and_stays_in_it() -> None:
    model = text_model("llama", attention_dropout=0.5)
    calm = answers(model, TOKENIZER, FACTS, progress=False)
    model.train()
    found = answers(model, TOKENIZER, FACTS, progress=False)
    assert np.allclose(found.logp, calm.logp)
    assert model.training
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the control: dropout does act


def hand_made(facts: Facts) -> Answers:
    questions = facts.questions("seen", "unseen")
    exact = np.array([q.template != "{subject}" and facts.facts[q.fact].subject == "Rome" for q in questions])
    numbers = np.arange(float(len(questions)))
    return Answers(facts, questions, numbers, numbers, exact, ~exact)


def test_accuracy_counts_every_fact_once() -> None:
    found = hand_made(FACTS)
    assert found.accuracy("forget") == pytest.approx(2 / 3)
    assert found.accuracy("forget", form="seen") == 1.0
    assert found.accuracy("forget", "retain") == pytest.approx(1 / 3)
    assert found.accuracy("retain", form="seen") == 0.0
    assert math.isnan(found.accuracy("neighbour"))
    assert found.per_fact(found.logp, "forget") == {0: pytest.approx((0 + 1 + 6) / 3)}
    assert found.mean(found.chosen, relation="is") == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert [f.subject for f in found.known()] == ["Rome", "Oz"]
    assert [f.subject for f in found.known(wordings=3)] == ["Oz"]
    assert "forget 0.67" in repr(found)


def test_tokens_of_the_continuation() -> None:
    ids, start = continuation(TOKENIZER, "ab", " c")
    assert (start, len(ids)) == (3, 5)  # <s> a b | space c


def test_a_special_token_at_the_end_is_no_part_of_the_answer(model: nn.Module) -> None:
    from tokenizers import processors

    ending = text_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert ending("a")["input_ids"][-1] == 257
    assert continuation(ending, "ab", " c") == continuation(TOKENIZER, "ab", " c")
    found = answers(model, ending, FACTS, progress=False)
    assert np.allclose(found.logp, answers(model, TOKENIZER, FACTS, progress=False).logp)


def test_a_token_over_the_seam_belongs_to_the_answer() -> None:
    from tokenizers import Tokenizer, models

    pieces = {"<unk>": 0, "a": 1, "b": 2, " ": 3, "b ": 4, "c": 5}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(pieces, [("b", " ")], unk_token="<unk>"))
    )
    assert continuation(merging, "ab", " c") == ([1, 4, 5], 1)


def test_what_is_refused(model: nn.Module) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="no character offsets"):
        answers(model, Slow(), FACTS, progress=False)
    with pytest.raises(InputError, match="no questions"):
        answers(model, TOKENIZER, FACTS, "multi_hop", progress=False)
    long = [Question("a" * 63, " b", (), 0, "seen", "")]
    with pytest.raises(InputError, match="at most 64"):
        answers(model, TOKENIZER, FACTS, questions=long, progress=False)
    fitting = [Question("a" * 61, " b", (), 0, "seen", "")]
    answers(model, TOKENIZER, FACTS, questions=fitting, progress=False)  # the control
    with pytest.raises(InputError, match="a token in each"):
        answers(model, TOKENIZER, FACTS, questions=[Question("a", "", (), 0, "seen", "")], progress=False)
    with pytest.raises(
        InputError, match="a token in each"
    ):  # without <s> nothing comes before the first byte
        continuation(byte_tokenizer(), "", "a")
    with pytest.raises(UnsupportedModelError, match="wrapped"):
        answers(nn.DataParallel(model), TOKENIZER, FACTS, progress=False)


def test_nan_weights_are_told() -> None:
    model = text_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        answers(model, TOKENIZER, FACTS, progress=False)
