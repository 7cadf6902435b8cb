"""Likelihoods and greedy continuations against plain torch, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch
from textkit import EOS, text_model, text_tokenizer
from tiny import assert_same, hook_count, random_plan, snapshot
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from repe_unlearn.architectures import Architecture
from repe_unlearn.audit.likelihoods import greedy, likelihoods
from repe_unlearn.encoding import completion_tokens
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, UnsupportedModelError
from repe_unlearn.hooks import apply

PAIRS = [
    ("the cat", " sat"),
    ("a", " dog ran far"),
    ("once upon", " a"),
    ("", "no prompt"),
    ("the cat", " flew"),
]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return text_model("llama")


def logits_of(model: nn.Module, text: str) -> tuple[Tensor, list[int]]:
    ids = text_tokenizer()(text)["input_ids"]
    assert len(ids) == 1 + len(text)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0], ids


def quiet(*arguments, **options):
    return likelihoods(*arguments, progress=False, **options)


def test_against_plain_torch(llama: nn.Module) -> None:
    for found, (prompt, completion) in zip(quiet(llama, text_tokenizer(), PAIRS), PAIRS, strict=True):
        logits, ids = logits_of(llama, prompt + completion)
        assert (found.text, len(found.log_probs)) == (completion, len(completion))
        for k, position in enumerate(range(len(prompt) + 1, len(ids))):
            law = torch.distributions.Categorical(logits=logits[position - 1])
            logs = law.probs.log()
            assert float(found.log_probs[k]) == pytest.approx(
                float(law.log_prob(torch.tensor(ids[position])))
            )
            assert float(found.expected[k]) == pytest.approx(-float(law.entropy()))
            second = float((law.probs * logs**2).sum()) - float(law.entropy()) ** 2
            assert float(found.variance[k]) == pytest.approx(second)
            assert bool(found.top[k]) is (int(logits[position - 1].argmax()) == ids[position])
        assert found.nll == pytest.approx(-float(found.log_probs.sum()) / len(completion))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_batch_changes_nothing(family: str) -> None:
    model, tokenizer = text_model(family), text_tokenizer()
    alone = [quiet(model, tokenizer, [pair])[0] for pair in PAIRS]
    for together in (quiet(model, tokenizer, PAIRS), quiet(model, tokenizer, PAIRS, batch_tokens=30)):
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.log_probs, b.log_probs)
            torch.testing.assert_close(a.variance, b.variance)


def test_hooks_count_and_the_model_is_left_alone(llama: nn.Module) -> None:
    before, tokenizer = snapshot(llama), text_tokenizer()
    plan = random_plan(llama, Architecture.of(llama).sites("mlp_in"))
    plain = quiet(llama, tokenizer, PAIRS)
    with apply(llama, plan):
        edited = quiet(llama, tokenizer, PAIRS)
    assert all(a.nll != b.nll for a, b in zip(plain, edited, strict=True))
    assert [a.nll for a in plain] == [a.nll for a in quiet(llama, tokenizer, PAIRS)]
    assert_same(before, llama)
    assert hook_count(llama) == 0


def merging() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a, b, c, d that joins b and c, with no special tokens."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4}, merges=[("b", "c")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_token_across_the_border_belongs_to_the_completion() -> None:
    assert completion_tokens(merging(), "ab", "cd") == ([0, 4, 3], [1, 2])
    assert completion_tokens(merging(), "abc", "d") == ([0, 4, 3], [2])
    # Taken apart, the same text would be other tokens.
    assert merging()("ab")["input_ids"] + merging()("cd")["input_ids"] == [0, 1, 2, 3]


def test_without_a_first_token_nothing_predicts_the_first() -> None:
    model = text_model("llama")
    assert len(quiet(model, merging(), [("", "add")])[0].log_probs) == 2
    with pytest.raises(NotEnoughDataError, match=r"pair 1 .* no completion token"):
        quiet(model, merging(), [("", "add"), ("", "a")])


def test_a_ruled_out_token_spoils_nothing() -> None:
    from repe_unlearn.audit.likelihoods import _per_token

    logits = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    chosen, expected, variance, top = _per_token(logits, torch.tensor([0]))
    assert float(chosen) == pytest.approx(math.log(0.5))
    assert float(expected) == pytest.approx(math.log(0.5))
    assert float(variance) == pytest.approx(0.0, abs=1e-12)
    assert bool(top)


def test_bad_input_of_likelihoods(llama: nn.Module) -> None:
    tokenizer = text_tokenizer()
    with pytest.raises(InputError, match="no pairs"):
        quiet(llama, tokenizer, [])
    with pytest.raises(NotEnoughDataError, match="pair 0"):
        quiet(llama, tokenizer, [("prompt", "")])
    with pytest.raises(InputError, match=r"has 101 tokens, the model takes 64"):
        quiet(llama, tokenizer, [("x" * 50, "y" * 50)])

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="offsets"):
        quiet(llama, Slow(), PAIRS)
    broken = text_model("llama")
    with torch.no_grad():
        broken.get_parameter("lm_head.weight").fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite logits for the text"):
        quiet(broken, tokenizer, PAIRS)


# ---------------------------------------------------------------- greedy

PROMPTS = ["the cat", "a", "once upon a time", "dog", "the dog"]


def by_hand(model: nn.Module, prompt: str, steps: int) -> str:
    """Return the greedy continuation without cache, padding or generate."""
    tokenizer = text_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == EOS:
            break
        ids.append(best)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_greedy_is_the_argmax_step_by_step(family: str) -> None:
    model = text_model(family)
    expected = [by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert greedy(model, text_tokenizer(), PROMPTS, max_new_tokens=6, progress=False) == expected
    assert len(set(expected)) > 1


def test_the_models_own_settings_do_not_count() -> None:
    from typing import Any

    model: Any = text_model("llama")
    expected = greedy(model, text_tokenizer(), PROMPTS, max_new_tokens=12, progress=False)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = True, 5.0, 3, 0.5
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.num_beams = 50.0, 1, 3
    ids = text_tokenizer()(PROMPTS[0], return_tensors="pt")["input_ids"]
    swayed = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, ids.shape[1] :]
    assert text_tokenizer().decode(swayed, skip_special_tokens=True) != expected[0]
    assert greedy(model, text_tokenizer(), PROMPTS, max_new_tokens=12, progress=False) == expected


def test_it_ends_where_the_model_ends() -> None:
    from typing import Any

    model: Any = text_model("llama")
    whole = greedy(model, text_tokenizer(), ["the cat"], max_new_tokens=6, progress=False)[0]
    logits, _ = logits_of(model, "the cat")
    model.generation_config.eos_token_id = [EOS, int(logits[-1].argmax())]
    assert greedy(model, text_tokenizer(), ["the cat"], max_new_tokens=6, progress=False) == [""]
    assert whole != ""


def test_bad_input_of_greedy(llama: nn.Module) -> None:
    tokenizer = text_tokenizer()
    with pytest.raises(InputError, match="no prompts"):
        greedy(llama, tokenizer, [])
    with pytest.raises(InputError, match="max_new_tokens=0"):
        greedy(llama, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(InputError, match=r"has 70 tokens with 62 new ones, the model takes 64"):
        greedy(llama, tokenizer, ["the cat"], max_new_tokens=62)
    with pytest.raises(InputError, match="prompt 0 has no token"):
        greedy(llama, merging(), [""])
    with pytest.raises(UnsupportedModelError, match="no generate"):
        greedy(nn.Linear(2, 2), tokenizer, PROMPTS)
