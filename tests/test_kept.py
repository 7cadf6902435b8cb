"""Facts from elsewhere as a measure of damage, on models of which it is known what they know."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from knowkit import PLANTED, gold, original
from test_audit import audited, dense, found

from repe_unlearn.audit.retention import kept
from repe_unlearn.audit.verdict import Measure, Thresholds
from repe_unlearn.errors import FileFormatError, InputError, NotEnoughDataError
from repe_unlearn.facts import Facts
from repe_unlearn.facts_files import read_kept

RELATION = PLANTED.relations[0]


def of(role: str, *, bare: bool = False) -> Facts:
    facts = PLANTED.where(lambda f: f.role == role and f.relation == RELATION)
    plain = tuple(replace(f, distractors=()) if bare else f for f in facts)
    return replace(facts, facts=plain, name=role)


def lost(facts: Facts) -> Measure:
    """What a model that never knew lost against one that knows."""
    model, tokenizer = original()
    return kept(tokenizer, lambda: nullcontext(model), lambda: nullcontext(gold()), facts, name=facts.name)


def test_what_was_lost_is_the_share_of_right_choices() -> None:
    """The gold model never heard of what is to be forgotten, whatever role it has there, and knows what is retained."""
    gone, stays = lost(of("forget")), lost(of("retain"))
    assert gone.name == "kept.forget"
    assert gone.limit == Thresholds().neighbours
    assert 0.6 < gone.low <= gone.value <= gone.high <= 1  # 1 - 1/8, by chance
    assert -0.05 < stays.value < 0.15


def test_without_wrong_answers_other_answers_of_the_set_are_offered() -> None:
    bare = lost(of("forget", bare=True))
    assert 0.4 < bare.value < 1  # 1 - 1/4
    one = of("forget", bare=True)
    alike = replace(one, facts=tuple(replace(f, answer="same") for f in one))
    with pytest.raises(NotEnoughDataError, match="fewer than 8"):  # nothing to choose from
        lost(alike)


def test_what_the_original_does_not_know_does_not_count() -> None:
    with pytest.raises(NotEnoughDataError, match="fewer than 8"):
        lost(replace(of("decoy"), facts=tuple(replace(f, role="retain") for f in of("decoy").facts[:16])))


def test_an_audit_judges_every_set(tmp_path: Path) -> None:
    path = of("retain").to_jsonl(tmp_path / "elsewhere.jsonl")
    mine = replace(read_kept(path), name="elsewhere")
    unknown = replace(of("decoy"), name="unknown")
    options = {"kept": [mine, unknown], "resume": tmp_path / "state", "thresholds": Thresholds(margin=0.25)}
    report = audited(dense(), (), **options)
    assert found(report, "cost.kept.elsewhere").bound == "<= 0.02"
    assert "elsewhere" in report.facts["kept"]
    assert "kept.unknown: " in report.facts["not attacked"]
    again = audited(dense(), (), **options)
    assert found(again, "cost.kept.elsewhere") == found(report, "cost.kept.elsewhere")
    with pytest.raises(InputError, match="two sets"):
        audited(dense(), (), kept=[mine, mine])


def test_files_of_questions_and_our_own_are_read(tmp_path: Path) -> None:
    rows = [
        {
            "question": "Where is the Eiffel Tower?",
            "answer": "Paris",
            "perturbed_answer": ["Berlin", "Paris"],
        },
        {"question": "What is two and two?", "answer": "four"},
    ]
    asked = tmp_path / "world_facts.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = read_kept(asked)
    assert (facts.name, facts.roles) == ("world_facts", ("retain",))
    assert [f.distractors for f in facts] == [("Berlin",), ()]
    assert read_kept("capitals").name == Facts.builtin("capitals").name
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({**rows[0], "perturbed_answer": 3}) + "\n")
    with pytest.raises(FileFormatError, match="perturbed_answer"):
        read_kept(broken)
    with pytest.raises(InputError):
        read_kept(tmp_path / "none.jsonl")
