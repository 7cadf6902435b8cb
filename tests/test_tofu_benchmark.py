"""The parts of the TOFU benchmark that need no real model: false answers, the choice of questions, cut answers, the table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scriptkit import script

from repe_unlearn.audit.tofu import model_utility

bench = script("tofu")
Asked = bench.Asked

BORN = Asked("Where was Ana Ruiz born?", "Ana Ruiz was born in Oslo on May 4, 1950.")
BOOK = Asked("What did Ana Ruiz write?", 'She wrote "The Long Road" in 1980, with Bo Li.')
OTHERS = [
    Asked("Where was Ulf Berg born?", "Ulf Berg was born in Lima on June 9, 1941."),
    Asked("Where was Eve Hill born?", "Eve Hill was born in Paris on July 1, 1930."),
    Asked("Where was Ida Voss born?", "Ida Voss was born in Oslo on March 3, 1922."),
    Asked("Where was Max Kern born?", "Max Kern was born in Cairo on April 2, 1911."),
]


def said(asked: Any) -> list[tuple[str, str]]:
    return [(kind, asked.answer[start:end]) for kind, start, end in bench.spans(asked.question, asked.answer)]


def test_spans_are_what_the_answer_says_and_the_question_does_not() -> None:
    assert said(BORN) == [("name of 1", "Oslo"), ("date", "May 4, 1950")]
    assert said(BOOK) == [("title", "The Long Road"), ("number", "1980"), ("name of 2", "Bo Li")]
    assert said(Asked("Was Ana Ruiz born in Oslo on May 4, 1950?", BORN.answer)) == []
    assert said(Asked("What does she do?", "The author's father's work was teaching.")) == []


def test_pools_leave_out_what_taught_texts_say() -> None:
    pool = bench.pools(OTHERS)
    assert pool["name of 1"] == [("in", "Cairo"), ("in", "Lima"), ("in", "Oslo"), ("in", "Paris")]
    assert ("in", "Oslo") not in bench.pools(OTHERS, taught=BORN.answer)["name of 1"]


def test_false_answers_say_something_else_in_the_same_sentence() -> None:
    pool = bench.pools(OTHERS, taught=BORN.answer)
    found = bench.false_answers(BORN, pool, 2, seed=0)
    assert found == bench.false_answers(BORN, pool, 2, seed=0)
    assert len({BORN.answer, *found.wrong}) == 3
    for text in found.wrong:
        place = text.removeprefix("Ana Ruiz was born in ").split(" on ")[0]
        assert place in {"Lima", "Paris", "Cairo"}
        assert text.endswith(
            ("on June 9, 1941.", "on July 1, 1930.", "on March 3, 1922.", "on April 2, 1911.")
        )


def test_a_word_that_stands_before_is_looked_for() -> None:
    sort = [Asked("?", f"It is named X{i}.") for i in range(9)] + OTHERS
    asked = Asked("Where?", "It is in Rome.")
    for seed in range(8):
        wrong = bench.false_answers(asked, bench.pools(sort), 1, seed).wrong[0]
        assert wrong in {f"It is in {place}." for place in ("Lima", "Paris", "Oslo", "Cairo")}
    # Where there are too few behind the same word, any will do.
    some = {bench.false_answers(asked, bench.pools(sort[:9]), 1, seed).wrong[0] for seed in range(8)}
    assert some <= {f"It is in X{i}." for i in range(9)}


def test_too_few_other_answers_are_refused() -> None:
    with pytest.raises(SystemExit, match="Where was Ana Ruiz born"):
        bench.false_answers(BORN, bench.pools(OTHERS[:1]), 2, seed=0)


def test_the_shortest_questions_with_something_to_say_are_chosen() -> None:
    long = Asked("Where exactly was Zoe Zuse born, please?", "Zoe Zuse was born in Berlin on May 5, 1905.")
    mute = Asked("Is it?", "It is.")
    forget, retain = bench.choose([mute, long, BORN], OTHERS, (1, 1), wrong=1)
    assert [(a.question, a.answer) for a in forget] == [(BORN.question, BORN.answer)]
    assert [a.question for a in retain] == [OTHERS[0].question]
    (false,), (other,) = forget[0].wrong, retain[0].wrong
    assert false.split(" in ")[1].split(" on ")[0] in {
        "Paris",
        "Cairo",
        "Berlin",
    }  # not Lima, which is taught
    assert other.split(" in ")[1].split(" on ")[0] in {"Paris", "Cairo", "Berlin"}  # not Oslo


def test_cut_answers_go_on_where_the_question_ends() -> None:
    whole = bench.facts([BORN], [OTHERS[0]])
    pieces = bench.cut(whole, parts=3)
    assert len(pieces) == 6
    for sample, asked in zip(pieces.samples("seen"), [BORN] * 3 + [OTHERS[0]] * 3, strict=True):
        assert sample.text == f"Question: {asked.question}\nAnswer: {asked.answer}"
    assert [f.role for f in pieces] == ["forget"] * 3 + ["retain"] * 3
    assert [len(s.completion.split()) for s in pieces.samples("seen", roles=["forget"])] == [10, 7, 4]
    assert whole.samples("seen") == bench.cut(whole, parts=1).samples("seen")


def scores(ratios: list[float], probability: float) -> dict[str, Any]:
    n = len(ratios)
    names = ("probability", "share", "rouge", "memorised", "strength")
    one = {"truth_ratio": ratios, **{name: [probability] * n for name in names}}
    return {"scores": dict.fromkeys(bench.SETS, one)}


def test_a_row_holds_the_numbers_of_its_model() -> None:
    gold = scores([0.5, 0.6, 0.7, 0.8], 0.2)
    one = bench.row("npo", {**scores([0.1, 0.2, 0.3, 0.75], 0.4), "relative": 0.01, "seconds": 7.4}, gold)
    assert one["distance"] == 0.75  # three of four lie below all of gold
    assert bench.row("gold", gold, gold)["distance"] == 0.0
    assert one["truth_ratio"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.75) / 4)
    truth = 1 - one["truth_ratio"]
    assert one["utility"] == pytest.approx(9 / (6 / 0.4 + 3 / truth))
    assert one["critical"] == pytest.approx(1.3581 * math.sqrt(2 / 4), abs=1e-4)
    parts = [bench.results(gold["scores"], name) for name in bench.SETS[1:]]
    assert bench.row("gold", gold, gold)["utility"] == model_utility(*parts)
    head, rule, line = bench.table([one]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| npo | 0.40 | 0.40 | 0.40 | 0.34 | 0.75 |")
    assert line.endswith("| 0.010 | 7 | 0.42 | 0.54 |")
    assert bench.table([{**one, "method": "random", "seconds": None}]).endswith("| 0.010 | – | – | – |")


def test_published_rows_are_of_methods_that_exist() -> None:
    assert set(bench.PUBLISHED) <= {"taught", "gold", *bench.METHODS}
    assert set(bench.SETTINGS) <= set(bench.METHODS)


def test_runs_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    args = bench.parser().parse_args(["--out", str(tmp_path)])
    bench.same_settings(args, bench.FREE)
    bench.same_settings(bench.parser().parse_args(["--out", str(tmp_path), "--methods", "npo"]), bench.FREE)
    with pytest.raises(SystemExit, match="other settings"):
        bench.same_settings(bench.parser().parse_args(["--out", str(tmp_path), "--epochs", "1"]), bench.FREE)


def test_the_report_goes_between_the_markers() -> None:
    page = "a\n<!-- results: begin -->\nold\n<!-- results: end -->\nz\n"
    assert bench.filled(page, "new") == "a\n<!-- results: begin -->\n\nnew\n\n<!-- results: end -->\nz\n"
    with pytest.raises(SystemExit, match="results: begin"):
        bench.filled("a page", "new")
