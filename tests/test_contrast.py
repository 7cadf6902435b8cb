import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repe_unlearn.contrast import Contrast, Example
from repe_unlearn.errors import FileFormatError, InputError, NotEnoughDataError
from repe_unlearn.splitting import Row, partition

KEYS = ("groups", "templates", "pairs", "texts")


def two_class(*examples, classes=("a", "b"), **kw):
    return Contrast("test", "classes", classes, examples, **kw)


def crossed(groups=6, templates=6):
    """Every group with every template, one pair each."""
    return two_class(
        *(
            Example(f"{g} {t} {y}", y, group=f"g{g}", template=f"t{t}", pair=f"{g}-{t}")
            for g in range(groups)
            for t in range(templates)
            for y in (0, 1)
        )
    )


def leaks(fit, heldout):
    return [key for key in KEYS if (set(getattr(fit, key)) & set(getattr(heldout, key))) - {""}]


# ---- validation


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: two_class(), NotEnoughDataError, "'test' holds no prompts"),
        (lambda: two_class(Example("x", 0), Example(" \n", 1)), InputError, "example 1: the text is empty"),
        (lambda: two_class(Example("x", 0), Example("", 1)), InputError, "example 1: the text is empty"),
        (lambda: two_class(Example("x", 0), Example(b"y", 1)), InputError, "example 1: the text is bytes"),
        (
            lambda: two_class(Example("x", 0), Example("y", 2)),
            InputError,
            "example 1: label 2 is no class id; 0..1",
        ),
        (lambda: two_class(Example("x", 0), Example("y", -1)), InputError, "example 1: label -1"),
        (lambda: two_class(Example("x", 0), Example("y", True)), InputError, "example 1: label True"),
        (lambda: two_class(Example("x", 0), Example("y", 0.5)), InputError, "example 1: label 0.5"),
        (lambda: two_class(Example("x", 0), Example("y", 0)), NotEnoughDataError, "all 2 prompts are 'a'"),
        (
            lambda: two_class(Example("x", 0), classes=("a", "b")),
            NotEnoughDataError,
            "1 prompts for 2 classes",
        ),
        (
            lambda: two_class(Example("x", 0), Example("y", 1), classes=("a", "a")),
            InputError,
            "names must differ",
        ),
        (
            lambda: two_class(Example("x", 0), Example("y", 1), classes=("a", "")),
            InputError,
            "non-empty string",
        ),
        (
            lambda: two_class(Example("x", 0), Example("y", 1, focus=(0, 2))),
            InputError,
            r"focus span \(0, 2\)",
        ),
        (
            lambda: two_class(Example("x", 0), Example("yy", 1, focus=(1, 1))),
            InputError,
            r"focus span \(1, 1\)",
        ),
        (
            lambda: two_class(Example("x", 0), Example("yy", 1, focus=(-1, 1))),
            InputError,
            r"focus span \(-1, 1\)",
        ),
        (lambda: two_class(Example("x", 0), Example("y", 1, prompt_end=2)), InputError, "prompt_end=2"),
        (
            lambda: two_class(Example("x", 0), Example("y", (1,), words=((0, 1),))),
            InputError,
            "kind='tokens'",
        ),
        (lambda: two_class(Example("x", 0), Example("y", 1, group=3)), InputError, "must be strings"),
        (lambda: two_class("x", "y"), InputError, "example 0 is str, an Example is needed"),
        (lambda: Contrast("n", "odd", ("a", "b"), (Example("x", 0),)), InputError, "kind='odd'"),
        (lambda: Contrast("n", "reals", ("a",), (Example("x", 0.0),)), InputError, "reals has no classes"),
        (lambda: Contrast.from_reals(["x", "y"], [0.0, math.nan]), InputError, "example 1: the label is nan"),
        (lambda: Contrast.from_reals(["x", "y"], [0.0, math.inf]), InputError, "finite number"),
        (lambda: Contrast.from_reals(["x", "y"], [0.0, "1"]), InputError, "a real number is needed"),
        (lambda: Contrast.from_reals(["x", "y"], [1, 1.0]), NotEnoughDataError, "all 2 prompts are 1.0"),
        (lambda: Contrast.from_reals(["x", "y"], [1.0]), InputError, "2 texts but 1 labels"),
        (
            lambda: Contrast.from_labels(["x", "y"], ["p", "q"], groups=["g"]),
            InputError,
            "2 texts but 1 groups",
        ),
        (lambda: Contrast.from_labels(["x", "y"], ["p", 1]), InputError, "label 0 is 'p'"),
        (lambda: Contrast.from_labels(["x", "y"], [0.5, 1.0]), InputError, "use from_reals"),
        (
            lambda: Contrast.from_labels(["x", "y"], ["p", "z"], classes=["p", "q"]),
            InputError,
            "label 1 is 'z'",
        ),
        (lambda: Contrast.from_labels(["x", "y"], ["p", "q"], classes="pq"), InputError, "a list of names"),
        (lambda: Contrast.from_pairs([("x", "y", "z")]), InputError, "pair 0 is"),
        (lambda: Contrast.from_pairs(["xy"]), InputError, "pair 0 is 'xy'"),
        (lambda: Contrast.from_pairs([("x", "y")], groups=[]), InputError, "1 pairs but 0 groups"),
        (lambda: Contrast.from_pairs([]), NotEnoughDataError, "no prompts"),
        (lambda: Contrast.from_classes({"a": "xy", "b": ["z"]}), InputError, "class 'a' has one string"),
        (
            lambda: Contrast.from_classes({"a": ["x"], "b": ["y"]}, groups={"a": ["g"]}),
            InputError,
            "groups has the",
        ),
        (lambda: Contrast.from_classes({"a": ["x"], "b": []}), NotEnoughDataError, "1 prompts for 2 classes"),
        (
            lambda: Contrast.from_tokens([(["x"], ["A", "B"])]),
            InputError,
            "sentence 0 has 1 words and 2 tags",
        ),
        (lambda: Contrast.from_tokens([(["x", " "], ["A", "B"])]), InputError, "empty word"),
        (
            lambda: Contrast.from_tokens([(["x", "y"], [None, None])]),
            NotEnoughDataError,
            "no word of the 1 prompts",
        ),
        (
            lambda: Contrast.from_tokens([(["x", "y"], ["A", "A"])]),
            NotEnoughDataError,
            "all labelled words of 1",
        ),
    ],
)
def test_bad_data_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_token_contrast_needs_one_label_per_word():
    words = ((0, 1), (2, 3))
    assert len(Contrast("n", "tokens", ("A", "B"), (Example("x y", (0, 1), words=words),))) == 1
    with pytest.raises(InputError, match="example 0: 1 labels for 2 words"):
        Contrast("n", "tokens", ("A", "B"), (Example("x y", (0,), words=words),))
    with pytest.raises(InputError, match="word span"):
        Contrast("n", "tokens", ("A", "B"), (Example("x y", (0, 1), words=((0, 1), (2, 9))),))


def test_a_contrast_cannot_be_changed():
    contrast = crossed()
    with pytest.raises(dataclasses.FrozenInstanceError):
        contrast.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        contrast.examples[0].text = "other"


# ---- making


def test_from_pairs():
    contrast = Contrast.from_pairs([("she a", "he a"), ("she b", "he b")], ("f", "m"), templates=["t", "u"])
    assert contrast.texts == ("she a", "he a", "she b", "he b")
    assert contrast.labels == (0, 1, 0, 1)
    assert contrast.pairs == contrast.groups == ("pair-0", "pair-0", "pair-1", "pair-1")
    assert contrast.templates == ("t", "t", "u", "u")
    assert Contrast.from_pairs([("x", "y"), ("p", "q")], groups=["g", "h"]).groups == ("g", "g", "h", "h")


def test_from_classes():
    groups = {"cat": ["g", "h"], "dog": ["i"]}
    contrast = Contrast.from_classes({"cat": ["x", "y"], "dog": ["z"]}, name="pets", groups=groups)
    assert (contrast.name, contrast.classes, contrast.labels) == ("pets", ("cat", "dog"), (0, 0, 1))
    assert contrast.groups == ("g", "h", "i")
    assert contrast.pairs == contrast.texts


def test_from_labels_takes_names_and_ids():
    assert Contrast.from_labels("xyz", ["q", "p", "q"]).labels == (1, 0, 1)
    assert Contrast.from_labels("xyz", ["q", "p", "q"], classes=["q", "p"]).labels == (0, 1, 0)
    by_id = Contrast.from_labels("xyz", np.array([7, 3, 7]))
    assert (by_id.labels, by_id.classes) == ((1, 0, 1), ("3", "7"))
    named = Contrast.from_labels("xyz", [1, 0, 1], classes=["no", "yes"])
    assert (named.labels, named.classes) == ((1, 0, 1), ("no", "yes"))
    assert all(type(label) is int for label in by_id.labels)


def test_from_reals():
    contrast = Contrast.from_reals(["x", "y"], np.array([1, 2], dtype=np.float32))
    assert (contrast.labels, contrast.classes, contrast.kind) == ((1.0, 2.0), (), "reals")
    assert dict(contrast.describe().counts)["mean"] == 1.5


def test_from_tokens_keeps_spans():
    contrast = Contrast.from_tokens(
        [(["Old", "cats", "sleep"], [None, "N", "V"]), (["Go", "home"], ["V", "N"])]
    )
    assert contrast.texts == ("Old cats sleep", "Go home")
    assert contrast.labels == ((-1, 0, 1), (1, 0))
    first = contrast.examples[0]
    assert [first.text[a:b] for a, b in first.words] == ["Old", "cats", "sleep"]
    assert dict(contrast.describe().counts) == {"N": 2, "V": 2}


# ---- files


def test_from_jsonl(tmp_path):
    path = tmp_path / "mood.jsonl"
    rows = [{"text": "good", "label": "pos", "topic": 1}, {"text": "bad", "label": "neg", "topic": 2}]
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    contrast = Contrast.from_jsonl(path, group="topic")
    assert (contrast.name, contrast.classes, contrast.labels) == ("mood", ("neg", "pos"), (1, 0))
    assert contrast.groups == ("1", "2")


def test_pairs_reals_and_tokens_from_files(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"plus": "is kind", "minus": "is cruel", "t": "is _"}\n')
    pairs = Contrast.from_jsonl(path, positive="plus", negative="minus", template="t")
    assert pairs.texts == ("is cruel", "is kind")
    assert pairs.classes == ("negative", "positive")
    assert pairs.templates == ("is _", "is _")
    with pytest.raises(InputError, match="both positive= and negative="):
        Contrast.from_jsonl(path, positive="plus")
    with pytest.raises(InputError, match="pairs have two classes"):
        Contrast.from_jsonl(path, positive="plus", negative="minus", classes=["a", "b", "c"])

    path.write_text('{"text": ["cats", "sleep"], "label": ["N", null]}\n{"text": ["go"], "label": ["V"]}\n')
    assert Contrast.from_jsonl(path, kind="tokens").labels == ((0, -1), (1,))
    path.write_text('{"text": 5, "label": ["N"]}')
    with pytest.raises(InputError, match="must be lists"):
        Contrast.from_jsonl(path, kind="tokens")

    path = tmp_path / "x.csv"
    path.write_text("text,label\ncold,-3\nhot,31.5\n")
    assert Contrast.from_csv(path, kind="reals").labels == (-3.0, 31.5)
    path.write_text("text,label\ncats sleep,N V\nold dogs,- N\n")
    assert Contrast.from_csv(path, kind="tokens").labels == ((0, 1), (-1, 0))
    path.write_text("text,label\ncold,-3\nhot,warm\n")
    with pytest.raises(InputError, match="row 3: column 'label' holds 'warm', a number is needed"):
        Contrast.from_csv(path, kind="reals")
    with pytest.raises(InputError, match="kind='odd'"):
        Contrast.from_csv(path, kind="odd")


def test_from_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('said;label\n"one;\ntwo";1\nthree;0\n')
    contrast = Contrast.from_csv(path, text="said", delimiter=";", classes=["no", "yes"])
    assert contrast.texts == ("one;\ntwo", "three")
    assert contrast.labels == (1, 0)
    assert Contrast.from_csv(path, text="said", delimiter=";").classes == ("0", "1")
    assert Contrast.from_csv(path, text="said", delimiter=";", classes=["1", "0"]).labels == (0, 1)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"", NotEnoughDataError, "is empty"),
        (b"\n\n", NotEnoughDataError, "is empty"),
        (b'{"text": "x", "label": 1}\n{"text": ', FileFormatError, r"line 2: bad JSON"),
        (b"[1]\n", FileFormatError, "line 1: a JSON object .* this is list"),
        (b'{"text": "x", "tag": 1}\n', InputError, "no column 'label'; found: text, tag"),
        (b'{"text": "x", "label": 1}\n{"text": "y"}\n', InputError, "row 2: column 'label' is missing"),
        (b'{"text": 3, "label": 1}\n', InputError, "row 1: column 'text' holds 3"),
        (b'{"text": "\xff"}\n', FileFormatError, "not UTF-8"),
    ],
)
def test_bad_jsonl(tmp_path, body, error, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(body)
    with pytest.raises(error, match=message):
        Contrast.from_jsonl(path)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"", NotEnoughDataError, "is empty"),
        (b"text,label\n", NotEnoughDataError, "is empty"),
        (b"text,label\nx,1\ny\n", FileFormatError, "line 3: 1 cells, but the header has 2"),
        (b"text,label\nx,y,1\n", FileFormatError, "line 2: 3 cells"),
        (b"text,text\nx,1\n", FileFormatError, "occurs twice"),
        (b"text,tag\nx,1\n", InputError, "no column 'label'; found: text, tag"),
        (b'text,label\n"x,1\n', FileFormatError, "bad CSV"),
        (b"text,label\n\xff,1\n", FileFormatError, "not UTF-8"),
    ],
)
def test_bad_csv(tmp_path, body, error, message):
    path = tmp_path / "x.csv"
    path.write_bytes(body)
    with pytest.raises(error, match=message):
        Contrast.from_csv(path)


def test_missing_files(tmp_path):
    for read in (Contrast.from_jsonl, Contrast.from_csv):
        with pytest.raises(InputError, match="there is no file"):
            read(tmp_path / "none")
    with pytest.raises(InputError, match="one character"):
        Contrast.from_csv(tmp_path / "none", delimiter="")


def test_from_dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "n": datasets.Value("int64"),
        }
    )
    split = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0], "n": [4, 5]}, features=features)
    contrast = Contrast.from_dataset(split, group="n")
    assert (contrast.classes, contrast.labels, contrast.groups) == (("neg", "pos"), (1, 0), ("4", "5"))
    assert Contrast.from_dataset(split, label="n", kind="reals").labels == (4.0, 5.0)
    assert Contrast.from_dataset(split.to_iterable_dataset()).labels == (1, 0)
    with pytest.raises(InputError, match=r"dictionary of splits \('train'\).*dataset\['train'\]"):
        Contrast.from_dataset(datasets.DatasetDict({"train": split}))
    with pytest.raises(InputError, match="no column 'tag'; found: text, label, n"):
        Contrast.from_dataset(split, label="tag")
    tags = datasets.Dataset.from_dict(
        {"text": [["go", "home"]], "label": [[1, 0]]},
        features=datasets.Features(
            {
                "text": datasets.List(datasets.Value("string")),
                "label": datasets.List(datasets.ClassLabel(names=["N", "V"])),
            }
        ),
    )
    tagged = Contrast.from_dataset(tags, kind="tokens")
    assert (tagged.classes, tagged.labels) == (("N", "V"), ((1, 0),))
    with pytest.raises(NotEnoughDataError, match="no rows"):
        Contrast.from_dataset(split.select([]))


# ---- split


def test_split_shares_nothing_and_counts_what_it_dropped():
    contrast = crossed()
    fit, heldout = contrast.split(test=0.25, seed=1)
    assert leaks(fit, heldout) == []
    assert fit.dropped == heldout.dropped == len(contrast) - len(fit) - len(heldout) > 0
    assert heldout.describe().dropped == heldout.dropped
    assert {example.text for example in (*fit, *heldout)} < set(contrast.texts)
    # Control: cutting the list in two leaks.
    assert leaks(two_class(*contrast.examples[:36]), two_class(*contrast.examples[36:])) == ["templates"]


def test_split_is_the_same_for_the_same_seed():
    contrast = crossed()
    assert contrast.split(seed=3)[1].texts == contrast.split(seed=3)[1].texts
    assert len({contrast.split(seed=seed)[1].texts for seed in range(8)}) > 4


@pytest.mark.parametrize("template", ["", "one"])
def test_one_template_divides_groups_only(template):
    contrast = two_class(
        *(Example(f"{g} {y}", y, group=str(g), template=template) for g in range(20) for y in (0, 1))
    )
    fit, heldout = contrast.split(test=0.25)
    assert (len(fit), len(heldout), fit.dropped) == (30, 10, 0)
    assert not set(fit.groups) & set(heldout.groups)


def test_templates_that_follow_the_groups_drop_nothing():
    contrast = two_class(
        *(Example(f"{g} {y}", y, group=f"g{g}", template=f"t{g}") for g in range(20) for y in (0, 1))
    )
    fit, heldout = contrast.split(test=0.25)
    assert (len(fit), len(heldout), fit.dropped) == (30, 10, 0)


def test_without_groups_pairs_and_equal_texts_stay_together():
    pairs = Contrast.from_pairs([(f"she {i}", f"he {i}") for i in range(12)])
    fit, heldout = pairs.split(test=0.25)
    assert (len(fit), len(heldout)) == (18, 6)
    assert leaks(fit, heldout) == []
    doubled = Contrast.from_labels([f"text {i // 2}" for i in range(24)], [i % 2 for i in range(24)])
    assert leaks(*doubled.split()) == []


def test_pairs_stay_whole_when_their_wordings_differ():
    contrast = two_class(
        *(
            Example(f"{g} {k} {y}", y, group=f"g{g}", template=f"t{(k + y) % 4}", pair=f"{g}-{k}")
            for g in range(8)
            for k in range(4)
            for y in (0, 1)
        )
    )
    for seed in range(5):
        for side in contrast.split(seed=seed):
            assert side.labels.count(0) == side.labels.count(1)
            assert len(side) == 2 * side.describe().n_pairs


def test_both_sides_get_all_classes_if_any_shuffle_allows():
    contrast = Contrast.from_classes({"a": list("pqrs"), "b": list("tuvw"), "c": list("xyz")})
    for seed in range(10):
        fit, heldout = contrast.split(test=0.3, seed=seed)
        assert set(fit.labels) == set(heldout.labels) == {0, 1, 2}


def test_split_errors():
    with pytest.raises(NotEnoughDataError, match="all 4 examples share one group"):
        two_class(*(Example(str(i), i % 2, group="g") for i in range(4))).split()
    with pytest.raises(NotEnoughDataError, match="two classes on both sides"):
        two_class(*(Example(str(i), i % 2, group=str(i % 2)) for i in range(4))).split()
    for test in (0, 1, -0.1, math.nan, "half"):
        with pytest.raises(InputError, match="strictly between 0 and 1"):
            crossed().split(test=test)


def test_split_of_reals_and_tokens():
    reals = Contrast.from_reals([str(i) for i in range(40)], range(40))
    fit, heldout = reals.split(test=0.25)
    assert (len(fit), len(heldout)) == (30, 10)
    tokens = Contrast.from_tokens([([f"w{i}", "runs"], ["N", "V"]) for i in range(8)])
    assert [len(side) for side in tokens.split(test=0.25)] == [6, 2]


names = st.sampled_from(["", "p", "q", "r", "s"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(names, names, st.sampled_from(["", "1", "2", "3"]), st.integers(0, 9), st.integers(0, 1)),
        min_size=2,
        max_size=24,
    ),
    test=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
def test_split_never_leaks(rows, test, seed):
    examples = [
        Example(f"text {text}", label, group=group, template=template, pair=pair)
        for group, template, pair, text, label in rows
    ]
    if len({example.label for example in examples}) < 2:
        return
    contrast = two_class(*examples)
    try:
        fit, heldout = contrast.split(test=test, seed=seed)
    except NotEnoughDataError:
        return
    ignored = ["templates"] if len(set(contrast.templates) - {""}) < 2 else []
    assert [key for key in leaks(fit, heldout) if key not in ignored] == []
    assert set(fit.labels) == set(heldout.labels) == {0, 1}
    assert len(fit) + len(heldout) + fit.dropped == len(contrast)


def test_the_leak_check_finds_a_planted_leak():
    rows = [Row((f"g{i}", "", f"text {i}"), "", frozenset({float(i % 2)})) for i in range(8)]
    first, second = partition(rows, test=0.5, seed=0, wanted=2)
    texts = [row.content[2] for row in rows]
    clean = [two_class(*(Example(texts[i], i % 2) for i in side)) for side in (first, second)]
    assert leaks(*clean) == []
    planted = two_class(*clean[1].examples, clean[0].examples[0])
    assert "texts" in leaks(clean[0], planted)


# ---- sample


def test_sample_keeps_whole_pairs_evenly_over_templates():
    contrast = crossed()
    sample = contrast.sample(12, seed=2)
    assert len(sample) == 24
    assert sample.labels.count(0) == sample.labels.count(1) == 12
    assert {sample.templates.count(t) for t in set(contrast.templates)} == {4}
    assert sample.texts == contrast.sample(12, seed=2).texts != contrast.sample(12, seed=3).texts
    order = [contrast.texts.index(text) for text in sample.texts]
    assert order == sorted(order)


def test_sample_without_pairs_is_balanced_over_classes():
    contrast = Contrast.from_classes({"a": [f"a{i}" for i in range(9)], "b": [f"b{i}" for i in range(4)]})
    assert contrast.sample(3).labels == (0, 0, 0, 1, 1, 1)
    assert len(Contrast.from_reals(["x", "y", "z"], [1, 2, 3]).sample(2)) == 2
    with pytest.raises(NotEnoughDataError, match="asked for 5 'b' prompts, but 'classes' has 4"):
        contrast.sample(5)
    with pytest.raises(NotEnoughDataError, match="asked for 37 pairs, but 'test' has 36"):
        crossed().sample(37)
    for pairs in (0, 1.5, True):
        with pytest.raises(InputError, match="positive whole number"):
            crossed().sample(pairs)


# ---- chat

CHATML = (
    "{{ bos_token }}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content']TRIM }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def make_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def make(template, adds_bos=True):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        if adds_bos:
            model.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
        made.chat_template = template
        return made

    return make


SHE = Example(" She said user hello.", 0, focus=(1, 4), prompt_end=9)
HE = Example("He said user hello.", 1, focus=(0, 2), prompt_end=7)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("trim", ["", "|trim"])
@pytest.mark.parametrize("system", [None, "She said user hello. Be kind."])
def test_chat_moves_every_span(make_tokenizer, trim, system, adds_bos):
    tokenizer = make_tokenizer(CHATML.replace("TRIM", trim), adds_bos)
    contrast = two_class(SHE, HE).chat(tokenizer, system)
    for example, word, prompt in zip(contrast, ("She", "He"), ("She said", "He said"), strict=True):
        assert example.text[slice(*example.focus)] == word
        assert example.text[: example.prompt_end].endswith(prompt)
        assert example.text.endswith("hello.<|im_end|>\n<|im_start|>assistant\n")
        assert ("Be kind" in example.text) == (system is not None)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": SHE.text})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids == expected
    assert tokenizer(contrast.texts[0])["input_ids"] == expected
    # Control: the whole rendered text would carry the first token twice where the tokenizer adds it.
    assert (tokenizer(whole)["input_ids"] == expected) == (not adds_bos)


def test_chat_with_a_continuation(make_tokenizer):
    tokenizer = make_tokenizer(CHATML.replace("TRIM", ""))
    late = [dataclasses.replace(example, focus=(14, 18)) for example in (SHE, HE)]
    contrast = two_class(*late).chat(tokenizer, continuation=True)
    for example, before in zip(contrast, late, strict=True):
        assert example.text.endswith("<|im_start|>assistant\n" + before.text[before.prompt_end :])
        assert example.text[example.prompt_end :] == before.text[before.prompt_end :]
        assert example.text[slice(*example.focus)] == before.text[14:18]
    with pytest.raises(InputError, match=r"example 0: continuation=True needs a prompt"):
        two_class(dataclasses.replace(SHE, prompt_end=0), HE).chat(tokenizer, continuation=True)
    with pytest.raises(InputError, match="crosses the end of the prompt"):
        two_class(dataclasses.replace(SHE, focus=(5, 12)), HE).chat(tokenizer, continuation=True)


def test_chat_of_words(make_tokenizer):
    tokenizer = make_tokenizer(CHATML.replace("TRIM", ""))
    contrast = Contrast.from_tokens([(["cats", "sleep"], ["N", "V"])]).chat(tokenizer)
    (example,) = contrast
    assert [example.text[a:b] for a, b in example.words] == ["cats", "sleep"]


def test_chat_errors(make_tokenizer):
    contrast = two_class(SHE, HE)
    with pytest.raises(InputError, match="has no chat template"):
        contrast.chat(make_tokenizer(None))
    with pytest.raises(InputError, match="does not repeat the user's message"):
        contrast.chat(make_tokenizer("constant"))
    with pytest.raises(InputError, match="rewrites the text"):
        contrast.chat(make_tokenizer("{{ messages[0]['content'] | replace('She', 'They') }}"))
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "x{{ messages[0].content }}"
    )
    with pytest.raises(InputError, match=r"no system.*try system=None"):
        contrast.chat(make_tokenizer(refuses), "Be kind.")
    assert contrast.chat(make_tokenizer(refuses)).texts == ("x She said user hello.", "xHe said user hello.")


# ---- reading


def test_describe():
    contrast = two_class(
        Example("one two", 0, group="g", template="t", pair="p"),
        Example("one three", 1, group="g", template="t", pair="p"),
        Example("one three", 0, group="<h>", template="u"),
    )
    found = contrast.describe()
    assert (found.n, found.n_groups, found.n_templates, found.n_pairs) == (3, 2, 2, 1)
    assert (found.counts, found.balance) == ((("a", 2), ("b", 1)), (("t", (1, 1)), ("u", (1, 0))))
    assert (found.duplicates, found.conflicts) == (1, 1)
    assert found.mean_words == 2
    assert found.shown[0] == (("a", "one two"), ("b", "one three"))
    assert "duplicate texts      1 (1 texts with different labels)" in str(found)
    assert repr(contrast) == "Contrast('test': 3 prompts, a 2 / b 1, 1 pairs, 2 groups, 2 templates)"
    assert len(contrast) == len(list(contrast)) == 3


def test_html_escapes_what_the_data_says():
    evil = "<script>alert(1)</script>"
    contrast = Contrast(evil, "classes", ("a", evil), (Example(evil, 0, template=evil), Example("x", 1)))
    for page in (contrast._repr_html_(), contrast.describe()._repr_html_()):
        assert "<script>" not in page
        assert "&lt;script&gt;" in page


def test_many_templates_are_cut_short():
    contrast = two_class(*(Example(f"x {i}", i % 2, template=f"t{i:03d}") for i in range(100)))
    assert "... and 40 more templates" in str(contrast.describe())
    assert len(contrast.describe().balance) == 100


def test_importing_contrast_stays_light():
    code = (
        "import sys; from repe_unlearn.contrast import Contrast; Contrast.builtin('gender', pairs=20); "
        "print([m for m in ('transformers', 'datasets', 'sklearn', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
