from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from textkit import BOS, EOS, PAD, pairs, text_tokenizer

from repe_unlearn import encoding
from repe_unlearn.contrast import Contrast, Example
from repe_unlearn.encoding import Encoded, batches, encode
from repe_unlearn.errors import InputError, NotEnoughDataError, ShapeError
from repe_unlearn.tokens import Select

# Byte tokens: position 0 is <s>, position 1 + i is character i.  "he ran" -> <s> h e _ r a n
TWO = Contrast(
    "pronoun",
    "classes",
    ("he", "she"),
    (
        Example("he ran", 0, focus=(0, 2), prompt_end=3),
        Example("if she ran", 1, focus=(3, 6), prompt_end=7),
    ),
)
WORDS = Contrast.from_tokens(
    [(["he", "ran", "up"], ["PRON", "VERB", None]), (["cats"], ["NOUN"])], classes=["NOUN", "PRON", "VERB"]
)


def positions(text: str, contrast: Contrast = TWO) -> list[list[int]]:
    return [e.positions for e in encode(contrast, text_tokenizer(), Select.parse(text))]


def test_ids_are_those_of_the_tokenizer() -> None:
    encoded = encode(TWO, text_tokenizer(), Select())
    assert [e.ids for e in encoded] == text_tokenizer()(list(TWO.texts)).input_ids
    assert encoded[0].ids[0] == BOS
    assert len(encoded[0].ids) == 7
    assert [e.owner for e in encoded] == [0, 1]
    assert [e.labels for e in encoded] == [[0], [1]]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("last", [[6], [10]]),
        ("mean", [[1, 2, 3, 4, 5, 6], list(range(1, 11))]),
        ("all", [[1, 2, 3, 4, 5, 6], list(range(1, 11))]),
        ("all,sinks=0", [[1, 2, 3, 4, 5, 6], list(range(1, 11))]),  # <s> is special
        ("all,sinks=0,specials", [[0, 1, 2, 3, 4, 5, 6], list(range(11))]),
        ("all,sinks=1,specials", [[1, 2, 3, 4, 5, 6], list(range(1, 11))]),  # <s> is the sink
        ("all,sinks=5", [[5, 6], list(range(5, 11))]),
        ("word", [[2], [6]]),
        ("after_prompt", [[4, 5, 6], [8, 9, 10]]),
    ],
)
def test_positions_by_hand(select: str, expected: list[list[int]]) -> None:
    assert positions(select) == expected


def test_last_is_the_last_that_is_no_special() -> None:
    ended = Contrast.from_labels(["he ran</s>", "he sat</s></s>"], ["a", "b"])
    assert encode(ended, text_tokenizer(), Select())[0].ids[-1] == EOS
    assert positions("last", ended) == [[6], [6]]
    assert positions("last,specials", ended) == [[7], [8]]


def test_a_character_of_several_tokens() -> None:
    accents = Contrast(
        "c", "classes", ("a", "b"), (Example("né x", 0, focus=(0, 2)), Example("ab x", 1, focus=(0, 2)))
    )
    assert positions("word", accents) == [[3], [2]]  # é is two bytes
    late = replace(accents, examples=tuple(replace(e, prompt_end=2) for e in accents.examples))
    assert positions("after_prompt", late) == [[4, 5], [3, 4]]


def test_words_and_their_labels() -> None:
    first, second = encode(WORDS, text_tokenizer(), Select("words"))
    assert (first.positions, first.labels) == ([2, 6], [1, 2])  # "up" has no label
    assert (second.positions, second.labels) == ([4], [0])
    first, second = encode(WORDS, text_tokenizer(), Select("all"))
    assert (first.positions, first.labels) == ([1, 2, 4, 5, 6], [1, 1, 2, 2, 2])  # the spaces are of no word
    assert (second.positions, second.labels) == ([1, 2, 3, 4], [0, 0, 0, 0])
    first, second = encode(WORDS, text_tokenizer(), Select("last"))
    assert (first.positions, first.labels) == ([], [])  # the last token is of "up": left out, not an error
    assert (second.positions, second.labels) == ([4], [0])


def test_real_labels() -> None:
    reals = Contrast.from_reals(["he ran", "she sat"], [0.25, -1.5])
    encoded = encode(reals, text_tokenizer(), Select("all"))
    assert encoded[1].labels == [-1.5] * 7
    batch = batches(encoded, batch_tokens=99, pad_id=PAD, side="right", pooled=False, real=True)[0]
    assert batch.z.dtype == torch.float64
    assert batch.z.tolist() == [-1.5] * 7 + [0.25] * 6


def test_empty_selections_name_the_prompt() -> None:
    for select in ("last,sinks=7", "word,sinks=3"):
        with pytest.raises(NotEnoughDataError, match=r"no token of prompt 0 \('he ran', 7 tokens\) is left"):
            positions(select)
    ends = replace(TWO, examples=(TWO.examples[0], replace(TWO.examples[1], prompt_end=10)))
    with pytest.raises(
        NotEnoughDataError, match=r"prompt 1 \('if she ran', 11 tokens\) is left for after_prompt"
    ):
        positions("after_prompt", ends)
    with pytest.raises(NotEnoughDataError, match="no labelled token is left in 2 prompts for words,sinks=7"):
        positions("words,sinks=7", WORDS)


def test_selections_that_the_contrast_cannot_answer() -> None:
    plain = Contrast.from_labels(["he ran", "she ran"], ["a", "b"])
    with pytest.raises(InputError, match=r"Select\('word'\) needs a focus word; .* 'he ran' has none"):
        positions("word", plain)
    with pytest.raises(InputError, match=r"Select\('words'\) needs token-level labels"):
        positions("words", plain)
    with pytest.raises(InputError, match="each token has a label; use 'words' or 'all'"):
        positions("mean", WORDS)


def test_slow_tokenizers_serve_where_no_offsets_are_needed() -> None:
    class Slow:
        is_fast, all_special_ids = False, (0,)

        def __call__(self, texts: list[str], add_special_tokens: bool, return_offsets_mapping: bool) -> dict:
            assert not return_offsets_mapping
            return {"input_ids": [[0, *map(ord, text)] for text in texts]}

    assert [e.positions for e in encode(TWO, Slow(), Select("last"))] == [[6], [10]]
    for contrast, select in ((TWO, "word"), (TWO, "after_prompt"), (WORDS, "all")):
        with pytest.raises(InputError, match=r"Slow gives no character offsets.*load the fast tokenizer"):
            encode(contrast, Slow(), Select.parse(select))


def test_long_prompts_are_refused() -> None:
    assert len(encode(TWO, text_tokenizer(), Select(), max_length=11)) == 2
    with pytest.raises(InputError, match=r"prompt 1 has 11 tokens, the model takes 10: 'if she ran'"):
        encode(TWO, text_tokenizer(), Select(), max_length=10)


# Batches


def made(side: str, select: str = "all,sinks=5", **options: object) -> list:
    chosen = Select.parse(select)
    encoded = encode(TWO, text_tokenizer(), chosen)
    defaults = {"batch_tokens": 99, "pad_id": PAD, "pooled": chosen.pooled, "real": False}
    return batches(encoded, side=side, **{**defaults, **options})  # type: ignore[arg-type]


def test_padding_by_hand() -> None:
    (right,), (left,) = made("right"), made("left")
    pad = [PAD] * 4
    short, long = (text_tokenizer()(text).input_ids for text in ("he ran", "if she ran"))
    assert right.ids.tolist() == [long, short + pad]
    assert left.ids.tolist() == [long, pad + short]
    assert right.mask.tolist() == [[1] * 11, [1] * 7 + [0] * 4]
    assert left.mask.tolist() == [[1] * 11, [0] * 4 + [1] * 7]
    assert left.position_ids.tolist() == [list(range(11)), [0] * 4 + list(range(7))]
    assert right.position_ids is None  # the family's own numbering
    assert right.row.tolist() == left.row.tolist() == [0] * 6 + [1] * 2
    assert right.column.tolist() == [5, 6, 7, 8, 9, 10, 5, 6]
    assert left.column.tolist() == [5, 6, 7, 8, 9, 10, 9, 10]
    assert right.z.tolist() == [1] * 6 + [0] * 2  # the longest prompt comes first
    assert right.owner.tolist() == [1] * 6 + [0] * 2
    assert right.z.dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_pick(side: str) -> None:
    (batch,) = made(side)
    x = torch.arange(2 * 11 * 3, dtype=torch.float32).reshape(2, 11, 3)
    rows = batch.pick(x)
    assert torch.equal(rows, torch.stack([x[r, c] for r, c in zip(batch.row, batch.column, strict=True)]))
    (pooled,) = made(side, "mean,sinks=5")
    assert pooled.z.tolist() == pooled.owner.tolist() == [1, 0]
    means = pooled.pick(x)
    torch.testing.assert_close(means, torch.stack([rows[:6].mean(0), rows[6:].mean(0)]))
    half = pooled.pick(x.to(torch.bfloat16))
    assert half.dtype == torch.float32  # a mean of many bfloat16 rows needs the digits
    assert pooled.pick(x.double()).dtype == torch.float64


@pytest.mark.parametrize("budget", [1, 7, 64, 300, 10**6])
def test_batches_keep_to_the_budget_and_lose_nothing(budget: int) -> None:
    encoded = encode(pairs(), text_tokenizer(), Select("mean"))
    work = batches(encoded, batch_tokens=budget, pad_id=PAD, side="right", pooled=True, real=False)
    assert all(b.ids.numel() <= budget or len(b.ids) == 1 for b in work)
    assert sorted(i for b in work for i in b.owner.tolist()) == list(range(len(encoded)))
    for b in work:
        assert [encoded[i].ids for i in b.owner] == [
            ids[mask.bool()].tolist() for ids, mask in zip(b.ids, b.mask, strict=True)
        ]
    widths = [b.ids.shape[1] for b in work]
    assert widths == sorted(widths, reverse=True)  # the largest first


def test_prompts_without_a_position_are_dropped() -> None:
    some = [Encoded([1, 2], [1], [0], 0), Encoded([1, 2, 3], [], [], 1)]
    (batch,) = batches(some, batch_tokens=9, pad_id=0, side="left", pooled=False, real=False)
    assert batch.ids.tolist() == [[1, 2]]
    with pytest.raises(InputError, match="got batch_tokens=0; needed at least 1"):
        batches(some, batch_tokens=0, pad_id=0, side="left", pooled=False, real=False)


def test_values_are_frozen() -> None:
    (batch,) = made("right")
    for value in (batch, Encoded([1], [0], [0], 0)):
        with pytest.raises(AttributeError):
            value.owner = SimpleNamespace()  # type: ignore[misc]


def test_a_named_word_and_its_span() -> None:
    contrast = Contrast.from_labels(["the sheep she saw", "a she saw"], [0, 1])
    (word, _), (span, _) = (
        encode(contrast, text_tokenizer(), Select(kind, text="she")) for kind in ("word", "span")
    )
    start = 1 + "the sheep she saw".rindex("she")  # after BOS; one token per character; "sheep" is no "she"
    assert span.positions == [start, start + 1, start + 2]
    assert word.positions == [start + 2]
    with pytest.raises(InputError, match="finds no word 'he'"):
        encode(contrast, text_tokenizer(), Select("word", text="he"))


def test_batches_are_made_when_asked_for() -> None:
    encoded = encode(pairs(), text_tokenizer(), Select("mean"))
    options = {"pad_id": PAD, "side": "right", "pooled": True, "real": False}
    work = batches(encoded, batch_tokens=300, **options)  # type: ignore[arg-type]
    first = weakref.ref(work[0].ids)
    assert first() is None  # nothing keeps a padded batch
    assert torch.equal(work[1].ids, work[1:][0].ids)
    assert [b.owner.tolist() for b in work[::2]] == [work[i].owner.tolist() for i in range(0, len(work), 2)]
    with pytest.raises(IndexError):
        work[len(work)]
    # sorted by length, so little is padding; in the order of the contrast it would be more
    real, padded = (sum(f(b) for b in work) for f in (lambda b: int(b.mask.sum()), lambda b: b.mask.numel()))
    assert work.padding == pytest.approx(1 - real / padded)
    assert 0 < work.padding < 0.1
    one = batches(encoded, batch_tokens=10**6, **options)  # type: ignore[arg-type]
    assert one.padding > 2 * work.padding
    # what the digest is made of
    assert work.digest() == batches(encoded, batch_tokens=300, **options).digest()  # type: ignore[arg-type]
    changed = [replace(encoded[0], labels=[1]), *encoded[1:]]
    others = (batches(changed, batch_tokens=300, **options), work[1:], one)  # type: ignore[arg-type]
    assert len({work.digest(), *(other.digest() for other in others)}) == 4


def test_few_texts_are_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer's output for many prompts is far larger than their ids."""
    expected = encode(pairs(), text_tokenizer(), Select("after_prompt"))
    monkeypatch.setattr(encoding, "_TOKENISED_AT_ONCE", 7)
    tokenizer, sizes = text_tokenizer(), []

    class Counting:
        is_fast, all_special_ids = True, tokenizer.all_special_ids

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: object) -> object:
            sizes.append(len(texts))
            return tokenizer(texts, **options)  # type: ignore[arg-type]

    found = encode(pairs(), Counting(), Select("after_prompt"))
    assert max(sizes) == 7
    assert sum(sizes) == len(expected)
    assert [(e.ids, e.positions, e.owner) for e in found] == [(e.ids, e.positions, e.owner) for e in expected]


def test_sites_without_one_vector_per_token() -> None:
    (batch,) = made("right")
    x = torch.randn(2, 11, 3)
    assert torch.equal(batch.pick(x.reshape(22, 3)), batch.pick(x))  # routers and experts see no batch
    for wrong in (torch.randn(2, 3), torch.randn(2, 10, 3), torch.randn(2, 2, 11, 3), torch.randn(22)):
        with pytest.raises(ShapeError, match="for 2 prompts of 11 tokens"):
            batch.pick(wrong)
