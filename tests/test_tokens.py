from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from textkit import BOS, text_tokenizer

from repe_unlearn.contrast import Contrast, Example
from repe_unlearn.encoding import encode
from repe_unlearn.errors import InputError, NotEnoughDataError
from repe_unlearn.tokens import Select

KINDS = ("last", "mean", "all", "word", "words", "after_prompt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("specials", [True, False])
def test_text_form_round_trips(kind: str, sinks: int, specials: bool) -> None:
    select = Select(kind, sinks, specials)  # type: ignore[arg-type]
    assert Select.parse(str(select)) == select
    assert select.pooled is (kind == "mean")


def test_defaults_leave_out_the_sink_and_specials() -> None:
    assert Select() == Select("last", 1, False) == Select.parse("last")
    assert str(Select()) == "last,sinks=1"


def test_parse_takes_spaces_and_both_forms_of_a_switch() -> None:
    assert Select.parse(" all , sinks=0 , specials ") == Select("all", 0, True)
    assert Select.parse("all,specials=true") == Select("all", 1, True)


@pytest.mark.parametrize("text", ["", "first", "LAST", "word ; sinks=1"])
def test_unknown_kinds(text: str) -> None:
    with pytest.raises(InputError, match="needed one of last, mean, all, word, span, words, after_prompt"):
        Select.parse(text)


@pytest.mark.parametrize("text", ["last,sinks", "last,sinks=1.5", "last,specials=no", "last,", "last,x=1"])
def test_unknown_options(text: str) -> None:
    with pytest.raises(InputError, match=r"got option .*needed 'sinks=N', 'specials', 'text=WORD'"):
        Select.parse(text)


@pytest.mark.parametrize("sinks", [-1, 1.0, "1", None])
def test_wrong_sinks(sinks: object) -> None:
    with pytest.raises(InputError, match="needed a whole number >= 0"):
        Select("last", sinks)  # type: ignore[arg-type]


def test_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        Select().sinks = 2  # type: ignore[misc]
    assert len({Select(), Select("last"), Select("mean")}) == 2


def test_a_named_word() -> None:
    assert Select.parse("span,text=doctor") == Select("span", text="doctor")
    assert Select.parse(str(Select("word", text="she", sinks=0))) == Select("word", text="she", sinks=0)
    with pytest.raises(InputError, match=r"Select\('last'\) takes no text"):
        Select("last", text="she")


# The selection language


@pytest.mark.parametrize("phase", ["both", "prompt", "generation"])
@pytest.mark.parametrize(
    "window", [(None, None), (2, None), (-3, None), (None, -1), (0, -2), (3, 7), (-4, -1)]
)
@pytest.mark.parametrize("include", [(), (5,), (5, "she", " a,b+c%", "12", " x ")])
def test_every_option_round_trips(phase: Any, window: tuple, include: tuple) -> None:
    for kind, count, exclude in product(("last", "all"), (1, 3), ((), (0, "7", "%31", "é ", "+"))):
        if kind == "all" and count > 1:
            continue
        select = Select(
            kind, phase=phase, start=window[0], stop=window[1], count=count, include=include, exclude=exclude
        )  # fmt: skip
        assert Select.parse(str(select)) == select
        assert hash(Select.parse(str(select))) == hash(select)


def test_text_of_the_new_options() -> None:
    select = Select("mean", phase="prompt", start=-4, stop=-1, include=[5, "she"], exclude=(" a", "13", 13))
    text = "mean,sinks=1,phase=prompt,start=-4,stop=-1,include=5+she,exclude=%20a+%313+13"
    assert str(select) == text
    assert Select.parse("span,text=100%").text == "100%"  # as ever
    assert Select.parse(str(Select("span", text="to be, or"))).text == "to be, or"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phase": "answer"}, "got phase='answer'; needed one of both, prompt, generation"),
        ({"start": 1.0}, "got start=1.0; needed a whole number or None"),
        ({"stop": True}, "got stop=True; needed a whole number or None"),
        ({"start": 3, "stop": 3}, "start=3, stop=3: an empty window"),
        ({"start": -1, "stop": -2}, "start=-1, stop=-2: an empty window"),
        ({"count": 0}, "got count=0; needed a whole number >= 1"),
        ({"kind": "all", "count": 2}, "takes no count; got 2. Use 'last'"),
        ({"kind": "after_prompt", "phase": "prompt"}, "selects nothing"),
        ({"include": "she"}, "got include='she'; needed a list of token ids"),
        ({"exclude": [-1]}, r"got exclude=\[-1\]; needed a list of token ids"),
        ({"exclude": [""]}, r"got exclude=\[''\]; needed a list of token ids"),
        ({"exclude": 5}, "got exclude=5; needed a list of token ids"),
    ],
)
def test_wrong_options(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Select(**options)


def test_resolve() -> None:
    tokenizer = text_tokenizer()  # one token per byte
    a, b = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ab")
    found = Select("all", include=["a", b], exclude=[b]).resolve(tokenizer)
    assert found.include == (a, b)
    assert set(found.exclude) == {b, *tokenizer.all_special_ids}
    assert found.specials
    assert found.resolve() == found
    assert Select("all", specials=True).resolve() == Select("all", specials=True)
    with pytest.raises(InputError, match="'she' is 3 tokens for"):
        Select("all", include=["she"]).resolve(tokenizer)
    with pytest.raises(
        InputError, match="names special tokens to leave out, whose ids only the tokenizer knows"
    ):
        Select("all").resolve()


# On capture

TEXT = "abcdefgh"  # token p is character p - 1, after <s>


def captured(select: Select | str, *, prompt_end: int = 5, text: str = TEXT) -> str:
    """Return the characters of the selected tokens, ^ for <s>."""
    examples = tuple(Example(text, label, prompt_end=prompt_end) for label in (0, 1))
    contrast = Contrast("letters", "classes", ("a", "b"), examples)
    select = Select.parse(select) if isinstance(select, str) else select
    encoded = encode(contrast, text_tokenizer(), select)[0]
    return "".join("^" if encoded.ids[p] == BOS else text[p - 1] for p in encoded.positions)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("all", "abcdefgh"),
        ("all,sinks=0,specials", "^abcdefgh"),
        ("all,phase=prompt", "abcde"),
        ("all,phase=generation", "fgh"),
        ("after_prompt", "fgh"),
        ("all,start=-2", "defgh"),
        ("all,start=-2,phase=prompt", "de"),
        ("all,stop=-2", "abc"),
        ("all,start=2,stop=4", "bc"),
        ("mean,start=-2,stop=-1", "d"),
        ("last", "h"),
        ("last,count=2", "gh"),
        ("last,count=2,phase=prompt", "de"),
        ("last,phase=prompt,exclude=e", "d"),
        ("all,include=a+c+g", "acg"),
        ("all,include=a+c+g,exclude=c", "ag"),
        ("all,exclude=c+f,phase=generation", "gh"),
        ("span,text=abcdefgh,phase=prompt,exclude=b", "acde"),
    ],
)
def test_what_capture_selects(select: str, expected: str) -> None:
    assert captured(select) == expected


def test_an_example_without_a_prompt_end_is_all_prompt() -> None:
    """As it is when the same text is given to a model with the plan applied."""
    assert captured("all,phase=prompt", prompt_end=0) == TEXT
    assert captured("all,start=-2", prompt_end=0) == "gh"
    assert captured("after_prompt", prompt_end=0) == TEXT  # as ever
    with pytest.raises(NotEnoughDataError, match="no token of prompt 0"):
        captured("all,phase=generation", prompt_end=0)
