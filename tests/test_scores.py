"""Scores: what they refuse, their order, and a choice among layers that cannot make a leak."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from repe_unlearn.audit.scores import Scores, crossfit, curves
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError
from repe_unlearn.facts import Facts

ROWS = [
    (f"Person {i}", f"Place {i % 5}", role)
    for i, role in enumerate(["decoy"] * 24 + ["forget"] * 24 + ["retain"] * 8)
]
FACTS = Facts.of(ROWS, ["{subject} lives in"])
FORGET, DECOY = range(24, 48), range(24)


def test_scores_come_in_the_order_of_the_facts() -> None:
    scores = Scores("ask", "T0", {40: 4.0, 2: 2.0, 30: 3.0}, "nats")
    assert scores.of(FACTS, "forget").tolist() == [3.0, 4.0]
    assert scores.of(FACTS).tolist() == [2.0, 3.0, 4.0]
    assert scores.indices(FACTS, "forget", "decoy") == [2, 30, 40]
    with pytest.raises(NotEnoughDataError, match="role retain has a score"):
        scores.of(FACTS, "retain")


def test_scores_are_frozen_and_can_be_copied_and_pickled() -> None:
    scores = Scores("ask", "T1", {0: 1.0}, "share", facts={"seed": 3})  # type: ignore[dict-item]
    for same in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert (same.attack, same.tier, dict(same.values), same.unit) == ("ask", "T1", {0: 1.0}, "share")
        assert dict(same.facts) == {"seed": "3"}
    with pytest.raises(TypeError):
        scores.values[0] = 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tier": "T3"}, InputError, "needed T0, T1 or T2"),
        ({"unit": "bits"}, InputError, "nats or share"),
        ({"values": {}}, NotEnoughDataError, "no fact"),
        ({"values": {3: float("nan"), 4: 1.0}}, NonFiniteError, "fact 3 is nan"),
        ({"values": {3: "much"}}, InputError, "must be a number"),
    ],
)
def test_bad_scores_are_refused(changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Scores(**{"attack": "ask", "tier": "T0", "values": {0: 1.0}, "unit": "nats", **changes})


def noise(rng: np.random.Generator, layers: int = 30) -> dict[int, dict[int, float]]:
    return {layer: dict(enumerate(rng.normal(size=len(FACTS)))) for layer in range(layers)}


def gap(values: dict[int, float]) -> float:
    return float(np.mean([values[i] for i in FORGET]) - np.mean([values[i] for i in DECOY]))


def test_choosing_among_many_layers_makes_no_leak() -> None:
    rng = np.random.default_rng(0)
    fitted, naive = [], []
    for seed in range(300):
        table = noise(rng)
        fitted.append(gap(crossfit(table, FACTS, seed=seed)[0]))
        naive.append(max(gap(values) for values in table.values()))
    error = float(np.std(fitted) / len(fitted) ** 0.5)
    assert abs(np.mean(fitted)) < 4 * error
    assert np.mean(naive) > 20 * error  # control: the best layer as it is


def test_the_layer_that_leaks_is_found() -> None:
    table = noise(np.random.default_rng(1))
    table[17] = {i: v + 2.0 * (i in FORGET) for i, v in table[17].items()}
    values, picked = crossfit(table, FACTS)
    assert picked == (17, 17)
    assert values == table[17]
    # A layer on which everything is higher, decoys too, is none that leaks.
    table[3] = {i: v + 9.0 for i, v in table[3].items()}
    assert crossfit(table, FACTS)[1] == (17, 17)


def test_facts_of_one_subject_are_scored_under_one_choice() -> None:
    facts = Facts.of([*ROWS, *((name, "Place 9", role) for name, _, role in ROWS)], ["{subject} lives in"])
    rng = np.random.default_rng(2)
    table = {layer: dict.fromkeys(range(len(facts)), float(layer)) for layer in range(2)}
    for i in range(len(facts)):  # so that the two halves choose differently
        table[0][i] += rng.normal()
    for seed in range(20):
        values, picked = crossfit(table, facts, seed=seed)
        if picked[0] != picked[1]:
            break
    else:
        pytest.fail("no seed makes the halves choose differently")
    layer = {i: int(values[i] == 1.0) for i in values}
    assert all(layer[i] == layer[i + len(ROWS)] for i in range(len(ROWS)))
    assert {sum(layer[i] for i in FORGET), sum(layer[i] for i in DECOY)} == {12}


def test_nothing_to_choose_from() -> None:
    with pytest.raises(NotEnoughDataError, match="nothing to choose"):
        crossfit({}, FACTS)


def test_curves_are_means_over_facts_with_intervals() -> None:
    table = noise(np.random.default_rng(3), layers=3)
    found = {series.label: series for series in curves(table, FACTS, "F", panel="p")}
    assert list(found) == ["forget", "retain", "decoy"]
    row = np.array([table[1][i] for i in FORGET])
    assert found["forget"].y[1] == pytest.approx(row.mean())
    assert found["forget"].high[1] - row.mean() == pytest.approx(1.96 * row.std(ddof=1) / 24**0.5)
    assert (found["forget"].x, found["forget"].panel) == ((0.0, 1.0, 2.0), "p")
