"""Verdicts on audits whose truth is known, and how often they are wrong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from simkit import audit, many

from repe_unlearn.audit import leak as leak_module
from repe_unlearn.audit.leak import Comparison, Leak, leak, leaks
from repe_unlearn.audit.membership import Auc
from repe_unlearn.audit.record import from_record, from_strict_json, to_record, to_strict_json
from repe_unlearn.audit.verdict import Measure, Thresholds, Verdict, verdict
from repe_unlearn.errors import InputError


@pytest.fixture(autouse=True)
def no_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leak_module, "presence", lambda *_, **__: 0.001)


def measured(true: dict[str, float], *, tiers: dict[str, int] | None = None, n: int = 200, seed: int = 0):
    """Return leaks of attacks with known true leaks."""
    rng = np.random.default_rng(seed)
    return leaks(
        [
            Comparison(name, *audit("normal", share, rng, n=n), paired=True, tier=(tiers or {}).get(name, 0))
            for name, share in true.items()
        ]
    )


TIERS = {"lens": 1, "relearn": 2}


def attacked(lens: float = 0.0, relearn: float = 0.0, **kwargs) -> tuple[Leak, ...]:
    return measured({"lens": lens, "relearn": relearn}, tiers=TIERS, seed=1, **kwargs)


def said(found: Verdict, text: str) -> bool:
    return any(text in reason for reason in found.reasons)


def test_a_model_that_never_knew_is_not_recovered() -> None:
    found = verdict(measured({"seen": 0.0, "unseen": 0.0}), attacked(), budget="40 steps")
    assert (found.name, found.flags, found.tier) == ("NOT_RECOVERED_AT_BUDGET", (), 2)
    assert found.budget == "40 steps"
    assert found.worst in TIERS
    assert found.worst_high < 0.1
    assert said(found, "all must pass")


def test_the_original_is_not_forgotten_whatever_the_attacks_say() -> None:
    for attacks in (attacked(), attacked(1.0, 1.0), ()):
        found = verdict(measured({"seen": 1.0, "unseen": 0.0}), attacks)
        assert found.name == "NOT_FORGOTTEN"
        assert said(found, "seen leaks")


def test_one_attack_is_enough_for_hidden() -> None:
    found = verdict(measured({"seen": 0.0}), attacked(relearn=0.5))
    assert (found.name, found.worst) == ("HIDDEN", "relearn")
    assert found.worst_low > 0.1
    assert said(found, "relearn leaks")
    assert not said(found, "lens leaks 0.5")


def test_few_facts_are_inconclusive_and_say_how_many_are_needed() -> None:
    found = verdict(measured({"seen": 0.0}, n=20), attacked(n=20))
    assert found.name == "INCONCLUSIVE"
    assert said(found, "under-powered: with 20 facts")
    assert said(found, "facts are needed for 80%")


def test_too_few_facts_are_not_judged_at_all() -> None:
    found = verdict(measured({"seen": 1.0}, n=12), [])
    assert found.name == "INCONCLUSIVE"
    assert said(found, "rests on 12 facts")
    assert verdict(measured({"seen": 1.0}, n=12), [], thresholds=Thresholds(facts=12)).name == "NOT_FORGOTTEN"


def test_a_leak_at_the_margin_is_inconclusive() -> None:
    found = verdict(measured({"seen": 0.0}, n=400), attacked(lens=0.1, n=400))
    assert found.name == "INCONCLUSIVE"
    assert said(found, "neither above 0.1 nor safely below")


def test_a_small_leak_passes_but_is_told() -> None:
    assert said(verdict(measured({"seen": 0.05}, n=400), []), "A leak below the margin is real")


def test_a_hook_claims_nothing_about_attackers_who_drop_it() -> None:
    behaviour, attacks = measured({"seen": 0.0}), attacked(relearn=1.0)
    found = verdict(behaviour, attacks, hook=True)
    assert (found.name, found.tier) == ("NOT_RECOVERED_AT_BUDGET", 0)
    assert said(found, "a hook is dropped")
    assert verdict(behaviour, attacks, hook=False).name == "HIDDEN"
    sampling = measured({"sampling": 0.6})
    assert verdict(behaviour, (*attacks, *sampling), hook=True).name == "HIDDEN"


def test_a_tier_needs_those_below_it() -> None:
    behaviour = measured({"seen": 0.0})
    lens, relearn = attacked()
    assert verdict(behaviour, [relearn]).tier == 0
    assert verdict(behaviour, [lens]).tier == 1
    assert verdict(behaviour, [lens, relearn]).tier == 2
    assert said(verdict(behaviour, []), "plain questions only")


def test_attacks_that_prove_nothing_do_not_count() -> None:
    behaviour, (lens, relearn) = measured({"seen": 0.0}), attacked(relearn=1.0)
    injects = dataclasses.replace(relearn, invalid="it raises decoys too")
    assert verdict(behaviour, [lens, relearn]).name == "HIDDEN"
    found = verdict(behaviour, [lens, injects])
    assert (found.name, found.tier) == ("NOT_RECOVERED_AT_BUDGET", 1)
    assert said(found, "relearn was not counted: it raises decoys too")
    assert verdict(behaviour, [injects]).name == "INCONCLUSIVE"
    unknown = leak(np.zeros(64), np.zeros(64), np.zeros(64))
    assert verdict([unknown], [lens]).name == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("harm", "flags", "text"),
    [
        (Measure("kl", 0.2, 0.1, 0.3), ("DAMAGED",), "is damaged"),
        (Measure("kl", 0.06, 0.02, 0.1), (), "neither shown nor excluded"),
        (Measure("kl", 0.01, 0.0, 0.02), (), ""),
        (Measure("neighbours", 0.06, 0.03, 0.09), ("DAMAGED",), "neighbours"),
        (Measure("log_perplexity", 0.06, 0.03, 0.09), ("DAMAGED",), "log_perplexity"),
        (Measure("fluency", 0.5, 0.4, 0.6, limit=0.3), ("DAMAGED",), "fluency"),
    ],
)
def test_damage_goes_by_bounds(harm: Measure, flags: tuple[str, ...], text: str) -> None:
    found = verdict(measured({"seen": 0.0}), [], [harm])
    assert found.flags == flags
    assert not text or said(found, text)


def test_damage_limits_can_be_moved() -> None:
    harm = Measure("kl", 0.2, 0.1, 0.3)
    assert verdict(measured({"seen": 0.0}), [], [harm], Thresholds(kl=0.5)).flags == ()
    with pytest.raises(InputError, match="has no limit"):
        verdict(measured({"seen": 0.0}), [], [Measure("fluency", 0, 0, 0)])
    with pytest.raises(InputError, match="positive"):
        Thresholds(kl=0.0)
    with pytest.raises(InputError, match="no interval"):
        Measure("kl", 0.1, 0.3, 0.2)


def test_overshoot() -> None:
    below = verdict(measured({"seen": -0.5}), [])
    assert (below.name, below.flags) == ("NOT_RECOVERED_AT_BUDGET", ("OVERSHOOT",))
    behaviour = measured({"seen": 0.0})
    assert verdict(behaviour, [], membership=Auc("loss", 0.2, 0.1, 0.3, 64, 64)).flags == ("OVERSHOOT",)
    assert verdict(behaviour, [], membership=Auc("loss", 0.45, 0.3, 0.6, 64, 64)).flags == ()
    familiar = verdict(behaviour, [], membership=Auc("loss", 0.9, 0.8, 1.0, 64, 64))
    assert familiar.flags == ()
    assert said(familiar, "still look familiar")


def test_every_result_is_json() -> None:
    found = verdict(measured({"seen": 0.0}), attacked(), [Measure("kl", 0.2, 0.1, 0.3)])
    weak = leak(np.zeros(64), np.zeros(64), np.zeros(64))
    for thing in (found, weak, attacked()[0], Measure("kl", 0.2, 0.1, 0.3), Thresholds()):
        text = to_strict_json(to_record(thing))
        back = from_record(type(thing), from_strict_json(text), "record")
        assert json.loads(to_strict_json(to_record(back))) == json.loads(text)
    assert str(found).startswith("NOT_RECOVERED_AT_BUDGET + DAMAGED (attacker who changes weights")


def test_something_must_be_asked() -> None:
    with pytest.raises(InputError, match="plain questions"):
        verdict([], attacked())


@pytest.mark.parametrize("kind", ["normal", "mixture"])
def test_wrong_verdicts_are_rare(kind: str) -> None:
    """Six attacks, one of which has a true leak of just the margin: both certain verdicts would be wrong."""
    rng, wrong = np.random.default_rng(2), []
    for _ in range(60):
        models = [audit(kind, true, rng, n=100) for true in (0.02, 0.02, 0.1, 0.02, 0.02, 0.02)]
        found = leaks([Comparison(str(i), *scores, paired=True) for i, scores in enumerate(models)])
        wrong.append(verdict(found[:1], found[1:]).name != "INCONCLUSIVE")
    assert np.mean(wrong) <= 0.10 + 3 * np.sqrt(0.10 * 0.90 / 60)  # two errors of 5 % each


def test_a_judge_without_bounds_is_often_wrong() -> None:
    """Audits of a true leak of just the margin, judged by point values."""
    found = leaks(many("mixture", 0.1, 100, n=100))
    assert np.mean([x.value < 0.1 for x in found]) > 0.3
