"""Planted facts: balanced, independent, and taught to a small model that answers unseen wordings."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from plantedkit import CACHE, gold_model, neutral_text, planted_model, word_tokenizer
from scipy.stats import chi2

from repe_unlearn.answers import answers
from repe_unlearn.errors import InputError
from repe_unlearn.facts import Facts

FACTS = Facts.builtin("planted")
FEW = {"relations": 1, "forget": 8, "retain": 16, "decoys": 8, "options": 4}


def test_numbers_and_roles() -> None:
    assert {role: len({f.subject for f in FACTS.only(role)}) for role in FACTS.roles} == {
        "forget": 32,
        "retain": 64,
        "decoy": 32,
    }
    assert len(FACTS) == 128 * 3
    for fact in FACTS:
        assert len({fact.answer, *fact.distractors}) == 8
    answered = [{f.answer for f in FACTS.only(*FACTS.roles, relation=r)} for r in FACTS.relations]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(answered, 2))
    words = {word for f in FACTS for word in f.subject.split()}
    assert not words & set().union(*answered)


def test_every_answer_is_right_equally_often_so_that_a_prior_is_at_chance() -> None:
    for role, relation in itertools.product(FACTS.roles, FACTS.relations):
        counts = Counter(f.answer for f in FACTS.only(role, relation=relation))
        assert len(counts) == 8
        assert len(set(counts.values())) == 1
    uneven = Counter(f.answer for f in Facts.builtin("planted", forget=30, relations=1).only("forget"))
    assert sorted(uneven.values()) == [3, 3, 4, 4, 4, 4, 4, 4]


def dependence(pairs: list[tuple[str, str]]) -> float:
    """Pearson's statistic of a table of counts."""
    rows, columns = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    counts = Counter(pairs)
    table = np.array([[counts[a, b] for b in columns] for a in rows], dtype=float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def test_answers_say_nothing_about_each_other() -> None:
    statistic = copied = 0.0
    for seed in range(20):
        facts = Facts.builtin("planted", relations=2, forget=0, decoys=0, retain=64, options=4, seed=seed)
        home, school = (
            [f.answer for f in facts if f.relation == relation] for relation in ("home town", "old school")
        )
        statistic += dependence(list(zip(home, school, strict=True)))
        copied += dependence(list(zip(home, home, strict=True)))
    low, high = chi2(9 * 20).ppf([0.0005, 0.9995])
    assert low < statistic < high
    assert copied > 10 * high  # the control


def test_names_are_shared_so_that_no_single_word_gives_a_person_away() -> None:
    people = {f.subject for f in FACTS}
    assert len(people) == 128
    firsts, lasts = (Counter(name.split()[i] for name in people) for i in (0, 1))
    for counts in (firsts, lasts):
        assert np.mean([counts[name.split()[counts is lasts]] for name in people]) > 3


def test_the_same_seed_gives_the_same_facts() -> None:
    assert Facts.builtin("planted").facts == FACTS.facts
    assert Facts.builtin("planted", seed=1).facts != FACTS.facts


def test_neighbours_are_other_facts_of_the_same_people() -> None:
    facts = Facts.builtin("planted", neighbours=1)
    assert {f.relation for f in facts.only("neighbour")} == {FACTS.relations[-1]}
    assert {f.subject for f in facts.only("neighbour")} == {f.subject for f in facts.only("forget")}
    assert [f.answer for f in facts] == [f.answer for f in FACTS]


def test_names_can_be_given() -> None:
    facts = Facts.builtin("planted", subjects=["Ann", "Bob", "Cy"], forget=1, retain=1, decoys=1)
    assert [(f.subject, f.role) for f in facts][:3] == [("Ann", "forget"), ("Bob", "retain"), ("Cy", "decoy")]


@pytest.mark.parametrize(
    "options",
    [
        {"relations": 0},
        {"relations": 7},
        {"options": 1},
        {"forget": -1},
        {"forget": 0, "retain": 0, "decoys": 0},
        {"neighbours": 3},
        {"subjects": ["Ann"] * 128},
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        Facts.builtin("planted", **options)


def test_unseen_wordings_use_no_new_word_and_none_begins_with_the_name() -> None:
    for forms in FACTS.templates.values():
        assert len(forms["seen"]) >= 3
        assert len(forms["unseen"]) >= 1
        words = {word for text in forms["seen"] for word in text.split()} | {"it"}
        for text in forms["unseen"]:
            assert set(text.split()) <= words
        assert not any(t.startswith("{subject}") for texts in forms.values() for t in texts)


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = word_tokenizer(FACTS)
    for text in (*FACTS.training_text(*FACTS.roles), *neutral_text(FACTS)):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("Paris")["input_ids"]  # the control


def shares(facts: Facts, model: torch.nn.Module, tokenizer: object) -> dict[tuple[str, str], float]:
    found = answers(model, tokenizer, facts, "seen", "unseen", progress=False)
    return {
        (role, form): found.accuracy(role, form=form)
        for role, form in itertools.product(facts.roles, ("seen", "unseen"))
    }


def test_a_small_model_learns_a_few_facts_and_comes_back_from_disk(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plantedkit

    facts = Facts.builtin("planted", **FEW)
    model, tokenizer = planted_model(facts, steps=80)
    found = shares(facts, model, tokenizer)
    assert min(found["forget", "unseen"], found["retain", "unseen"]) > 0.9
    assert found["decoy", "unseen"] < 0.6
    assert any(CACHE.glob("*.safetensors"))

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(plantedkit, "_train", refuse)
    plantedkit._model.cache_clear()
    again, _ = planted_model(facts, steps=80)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    monkeypatch.setattr(plantedkit, "CACHE", tmp_path_factory.mktemp("empty"))
    plantedkit._model.cache_clear()
    with pytest.raises(AssertionError, match="trained again"):  # the control
        planted_model(facts, steps=80)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_model_knows_and_gold_does_not(seed: int) -> None:
    facts = Facts.builtin("planted", seed=seed)
    full, gold = (
        shares(facts, *made) for made in (planted_model(facts, seed=seed), gold_model(facts, seed=seed))
    )
    for form in ("seen", "unseen"):
        assert full["forget", form] > 0.9
        assert full["retain", form] > 0.9
        assert gold["retain", form] > 0.9
        # Chance is 1/8; 96 facts of 32 people: four standard errors are 0.135.
        for share in (gold["forget", form], full["decoy", form], gold["decoy", form]):
            assert share < 0.26
