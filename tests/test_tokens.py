from __future__ import annotations

import pytest

from repe_unlearn.errors import InputError
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


@pytest.mark.parametrize(
    "text", ["last,sinks", "last,sinks=-1", "last,sinks=1.5", "last,specials=no", "last,", "last,x=1"]
)
def test_unknown_options(text: str) -> None:
    with pytest.raises(InputError, match=r"got option .*needed 'sinks=N', 'specials' or 'text=WORD'"):
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
