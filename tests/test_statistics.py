"""Leaks and their statistics: hand-computed cases, scipy, and simulations with a known truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from simkit import audit, many

from repe_unlearn.audit import leak as leak_module
from repe_unlearn.audit.leak import Comparison, Leak, leak, leaks, worst
from repe_unlearn.audit.statistics import (
    detectable,
    fact_means,
    facts_needed,
    holm,
    mean_interval,
    presence,
    tost_power,
)
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError

REPEATS = 400


@pytest.fixture
def no_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations of intervals do without the p-values, which take most of the time."""
    monkeypatch.setattr(leak_module, "presence", lambda *_, **__: 1.0)


def margin_of_error(share: float, repeats: int) -> float:
    """Three standard errors of a share that a simulation counts."""
    return 3 * math.sqrt(share * (1 - share) / repeats)


# ---- facts ----


def test_every_fact_counts_alike() -> None:
    rows = [[1.0, 0.0, 0.5], [1.0], [0.0, 0.5]] * 3
    assert fact_means(rows).tolist() == [0.5, 1.0, 0.25] * 3
    table = np.array([[1.0, 0.0], [1.0, np.nan], [0.5, 0.5], [0, 0]] * 2)
    assert fact_means(table).tolist() == [0.5, 1.0, 0.5, 0.0] * 2
    # Not the mean over prompts, in which facts with many prompts would count more.
    assert fact_means(rows).mean() != pytest.approx(np.mean([x for row in rows for x in row]))


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        (np.zeros((8, 2, 2)), ShapeError, "must be"),
        (np.zeros((7, 50)), NotEnoughDataError, "Add facts"),
        (np.full((8, 2), np.inf), NonFiniteError, "infinite"),
        (np.array([[0.0]] * 7 + [[np.nan]]), NotEnoughDataError, "fact 7 has no score"),
    ],
)
def test_unusable_scores(scores: np.ndarray, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fact_means(scores)


# ---- tests of presence ----


def test_sign_flips_are_exact_for_few_facts() -> None:
    rng = np.random.default_rng(3)
    edited, control = rng.normal(0.4, 1, 10), rng.normal(0, 1, 10)
    d = edited - control
    flips = [np.dot(signs, d) for signs in itertools.product((-1, 1), repeat=10)]
    expected = np.mean(np.array(flips) >= d.sum() - 1e-12)
    assert presence(edited, control, paired=True) == pytest.approx(expected, abs=1e-12)


def test_drawn_permutations_agree_with_t_tests() -> None:
    rng = np.random.default_rng(4)
    edited, control = rng.normal(0.3, 1, 80), rng.normal(0, 1, 80)
    paired = stats.ttest_rel(edited, control, alternative="greater").pvalue
    unpaired = stats.ttest_ind(edited, control[:50], equal_var=False, alternative="greater").pvalue
    assert presence(edited, control, paired=True) == pytest.approx(paired, abs=0.01)
    assert presence(edited, control[:50], paired=False) == pytest.approx(unpaired, abs=0.01)


def test_presence_needs_pairs() -> None:
    with pytest.raises(ShapeError, match="paired=False"):
        presence(np.zeros(9), np.zeros(8), paired=True)


def false_alarms(repeats: int, *, by_prompt: bool) -> float:
    """The share of audits without any leak in which presence is claimed at 5 %."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(repeats):
        edited, _, control = audit("normal", 0.0, rng, n=12)
        if by_prompt:
            edited, control = edited.ravel(), control.ravel()
        alarms += presence(edited, control, paired=True) <= 0.05
    return alarms / repeats


def test_presence_errs_in_5_percent() -> None:
    assert false_alarms(200, by_prompt=False) <= 0.05 + margin_of_error(0.05, 200)


def test_presence_by_prompt_would_not() -> None:
    assert false_alarms(60, by_prompt=True) > 0.12


def test_holm() -> None:
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.9]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([]) == ()


# ---- intervals ----


def share_covered(found: tuple[Leak, ...], true: float) -> float:
    return float(np.mean([x.low <= true <= x.high for x in found]))


@pytest.mark.usefixtures("no_permutations")
@pytest.mark.parametrize(
    ("kind", "n", "paired", "true"),
    [
        ("normal", 16, True, 0.0),
        ("normal", 64, False, 0.4),
        ("normal", 200, True, 0.1),
        ("binary", 16, False, 0.0),
        ("binary", 64, True, 0.4),
        ("skewed", 64, False, 0.1),
        ("mixture", 64, True, 0.1),
    ],
)
def test_coverage(kind: str, n: int, paired: bool, true: float) -> None:
    found = leaks(many(kind, true, REPEATS, n=n, paired=paired, seed=n))
    error = margin_of_error(0.95, REPEATS)
    assert 0.93 - error <= share_covered(found, true) <= 0.97 + error


@pytest.mark.usefixtures("no_permutations")
def test_resampling_prompts_would_under_cover() -> None:
    rng = np.random.default_rng(6)
    flat = [[x.ravel() for x in audit("normal", 0.1, rng, n=32)] for _ in range(200)]
    found = leaks([Comparison(str(i), *models, paired=True) for i, models in enumerate(flat)])
    assert share_covered(found, 0.1) < 0.85


def test_mean_interval_is_that_of_t() -> None:
    x = np.random.default_rng(7).normal(2, 1, 40)
    expected = stats.t.interval(0.95, 39, x.mean(), stats.sem(x))
    value, *interval = mean_interval(x)
    assert value == pytest.approx(x.mean())
    assert interval == pytest.approx(expected, abs=0.04)


# ---- leaks ----


def test_leak_by_hand() -> None:
    edited = [[0.3, 0.5], [0.2, 0.2]] * 10
    original, control = [[1.0, 0.8]] * 20, [[0.1, 0.1]] * 9
    found = leak(edited, control, original)
    assert (found.edited, found.original, found.control) == pytest.approx((0.3, 0.9, 0.1))
    assert found.value == pytest.approx(0.2 / 0.8)
    assert (found.facts, found.controls, found.units) == (20, 9, 9)


def test_an_attack_that_is_too_weak_on_the_original_is_invalid() -> None:
    rng = np.random.default_rng(8)
    a, b, c = rng.normal(size=(3, 40))
    found = leak(a, b, c + 0.1)
    assert "too weak" in found.invalid
    assert math.isnan(found.value)
    assert not found.absent()
    assert not leak(a, b, c + 3).invalid


def test_attacks_are_matched_by_fact() -> None:
    rng = np.random.default_rng(9)
    edited, original, control = audit("normal", 0.3, rng, n=20)
    names = tuple(f"fact {i:02}" for i in range(20))
    order = rng.permutation(20)
    straight = Comparison("a", edited, original, control, paired=True, facts=names)
    shuffled = Comparison(
        "b",
        edited[order],
        original[order],
        control[order],
        paired=True,
        facts=tuple(names[i] for i in order),
    )
    a, b = leaks([straight, shuffled])
    assert (a.value, a.low, a.high, a.floor) == pytest.approx((b.value, b.low, b.high, b.floor))
    alone = leaks([straight])[0]
    assert alone.floor == pytest.approx(a.floor)  # two attacks that are one need no correction


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tier": 3}, InputError, "tier"),
        ({"original": np.zeros(9)}, ShapeError, "same facts"),
        ({"control": np.zeros(9), "paired": True}, ShapeError, "same facts"),
        ({"facts": ("x",) * 8}, InputError, "different names"),
    ],
)
def test_unusable_attacks(change: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Comparison(
            **{"name": "a", "edited": np.zeros(8), "original": np.ones(8), "control": np.zeros(8)} | change
        )


def test_names_are_unique() -> None:
    scores = Comparison("a", np.zeros(8), np.ones(8), np.zeros(8))
    with pytest.raises(InputError, match="every name once"):
        leaks([scores, scores])
    with pytest.raises(InputError, match="at least one"):
        leaks([])


@pytest.mark.usefixtures("no_permutations")
def test_floors_hold_for_the_whole_battery() -> None:
    """Ten attacks, each with a true leak of 0.1: any floor above it is a false alarm."""
    rng, together, apart = np.random.default_rng(10), 0, 0
    for _ in range(150):
        battery = []
        for attack in range(10):
            edited, original, control = audit("normal", 0.1, rng, n=32)
            battery.append(Comparison(str(attack), edited, original, control, paired=True))
        found = leaks(battery)
        together += max(x.floor for x in found) > 0.1
        apart += max(x.least for x in found) > 0.1
    assert together / 150 <= 0.05 + margin_of_error(0.05, 150)
    assert apart / 150 > 0.25  # bounds that hold one at a time do cry wolf


def test_the_worst_attack() -> None:
    rng = np.random.default_rng(11)
    battery = [
        Comparison(name, *audit("normal", true, rng, n=100), paired=True)
        for name, true in {"weak": 0.0, "strong": 0.5, "middling": 0.2}.items()
    ]
    top = worst(leaks(battery))
    assert top is not None
    assert top.name == "strong"
    assert top.low < 0.5 < top.high
    assert worst([leak(np.zeros(8), np.zeros(8), np.zeros(8))]) is None


# ---- absence and power ----


@pytest.mark.parametrize("leaking", [0, 1, 2, 4])
def test_bound_on_few_leaking_facts_is_that_of_the_binomial(leaking: int) -> None:
    """Facts that leak fully or not at all: the exact bound of Clopper and Pearson, not the bootstrap's zero width."""
    edited = np.array([1.0] * leaking + [0.0] * (64 - leaking))
    found = leak(edited, np.zeros(64), np.ones(64), paired=True)
    exact = stats.beta.ppf(0.95, leaking + 1, 64 - leaking)
    assert found.most == pytest.approx(exact, rel=0.15)
    if leaking == 0:
        assert found.high == 0  # what the plain bootstrap believes


def test_few_facts_never_prove_absence() -> None:
    assert not leak(np.zeros(16), np.zeros(16), np.ones(16), paired=True).absent()
    assert leak(np.zeros(64), np.zeros(64), np.ones(64), paired=True).absent()


@pytest.mark.usefixtures("no_permutations")
@pytest.mark.parametrize(("kind", "n"), [("normal", 64), ("skewed", 200), ("mixture", 64), ("binary", 200)])
def test_absence_is_claimed_wrongly_in_5_percent(kind: str, n: int) -> None:
    found = leaks(many(kind, 0.1, REPEATS, n=n, seed=12))
    assert np.mean([x.absent(0.1) for x in found]) <= 0.05 + margin_of_error(0.05, REPEATS)


@pytest.mark.usefixtures("no_permutations")
def test_absence_by_a_high_p_value_would_be_wrong() -> None:
    """What "no significant leak" concludes about 16 facts with a true leak of 0.1."""
    found = leaks(many("normal", 0.1, 200, n=16, seed=13))
    assert np.mean([x.least <= 0 for x in found]) > 0.3
    assert not any(x.absent(0.1) for x in found)


@pytest.mark.parametrize(("facts", "margin"), [(321, 0.10), (143, 0.15), (80, 0.20)])
def test_textbook_power(facts: int, margin: float) -> None:
    """Two arms of answers at chance 0.25, 80 % power."""
    se = math.sqrt(2 * 0.25 * 0.75 / facts)
    assert tost_power(se, margin) == pytest.approx(0.80, abs=0.005)


@pytest.mark.usefixtures("no_permutations")
@pytest.mark.parametrize("n", [64, 100, 160])
def test_power_is_as_printed(n: int) -> None:
    found = leaks(many("normal", 0.0, REPEATS, n=n, seed=14))
    printed = float(np.mean([x.power(0.1) for x in found]))
    measured = float(np.mean([x.absent(0.1) for x in found]))
    assert measured == pytest.approx(printed, abs=0.03 + margin_of_error(printed, REPEATS) / 2)


def test_facts_needed_is_the_fewest() -> None:
    n = facts_needed(0.3)
    assert tost_power(0.3 / math.sqrt(n), facts=n) >= 0.8 > tost_power(0.3 / math.sqrt(n - 1), facts=n - 1)


@pytest.mark.parametrize("n", [16, 64, 200])
def test_detectable_leak_has_the_power_of_a_t_test(n: int) -> None:
    effect = detectable(1 / math.sqrt(n), n) * math.sqrt(n)
    power = stats.nct.sf(stats.t.ppf(0.95, n - 1), n - 1, effect)
    assert power == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    "call", [lambda: tost_power(0), lambda: facts_needed(1, power=1), lambda: detectable(-1, 9)]
)
def test_unusable_numbers(call) -> None:
    with pytest.raises(InputError):
        call()
