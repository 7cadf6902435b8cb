"""The parts of the part-of-speech benchmark that need no real model: reading, labels, bits, intervals, table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scriptkit import script
from textkit import text_model, text_tokenizer
from tiny import oblique, reading

from repe_unlearn import Architecture, Contrast, ErasurePlan, Moments, apply, fingerprint
from repe_unlearn.activations import prepare

pos = script("pos_scrubbing")


def _sentence(number: int, text: str, rows: list[tuple[str, str, str]], document: str = "") -> str:
    head = [f"# newdoc id = {document}"] if document else []
    lines = [*head, f"# sent_id = {number}", f"# text = {text}"]
    return "\n".join([*lines, *("\t".join([i, form, form, tag, *"______"]) for i, form, tag in rows)])


TREEBANK = "\n\n".join(
    [
        _sentence(
            1,
            "I don't sell $5 mugs.",
            [
                ("1", "I", "PRON"),
                ("2-3", "don't", "_"),
                ("2", "do", "AUX"),
                ("3", "n't", "PART"),
                ("4", "sell", "VERB"),
                ("5", "$", "SYM"),
                ("6", "5", "NUM"),
                ("6.1", "ghost", "NOUN"),
                ("7", "mugs", "NOUN"),
                ("8", ".", "PUNCT"),
            ],
            "a",
        ),
        _sentence(2, "Dogs bark.", [("1", "Dogs", "NOUN"), ("2", "bark", "VERB"), ("3", ".", "PUNCT")], "b"),
        _sentence(3, "Gonna run!", [("1", "going", "VERB"), ("2", "run", "VERB"), ("3", "!", "PUNCT")], ""),
    ]
)


def test_words_are_found_in_the_raw_text() -> None:
    first, second = pos.treebank(TREEBANK, words=100)
    assert (first.document, second.document) == ("a", "b")  # a passage never crosses documents
    assert second.text == "Dogs bark. Gonna run!"
    assert [(first.text[a:b], tag, n) for a, b, tag, n in first.words] == [
        ("I", "PRON", 1),
        ("do", "AUX", 2),
        ("n't", "PART", 3),
        ("sell", "VERB", 4),
        ("5", "NUM", 6),
        ("mugs", "NOUN", 7),
        (".", "PUNCT", 8),
    ]
    # the word that is written otherwise is left out, those behind it are not
    assert [(second.text[a:b], n) for a, b, _, n in second.words] == [
        ("Dogs", 1),
        ("bark", 2),
        (".", 3),
        ("run", 2),
        ("!", 3),
    ]
    assert [p.sentences for p in (first, second)] == [1, 2]


def test_passages_end_at_enough_words_and_at_sentences() -> None:
    assert [p.text for p in pos.treebank(TREEBANK, words=1)] == [
        "I don't sell $5 mugs.",
        "Dogs bark.",
        "Gonna run!",
    ]


def test_articles_begin_at_titles_and_not_at_headings() -> None:
    text = " \n = One = \n \n a b c \n = = Career = = \n d \n = Two = \n e = f \n"
    found = pos.articles(text, words=5)
    assert [(p.document, p.text.split()) for p in found] == [
        ("One", ["=", "One", "=", "a", "b"]),
        ("Two", ["=", "Two", "=", "e", "="]),
    ]


def test_samples_are_whole_documents_and_differ_between_seeds() -> None:
    passages = [pos.Passage(f"d{i // 2}", f"text {i}", sentences=3) for i in range(40)]
    drawn = [pos.sample(passages, 12, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(d) for d in drawn] == [4, 4, 4]
    assert {p.document for p in drawn[0]}.isdisjoint({p.document for p in passages if p not in drawn[0]})
    assert [p.text for p in pos.spread(passages, 4)] == ["text 0", "text 10", "text 20", "text 30"]


def test_bins_of_the_number_of_a_word() -> None:
    assert [pos.place_bin(n) for n in (1, 2, 4, 5, 6, 12, 13, 18, 19, 90)] == [0, 1, 3, 3, 4, 5, 6, 6, 7, 7]


def _joint(n: int = 900, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows that hold a tag and a place which depend on each other."""
    generator = torch.Generator().manual_seed(0)
    tag = torch.randint(classes, (n,), generator=generator)
    place = (torch.randint(len(pos.BINS), (n,), generator=generator) + tag) % len(pos.BINS)
    x = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    x[:, 0] += 2 * tag
    x[:, 1] += torch.tensor(pos.BINS).log()[place] + 0.5 * tag
    return x, tag, place


def test_moments_of_both_concepts_come_from_one_label() -> None:
    x, tag, place = _joint()
    m = Moments.of(x, tag * len(pos.BINS) + place, classes=3 * len(pos.BINS))
    tags, places = pos.mapped(m, pos.tag_columns(3)), pos.mapped(m, pos.place_columns(3))
    onehot = np.eye(3)[tag.numpy()]
    number = np.log(np.array(pos.BINS))[place.numpy()]
    both = np.cov(np.column_stack([x.numpy(), onehot, number]), rowvar=False, bias=True)
    np.testing.assert_allclose(tags.cov_xz, both[:12, 12:15], atol=1e-12)
    np.testing.assert_allclose(tags.cov_zz, both[12:15, 12:15], atol=1e-12)
    np.testing.assert_allclose(places.cov_xz, both[:12, 15:], atol=1e-12)
    assert not np.allclose(places.cov_xz, both[:12, 14:15], atol=1e-3)


@pytest.mark.parametrize("method", ["random", "mean_difference", "leace", "splince"])
def test_solvers_erase_tags_and_only_splince_keeps_the_place(method: str) -> None:
    x, tag, place = _joint()
    m = Moments.of(x, tag * len(pos.BINS) + place, classes=3 * len(pos.BINS))
    left: list[float] = []
    y = pos.solver(method, 3, 0, left)(m)(x).numpy()
    means = np.stack([y[tag.numpy() == c].mean(0) for c in range(3)])
    erased = np.abs(means - means[0]).max() < 1e-9
    assert erased == (method != "random")
    assert (left[0] < 1e-9) == erased
    number = np.log(np.array(pos.BINS))[place.numpy()]
    before, after = (((number - number.mean()) @ rows) / len(number) for rows in (x.numpy(), y))
    assert np.allclose(before, after, atol=1e-9) == (method == "splince")


def _runs(bits: list[list[float]], sizes: list[int]) -> list[dict[str, Any]]:
    return [{"treebank": {"bits": b, "bytes": sizes}} for b in bits]


def test_intervals_draw_documents_and_seeds() -> None:
    value, low, high = pos.interval(_runs([[10, 20], [30, 60]], [10, 20]), "treebank")
    assert value == pytest.approx(2.0)  # 30/30 and 90/30
    assert (low, high) == pytest.approx((1.0, 3.0))  # both seeds alike: documents do not matter here
    value, low, high = pos.interval(_runs([[10, 80]], [10, 20]), "treebank")
    assert (value, low, high) == pytest.approx((3.0, 1.0, 4.0))


def test_differences_are_paired() -> None:
    runs = _runs([[10, 80, 30], [15, 90, 30]], [10, 20, 30])
    dearer = _runs([[15, 90, 45], [20, 100, 45]], [10, 20, 30])  # half a bit a byte more everywhere
    assert pos.difference(dearer, runs, "treebank") == pytest.approx((0.5, 0.5, 0.5))
    _, low, high = pos.difference(_runs([[90, 20, 30]] * 2, [10, 20, 30]), runs, "treebank")
    assert low < 0 < high


def _texts() -> Contrast:
    texts = ["He was naïve.", "A longer text, with another end", "short one", "and the fourth of them"]
    return Contrast.from_labels(texts, [0, 1, 0, 1])


def test_bits_are_those_of_plain_torch_text_by_text() -> None:
    model, tokenizer = text_model().eval(), text_tokenizer()
    work = prepare(model, tokenizer, _texts(), "all", 64)
    site = Architecture.of(model).sites("resid_pre")[1]

    def reference() -> list[float]:
        found = []
        for text in _texts().texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append(-float(log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum()) / math.log(2))
        return found

    with torch.no_grad():
        expected = reference()
        with apply(model, ErasurePlan({site: oblique(d=model.config.hidden_size)}, fingerprint(model))):
            edited = reference()
    bits, rows = pos.measure(model, work, 4, [site], [])
    assert bits == pytest.approx(expected, rel=1e-6)
    assert bits != pytest.approx(edited, rel=1e-3)
    assert len(rows[site].z) == sum(len(tokenizer(t)["input_ids"]) - 1 for t in _texts().texts)


def test_bytes_and_token_frequencies_leave_the_first_token_out() -> None:
    tokenizer = text_tokenizer()
    assert pos.predicted_bytes(tokenizer, "naïve") == 6  # <s> is predicted by nothing, and has no bytes
    tokenizer = tokenizer_without_bos()
    assert pos.predicted_bytes(tokenizer, "naïve") == 5
    (bits,) = pos.unigram(tokenizer, "aab", ["cab"])
    size = len(tokenizer)
    assert bits == pytest.approx(-math.log2(3 / (3 + size)) - math.log2(2 / (3 + size)))


def tokenizer_without_bos() -> Any:
    from folders import byte_tokenizer

    return byte_tokenizer()


def test_one_pass_makes_class_means_equal_at_every_site() -> None:
    model, tokenizer = text_model().eval(), text_tokenizer()
    words = ("cat", "runs", "dog", "sits", "cow", "eats", "hen", "hops")
    passages = []
    for i in range(24):
        chosen = [words[(i * 3 + j * 5) % 8] for j in range(6)]
        text, spans, cursor = " ".join(chosen), [], 0
        for n, word in enumerate(chosen, 1):
            spans.append((cursor, cursor + len(word), "NOUN" if words.index(word) % 2 == 0 else "VERB", n))
            cursor += len(word) + 1
        passages.append(pos.Passage(f"d{i}", text, tuple(spans)))
    contrast = pos.labelled(passages, ("NOUN", "VERB"))
    (batch,) = prepare(model, tokenizer, contrast, "all", 10**9)
    sites = Architecture.of(model).sites("resid_pre")
    erasers = pos.quadratic_pass(model, batch, sites, 2, 50)
    assert list(erasers) == list(sites)
    z = batch.z // len(pos.BINS)
    last = sites[-1]

    def gap(x: torch.Tensor) -> float:
        rows = batch.pick(x)
        return float((rows[z == 0].mean(0) - rows[z == 1].mean(0)).norm())

    taps = {s: lambda x, e=e: pos.replaced(x, batch, e) for s, e in erasers.items()}
    with torch.no_grad(), reading(model, [last]) as before:
        model.model(**batch.arguments())
    with torch.no_grad(), pos.tap(model, taps), reading(model, [last]) as after:
        model.model(**batch.arguments())
    assert gap(before[last]) > 0.05
    assert gap(pos.replaced(before[last], batch, erasers[last])) > 1e-4  # fit on other activations
    assert gap(after[last]) < 1e-5


def test_table_and_figure_show_every_method_and_say_what_is_missing() -> None:
    runs: dict[str, list[dict[str, Any]]] = {}
    for rank, method in enumerate(pos.METHODS):
        one = {"treebank": {"bits": [10.0, 30.0], "bytes": [10, 10]}, "rank": rank, "majority": 0.2}
        one["probe"] = {"a": 0.25, "b": 0.75}
        if method != "quadratic":
            one["wikitext"] = {"bits": [5.0], "bytes": [4]}
        runs[method] = [one]
    lines = pos.table(runs).splitlines()
    assert len(lines) == 2 + len(pos.METHODS)
    assert "| leace | 1 | 3 | 2.00 [1.00, 3.00] | 1.25 [1.25, 1.25] | 0.500 | 0.25, 0.75 | 2.79 |" in lines
    assert "| – |" in lines[-1]
    svg = pos.draw(runs, {"treebank": 3.0, "wikitext": 2.0})
    assert all(method in svg for method in (*pos.METHODS, "bits per byte", "no gold tags"))
    assert next(pos.differences(runs)).startswith("random - none, treebank: +0.000")


def test_results_go_between_the_markers_of_a_page() -> None:
    page = "a\n<!-- results: begin -->\nold\n<!-- results: end -->\nb\n"
    once = pos.filled(page, "new")
    assert once == "a\n<!-- results: begin -->\n\nnew\n\n<!-- results: end -->\nb\n"
    assert pos.filled(once, "new") == once
    with pytest.raises(SystemExit, match="results: begin"):
        pos.filled("a page without them", "new")
