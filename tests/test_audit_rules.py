"""What makes an audit's numbers count: controls and gates, budget, stored results, retention; by hand, no big model."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from textkit import text_model, text_tokenizer
from torch import nn

from repe_unlearn.audit import attacks, examine, retention
from repe_unlearn.audit.budget import Budget
from repe_unlearn.audit.controls import compared, subjects
from repe_unlearn.audit.leak import leaks
from repe_unlearn.audit.retention import distance, drop
from repe_unlearn.audit.scores import Scores
from repe_unlearn.audit.series import Series
from repe_unlearn.audit.stored import Stored, scores_from_record, scores_to_record
from repe_unlearn.errors import FileFormatError, InputError, ModelMismatchError, NotEnoughDataError
from repe_unlearn.facts import Fact, Facts

N = 16
FACTS = Facts(
    tuple(Fact(f"s{i}", "r", "Rome", ("Oslo",), "forget" if i < N else "decoy") for i in range(2 * N)),
    {"r": {"seen": ("{subject} is in",), "unseen": ("we saw {subject} in",)}},
)


def scores(
    forget: float, decoy: float, *, attack: str = "attack", tier: str = "T1", unit: str = "nats"
) -> Scores:
    """Scores that vary a little from fact to fact around two means."""
    values = {i: (forget if i < N else decoy) + 0.1 * (-1) ** i for i in range(2 * N)}
    return Scores(attack, tier, values, unit)  # type: ignore[arg-type]


PLAIN = {"edited": scores(-2, -2), "original": scores(8, -2)}


def leak_of(edited: Scores, original: Scores, **others: Scores):
    return leaks([compared({"edited": edited, "original": original, **others}, FACTS, PLAIN)])[0]


def test_the_control_is_the_decoys_of_the_edited_model() -> None:
    found = leak_of(scores(3, -2), scores(8, -2))
    assert found.value == pytest.approx(0.5)  # (3 + 2) / (8 + 2)
    assert (found.facts, found.controls, found.tier) == (N, N, 1)


def test_a_gold_model_is_a_control_on_the_same_facts() -> None:
    found = leak_of(scores(3, -2), scores(8, -2), gold=scores(1, 5))
    assert found.value == pytest.approx(2 / 7)  # (3 - 1) / (8 - 1)


@pytest.mark.parametrize("model", ["edited", "original"])
def test_an_attack_that_raises_decoys_is_no_evidence(model: str) -> None:
    models = {"edited": scores(3, -2), "original": scores(8, -2)}
    models[model] = scores(3 if model == "edited" else 8, 2)
    assert f"raises decoys in the {model} model" in leak_of(**models).invalid


def test_decoys_that_fall_are_no_injection() -> None:
    assert leak_of(scores(3, -6), scores(8, -6)).invalid == ""


def test_an_attack_that_spoils_the_original_is_too_weak() -> None:
    assert "too weak on the original" in leak_of(scores(1, -2), scores(2, -2)).invalid
    assert leak_of(scores(1, -2), scores(3.2, -2)).invalid == ""


def test_shares_are_held_against_one() -> None:
    assert "too weak" in leak_of(scores(0.2, 0.2, unit="share"), scores(0.6, 0.2, unit="share")).invalid
    assert leak_of(scores(0.2, 0.2, unit="share"), scores(0.9, 0.2, unit="share")).invalid == ""


def test_without_decoys_or_gold_there_is_no_leak() -> None:
    few = FACTS.where(lambda f: f.role == "forget")
    with pytest.raises(InputError, match="0 decoys"):
        compared(PLAIN, few, PLAIN)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def test_the_random_edit_is_as_large_and_leaves_no_trace() -> None:
    base, edited = network(), network()
    edited[0].weight.data += torch.outer(torch.arange(5.0), torch.ones(6))
    before = {name: p.clone() for name, p in base.named_parameters()}
    found = subjects(base, edited)
    with found["random edit"].enter() as model:
        change = model[0].weight.detach() - before["0.weight"]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 1
        assert float(change.norm()) == pytest.approx(
            float((edited[0].weight - before["0.weight"]).detach().norm()), rel=1e-4
        )
        assert not torch.allclose(change, edited[0].weight - before["0.weight"])
        assert torch.equal(model[1].weight, before["1.weight"])
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert len({one.key for one in found.values()}) == 3
    with found["edited"].enter() as model:
        assert model is edited


def test_models_that_cannot_be_compared_are_refused() -> None:
    base = network()
    with pytest.raises(InputError, match="do not differ"):
        subjects(base, copy.deepcopy(base))
    with pytest.raises(ModelMismatchError, match="gold has other parameters"):
        subjects(base, network(1), nn.Linear(2, 2))


def test_levels_grow_and_tiers_limit() -> None:
    quick, standard, full = (set(attacks.of_level(level)) for level in attacks.LEVELS)
    assert quick < standard < full == set(attacks.ATTACKS)
    assert {a.tier for a in attacks.of_level("full", 0)} == {"T0"}
    assert {a.name for a in attacks.of_level("quick", only=["relearn.facts", "perturb"])} >= {
        "behaviour",
        "relearn.facts",
        "perturb.int8",
        "perturb.noise",
    }
    for wrong in (
        {"level": "huge"},
        {"level": "quick", "tier_limit": 3},
        {"level": "quick", "only": ["gcg"]},
    ):
        with pytest.raises(InputError, match="needed"):
            attacks.of_level(**wrong)  # type: ignore[arg-type]


def test_a_budget_starts_only_what_fits_and_learns_from_what_things_took() -> None:
    clock = Budget(minutes=1, seconds_per_pass=1.0)
    assert clock.fits("lens", 50)
    assert not clock.fits("relearn.facts", 70)
    assert clock.left_out == ["relearn.facts (about 70 s)"]
    clock.done("relearn.retain_only", 10, 2.0)  # five times faster than it was thought
    assert clock.fits("relearn.facts", 70)
    clock.started -= 50
    assert not clock.fits("lens", 50)
    assert Budget().fits("anything", 1e9)
    with pytest.raises(InputError, match="positive"):
        Budget(minutes=0)


def test_stored_results_come_back_only_for_the_same_key(tmp_path: Path) -> None:
    store, key = Stored(tmp_path), {"edited": "a", "facts": "b"}
    curve = Series("Lens", "decoy", (0, 1), (0.5, float("nan")), rows=("x", "y"))
    found = [dataclasses.replace(scores(1 / 3, -2), curves=(curve,), facts={"seed": "0"})]
    assert store.load("lens-edited", key) is None
    store.save("lens-edited", key, {"scores": scores_to_record(found)})
    kept = store.load("lens-edited", key)
    assert kept is not None
    (back,) = scores_from_record(kept["scores"])
    assert dict(back.values) == dict(found[0].values)
    assert repr(back.curves) == repr(found[0].curves)
    assert store.load("lens-edited", {**key, "facts": "c"}) is None
    assert Stored(None).load("lens-edited", key) is None
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FileFormatError, match="strict JSON"):
        store.load("lens-edited", key)
    with pytest.raises(FileFormatError, match="stored scores"):
        scores_from_record([{"attack": "x"}])
    with pytest.raises(InputError, match="is a file"):
        Stored(path)


def test_distance_is_that_of_plain_torch() -> None:
    tokenizer = text_tokenizer()
    one, two = text_model(dtype=torch.float32), text_model(dtype=torch.float32)
    with torch.no_grad():
        next(two.parameters()).mul_(1.1)
    texts = [f"{a} cat {b} dog ran" for a in ("the", "a", "my") for b in ("sat", "we", "saw")]
    kl, rise = distance(tokenizer, lambda: nullcontext(one), lambda: nullcontext(two), texts, name="x")
    kls, before, after = [], [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p, q = one(ids).logits[0].log_softmax(-1), two(ids).logits[0].log_softmax(-1)
        kls.append(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))
        nll = [float(nn.functional.nll_loss(x[:-1], ids[0, 1:])) for x in (p, q)]
        before.append(nll[0])
        after.append(nll[1])
    assert kl.value == pytest.approx(np.mean(kls), rel=1e-4)
    assert rise.value == pytest.approx(np.mean(after) / np.mean(before) - 1, rel=1e-4)
    assert kl.low < kl.value < kl.high
    assert kl.limit == 0.05
    same = distance(tokenizer, lambda: nullcontext(one), lambda: nullcontext(one), texts, name="x")
    assert [m.value for m in same] == pytest.approx([0, 0], abs=1e-7)
    with pytest.raises(NotEnoughDataError, match="3 texts"):
        distance(tokenizer, lambda: nullcontext(one), lambda: nullcontext(one), texts[:3], name="x")


class _Said:
    """Answers of which only the share of right ones per fact is looked at."""

    def __init__(self, right: dict[int, float]) -> None:
        self.chosen = right

    def per_fact(self, values: dict[int, float], *_: str) -> dict[int, float]:
        return values


def test_lost_answers_count_only_where_there_was_something_to_lose() -> None:
    before, after = {i: float(i < 12) for i in range(20)}, {i: float(i < 9) for i in range(20)}
    found = drop(_Said(before), _Said(after), "retain", name="retained")  # type: ignore[arg-type]
    assert found is not None
    assert found.value == pytest.approx(3 / 12)
    few = dict.fromkeys(range(7), 1.0)
    assert drop(_Said(few), _Said(few), "retain", name="retained") is None  # type: ignore[arg-type]


def test_too_few_facts_are_refused_before_anything_is_run() -> None:
    with pytest.raises(NotEnoughDataError, match="has 3 facts"):
        examine._require_enough(FACTS.having([0, 1, 2, *range(N, 2 * N)]), gold=False)
    with pytest.raises(InputError, match="has 0 decoys"):
        examine._require_enough(FACTS.having(range(N)), gold=False)
    examine._require_enough(FACTS.having(range(N)), gold=True)


def test_a_series_of_rows_needs_a_name_for_each() -> None:
    with pytest.raises(InputError, match="rows"):
        Series("x", "edited", (0, 1), (0.1, 0.2), rows=("one",))
    assert json.dumps(Series("x", "edited", (0,), (0.1,), rows=("one",)).rows) == '["one"]'


def test_fewer_wordings_are_of_the_same_facts() -> None:
    templates = {"r": {"seen": ("{subject} a", "{subject} b", "{subject} c"), "unseen": ("{subject} d",)}}
    many = dataclasses.replace(FACTS, templates=templates)
    few = examine._brief(many, 2)
    assert few.facts == many.facts
    assert {q.template for q in few.questions("seen", "unseen")} == {
        "{subject} a",
        "{subject} b",
        "{subject} d",
    }
    assert examine._brief(many, 9).questions("seen") == many.questions("seen")


def case(facts: Facts) -> attacks.Case:
    model = text_model()
    edited = copy.deepcopy(model)
    edited.lm_head.weight.data += 1
    return attacks.Case(text_tokenizer(), facts, facts, edited, model, None, ())


def test_all_models_are_attacked_with_the_directions_of_the_edit_against_the_intact_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, used = [], []

    def find(
        edited: nn.Module, tokenizer: object, facts: Facts, *, base: nn.Module, progress: bool
    ) -> list[str]:
        before.append((edited, base.lm_head.weight.clone()))
        return ["one"]

    monkeypatch.setattr(attacks, "ablations", find)
    monkeypatch.setattr(attacks, "ablation", lambda *args, which, **_: used.append(tuple(which)))
    here = case(FACTS)
    (row,) = (one for one in attacks.ATTACKS if one.name == "ablation")
    assert row.prepare is not None
    row.prepare(here)
    intact = here.base.lm_head.weight.clone()
    here.base.lm_head.weight.data += 5  # what a random edit does to it
    row.prepare(here)
    row.run(here, here.base, 0)
    assert used == [("one",)]
    assert len(before) == 1
    assert before[0][0] is here.edited
    assert torch.equal(before[0][1], intact)
    compares = {one.name for one in attacks.ATTACKS if not one.random}
    assert "depth" in compares  # a random edit of the original cannot be held against the original itself


@pytest.mark.parametrize(("answers", "used"), [("shared", "probe"), ("own", "lens")])
def test_where_no_answer_can_be_learnt_the_way_to_the_head_is(
    answers: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [Fact(f"s{i}", "r", "Rome", ("Oslo",), "forget") for i in range(4)]
    told += [
        Fact(f"k{i}", "r", "Rome" if answers == "shared" else "Lima", ("Oslo",), "retain") for i in range(4)
    ]
    called = []
    monkeypatch.setattr(attacks, "probe", lambda *_, kind, **__: called.append("probe"))
    monkeypatch.setattr(
        attacks, "lens", lambda *_, tuned=False, **__: called.append("lens" if tuned else "untuned")
    )
    here = case(dataclasses.replace(FACTS, facts=tuple(told)))
    (row,) = (one for one in attacks.ATTACKS if one.name == "probe")
    row.run(here, here.base, 0)
    assert set(called) == {used}


def test_at_most_64_facts_of_a_role_are_asked_for_damage() -> None:
    facts = dataclasses.replace(
        FACTS,
        facts=tuple(
            Fact(f"s{i}", "r", "Rome", ("Oslo",), "retain" if i < 90 else "neighbour") for i in range(100)
        ),
    )
    chosen = retention._some(facts, ("retain", "neighbour"), 0)
    assert len(chosen) == 64 + 10
    assert chosen >= set(range(90, 100))
    assert retention._some(facts, ("retain",), 0) != retention._some(facts, ("retain",), 1)
