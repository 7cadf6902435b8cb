"""Samples: which tokens count, what is refused, and how batches are drawn."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from textkit import BOS, text_tokenizer

from repe_unlearn import train
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.facts import Facts
from repe_unlearn.train.samples import Tokens, in_order, pad, shuffled, tokenise


def counted(sample: train.Sample, tokenizer: object = None) -> list[str]:
    tokenizer = tokenizer or text_tokenizer()
    (tokens,) = tokenise([sample], tokenizer, max_length=None)
    return [
        tokenizer.decode([i])  # type: ignore[attr-defined]
        for i, c in zip(tokens.ids, tokens.counts, strict=True)
        if c
    ]


def test_only_the_completion_counts() -> None:
    assert counted(train.Sample("ab", " cd")) == [" ", "c", "d"]


def test_all_of_a_free_text_counts_but_what_nothing_precedes() -> None:
    assert counted(train.Sample("", "abc")) == ["a", "b", "c"]  # <s> precedes the first
    (tokens,) = tokenise([train.Sample("", "abc")], text_tokenizer(), max_length=None)
    assert (tokens.ids[0], tokens.counts) == (BOS, [False, True, True, True])
    from folders import byte_tokenizer

    assert counted(train.Sample("", "abc"), byte_tokenizer()) == ["b", "c"]


def test_a_token_over_the_seam_belongs_to_the_completion() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"x": 0, "a": 1, "b": 2, "y": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert counted(train.Sample("xa", "by"), tokenizer) == ["ab", "y"]
    # Two texts tokenised apart would have given another sequence of tokens.
    assert tokenizer("xa").input_ids + tokenizer("by").input_ids == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("samples", "limit", "error", "said"),
    [
        ([], None, NotEnoughDataError, "no sample"),
        (["text"], None, InputError, "something else than a Sample"),
        ([train.Sample("", "abcdef")], 6, InputError, "7 tokens, the model takes 6"),
    ],
)
def test_unusable_samples_are_refused(samples: list, limit: int | None, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        tokenise(samples, text_tokenizer(), max_length=limit)


def test_a_text_of_just_the_right_length_is_taken() -> None:
    assert tokenise([train.Sample("", "abcdef")], text_tokenizer(), max_length=7)


def test_an_empty_completion_and_a_lone_token_are_refused() -> None:
    from folders import byte_tokenizer

    with pytest.raises(InputError, match="sample 0 has an empty completion"):
        tokenise([train.Sample("The capital of France is", " ")], text_tokenizer(), max_length=None)
    with pytest.raises(InputError, match="no token of sample 0 counts"):
        tokenise([train.Sample("", "a")], byte_tokenizer(), max_length=None)


def test_facts_give_samples() -> None:
    facts = Facts.of([("France", "Paris"), ("Japan", "Tokyo", "retain")], ["The capital of {subject} is"])
    (sample,) = facts.samples("seen", roles=["forget"])
    assert counted(sample) == list(" Paris")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(InputError, match="character offsets"):
        tokenise([train.Sample("", "abc")], object(), max_length=None)


def test_pairs_get_a_space_where_there_is_none() -> None:
    texts = [s.text for s in train.from_pairs([("a", "b"), ("a ", "b"), ("a", "\nb"), ("", "b")])]
    assert texts == ["a b", "a b", "a\nb", "b"]


def test_questions_and_answers_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tofu.jsonl"
    file.write_text(
        '{"question": "Who?", "answer": "Kim."}\n{"question": "Why?", "answer": "So."}\n', "utf-8"
    )
    assert train.from_jsonl(file)[0] == train.Sample("Question: Who?\nAnswer:", " Kim.")
    assert train.from_jsonl(file, prompt=None)[1] == train.Sample("", "So.")
    with pytest.raises(InputError, match="no column 'reply'; found: question, answer"):
        train.from_jsonl(file, completion="reply")


def made(lengths: list[int]) -> list[Tokens]:
    return [Tokens([i] * n, [False] + [True] * (n - 1)) for i, n in enumerate(lengths, 1)]


def test_padding_is_on_the_right_and_does_not_count() -> None:
    batch = pad(made([2, 4]), [1, 0], 9)
    assert batch.ids.tolist() == [[2, 2, 2, 2], [1, 1, 9, 9]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.counts.tolist() == [[False, True, True, True], [False, True, False, False]]
    assert batch.index.tolist() == [1, 0]


def test_in_order_gives_every_sample_once() -> None:
    tokens = made([5, 2, 7, 3, 3])
    seen = [b.index.tolist() for b in in_order(tokens, 2, 0)]
    assert sorted(chain(*seen)) == [0, 1, 2, 3, 4]
    assert seen[0] == [2, 0]  # longest first


def test_every_epoch_gives_every_sample_once_in_batches_of_like_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (64,), generator=generator).tolist()
    tokens = made(lengths)

    def draw(seed: int, n: int = 16) -> list[list[int]]:
        stream = shuffled(tokens, 4, 0, torch.Generator().manual_seed(seed))
        return [batch.index.tolist() for batch in islice(stream, n)]

    first = draw(1)
    assert sorted(chain(*first)) == list(range(64))
    assert first == draw(1)
    assert first != draw(2)

    def waste(batches: list[list[int]]) -> float:
        width = sum(4 * max(lengths[i] for i in b) for b in batches)
        return 1 - sum(lengths[i] for b in batches for i in b) / width

    plain = torch.randperm(64, generator=generator).view(16, 4).tolist()
    assert waste(first) < 0.5 * waste(plain)


@pytest.mark.parametrize(("n", "sizes"), [(2, [2, 2]), (9, [4, 5, 4, 5]), (8, [8, 8])])
def test_no_sample_comes_twice_in_a_batch(n: int, sizes: list[int]) -> None:
    stream = shuffled(made([3] * n), 8, 0, torch.Generator().manual_seed(0))
    drawn = [batch.index.tolist() for batch in islice(stream, len(sizes))]
    assert all(len(set(batch)) == len(batch) for batch in drawn)
    assert sorted(map(len, drawn)) == sorted(sizes)
