from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditkit import direction, numbered, planted
from textkit import text_model, text_tokenizer

from repe_unlearn.activations import Rows, gather
from repe_unlearn.architectures import Architecture
from repe_unlearn.audit import probes
from repe_unlearn.audit.probes import Labels
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, MissingDependencyError, NotEnoughDataError
from repe_unlearn.moments import Moments
from repe_unlearn.sites import Site
from repe_unlearn.solvers import leace

HERE, THERE = Site("here"), Site("there")


def right(prediction: np.ndarray, labels: Labels) -> float:
    return float((prediction == labels.z).mean())


def erased(rows: Rows) -> Rows:
    """The rows after a LEACE that was fit on these very rows."""
    return replace(rows, x=leace(Moments.of(rows.x, rows.z))(rows.x))


def exclusive_or(n: int = 600) -> tuple[Contrast, Rows]:
    """The class is whether two coordinates differ in sign: no class mean differs, yet nothing is hidden."""
    contrast = numbered(n)
    generator = torch.Generator().manual_seed(1)
    z = torch.tensor(contrast.labels)
    sign = torch.where(torch.rand(2 * n, generator=generator) < 0.5, -1.0, 1.0)
    x = 0.3 * torch.randn(2 * n, 6, generator=generator)
    x[:, 0] += sign
    x[:, 1] += torch.where(z == 1, -sign, sign)
    return contrast, Rows(x, z, torch.arange(2 * n))


# Probes


def test_a_linear_concept_is_found_before_and_not_after_leace() -> None:
    contrast, rows = planted()
    labels = Labels.of(rows, contrast)
    before, after = {HERE: rows, THERE: erased(rows)}, {HERE: erased(rows)}
    found = probes.refit(before, labels)
    assert right(found[HERE], labels) >= 0.98
    assert right(found[THERE], labels) <= 0.6
    fresh = planted(seed=5)[1]
    assert right(probes.transferred({HERE: rows}, {HERE: fresh})[HERE], labels) >= 0.98
    held = replace(fresh, x=leace(Moments.of(rows.x, rows.z))(fresh.x))
    assert right(probes.transferred(after, {HERE: held})[HERE], labels) == pytest.approx(0.5, abs=0.1)


def test_linear_guardedness_is_not_removal() -> None:
    contrast, rows = exclusive_or()
    labels = Labels.of(rows, contrast)
    guarded = erased(rows)
    assert right(probes.refit({HERE: rows}, labels)[HERE], labels) <= 0.58
    assert right(probes.refit({HERE: guarded}, labels)[HERE], labels) <= 0.58
    network = probes.mlp({HERE: rows, THERE: guarded}, labels)
    assert right(network[HERE], labels) >= 0.9
    assert right(network[THERE], labels) >= 0.9
    noise = replace(rows, x=torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(3)))
    assert (
        right(probes.mlp({HERE: noise}, labels)[HERE], labels) <= 0.57
    )  # control: it finds nothing in noise


def test_each_network_is_trained_for_itself() -> None:
    contrast, rows = planted(60)
    labels = Labels.of(rows, contrast)
    other = replace(rows, x=100 * rows.x.flip(1) + 7)
    together = probes.mlp({HERE: rows, THERE: other}, labels, steps=20)
    alone = probes.mlp({HERE: rows}, labels, steps=20)
    assert np.array_equal(together[HERE], alone[HERE])


def test_no_probe_is_tested_on_what_it_was_trained_on() -> None:
    contrast, rows = planted(60, d=400, strength=0.0)
    labels = Labels.of(rows, contrast)
    assert (
        right(probes.linear(rows.x, labels.z, rows.x), labels) >= 0.9
    )  # control: noise can be learned by heart
    assert right(probes.refit({HERE: rows}, labels)[HERE], labels) <= 0.62
    assert right(probes.mlp({HERE: rows}, labels)[HERE], labels) <= 0.62


@pytest.mark.parametrize("strength", [0.0, 2.0, 8.0])
def test_shuffled_labels_come_out_at_chance_however_plain_the_concept_is(strength: float) -> None:
    contrast, rows = planted(100, strength=strength)
    labels = Labels.of(rows, contrast)
    found = [right(probes.refit({HERE: rows}, labels, shuffle=s)[HERE], labels) for s in range(8)]
    assert max(abs(a - 0.5) for a in found) <= 0.15
    assert len({*found}) > 1  # the seed matters
    if strength == 8.0:
        assert right(probes.refit({HERE: rows}, labels)[HERE], labels) >= 0.98
        # control: one plain permutation agrees with the truth by luck, and a probe learns that
        naive = []
        for seed in range(8):
            z = probes.permuted(labels, np.random.default_rng(seed))
            wrong = replace(labels, z=z)
            naive.append(right(probes.refit({HERE: rows}, wrong)[HERE], labels))
        assert max(abs(a - 0.5) for a in naive) > 0.15


def test_more_than_two_classes() -> None:
    z = torch.arange(300) % 3
    contrast = Contrast.from_labels(
        [f"text {i}" for i in range(300)],
        [f"class {int(k)}" for k in z],
        groups=[f"g{i // 3 % 20}" for i in range(300)],
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 10, generator=generator) + 5 * torch.eye(10)[z]
    rows = Rows(x, z, torch.arange(300))
    labels = Labels.of(rows, contrast)
    assert labels.chance == pytest.approx(1 / 3)
    guarded = replace(rows, x=leace(Moments.of(x, z, classes=3))(x))
    for probe in (probes.refit, probes.mlp):
        assert right(probe({HERE: rows}, labels)[HERE], labels) >= 0.98
    assert right(probes.refit({HERE: guarded}, labels)[HERE], labels) <= 0.43
    assert right(probes.refit({HERE: rows}, labels, shuffle=0)[HERE], labels) == pytest.approx(
        1 / 3, abs=0.12
    )
    means = torch.stack([x[z == k].double().mean(0) for k in range(3)])
    assert probes.mean_gap(rows, labels) == pytest.approx(float(torch.cdist(means, means).max()))
    assert probes.mean_gap(guarded, labels) <= 1e-4


def test_labels_per_token() -> None:
    words = [("Ann", "N"), ("sees", "V"), ("Bob", "N"), ("runs", "V"), ("red", None)]
    sentences = []
    for i in range(24):
        chosen = [words[(i + j) % 5] for j in range(4)]
        sentences.append(([str(i), *(w for w, _ in chosen)], [None, *(t for _, t in chosen)]))
    contrast = Contrast.from_tokens(sentences, groups=[f"g{i % 6}" for i in range(24)])
    model = text_model("llama", dtype=torch.float32)
    (site,) = Architecture.of(model).sites("attn_in", layers=[0])
    rows = gather(model, text_tokenizer(), contrast, [site], select="words", progress=False)[site]
    labels = Labels.of(rows, contrast)
    assert len(labels.z) == sum(t is not None for _, tags in sentences for t in tags)
    assert len({*labels.unit}) == len(labels.z)  # each word is labelled on its own
    assert len({*labels.cluster}) == 24
    assert right(probes.refit({site: rows}, labels)[site], labels) >= 0.9  # the word itself is there to see
    shuffled = probes.permuted(labels, np.random.default_rng(0))
    for sentence in range(24):
        mine = labels.cluster == sentence
        assert sorted(shuffled[mine]) == sorted(labels.z[mine])
    assert (shuffled != labels.z).any()


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    contrast, rows = planted(20)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'repe-unlearn\[verify\]'"):
        probes.refit({HERE: rows}, Labels.of(rows, contrast))


# Labels and folds


@pytest.mark.parametrize("seed", range(5))
def test_folds_never_split_a_content_group(seed: int) -> None:
    contrast, rows = planted(90)
    labels = Labels.of(rows, contrast, seed)
    groups = np.array(contrast.groups)
    for name in {*contrast.groups}:
        assert len({*labels.fold[groups == name]}) == 1
    assert {*labels.fold} == {0, 1}
    other = Labels.of(rows, contrast, seed + 100)
    assert (labels.fold != other.fold).any()  # the seed divides anew


def test_labels_that_no_probe_can_use() -> None:
    contrast, rows = planted(20)
    reals = Contrast.from_reals(contrast.texts, [float(i) for i in range(40)])
    with pytest.raises(InputError, match=r"class labels.*real-valued"):
        Labels.of(rows, reals)
    one = numbered(20, groups=1)
    with pytest.raises(NotEnoughDataError, match="40 held-out prompts share one content group"):
        Labels.of(rows, one)
    lopsided = Contrast.from_labels(
        [f"t{i}" for i in range(40)],
        ["ab"[i >= 20] for i in range(40)],
        groups=["first" if i < 20 else "second" for i in range(40)],
    )
    with pytest.raises(NotEnoughDataError, match="one class only"):
        Labels.of(replace(rows, z=(torch.arange(40) >= 20).long()), lopsided)


def test_chance_is_the_most_frequent_class() -> None:
    def labels(z: list[int]) -> Labels:
        n = np.arange(len(z))
        return Labels(np.array(z), n, n % 2, n)

    assert labels([0, 0, 0, 1]).chance == 0.75
    assert labels([0, 1, 0, 1]).chance == 0.5


# Permutations


def test_labels_are_permuted_within_pairs_only() -> None:
    contrast, rows = planted(50)
    labels = Labels.of(rows, contrast)
    rng = np.random.default_rng(0)
    swapped = np.zeros(50)
    for _ in range(200):
        z = probes.permuted(labels, rng)
        assert (np.sort(z.reshape(50, 2), axis=1) == [0, 1]).all()
        swapped += z.reshape(50, 2)[:, 0]
    assert swapped.min() >= 60
    assert swapped.max() <= 140  # each pair is swapped about every second time


def test_prompts_without_a_partner_are_permuted_among_themselves() -> None:
    z = np.array([0, 1] * 10 + [0] * 10 + [1] * 10)
    cluster = np.array([i // 2 for i in range(20)] + list(range(10, 30)))
    labels = Labels(z, cluster, np.arange(40) % 2, np.arange(40))
    rng = np.random.default_rng(0)
    for _ in range(20):
        new = probes.permuted(labels, rng)
        assert (np.sort(new[:20].reshape(10, 2), axis=1) == [0, 1]).all()
        assert new[20:].sum() == 10
        assert (new[20:] != z[20:]).any()


def test_rows_of_one_prompt_keep_a_common_label() -> None:
    owner = torch.arange(40).repeat_interleave(5)
    contrast, _ = planted(20)
    z = torch.tensor(contrast.labels)[owner]
    labels = Labels.of(Rows(torch.zeros(200, 1), z, owner), contrast)
    for seed in range(10):
        new = probes.permuted(labels, np.random.default_rng(seed)).reshape(40, 5)
        assert (new == new[:, :1]).all()


def test_unrelated_labels_tell_nothing_in_either_fold() -> None:
    contrast, rows = planted(64)
    labels = Labels.of(rows, contrast)
    z = probes.unrelated(labels, np.random.default_rng(0))
    assert (np.sort(z.reshape(64, 2), axis=1) == [0, 1]).all()
    for side in (0, 1):
        here = labels.fold == side
        assert abs((z == labels.z)[here].mean() - 0.5) <= 0.02


# Intervals and bands


def coverage(*, sites: int, per_prompt: int = 1, runs: int = 100) -> tuple[float, float]:
    """Return how often a run without information falls outside the (pointwise, simultaneous) band."""
    owner = torch.arange(120).repeat_interleave(per_prompt)
    contrast, _ = planted(60)
    labels = Labels.of(
        Rows(torch.zeros(len(owner), 1), torch.tensor(contrast.labels)[owner], owner), contrast
    )
    outside = np.zeros(2)
    for seed in range(runs):
        guesses = np.random.default_rng(seed).integers(0, 2, (sites, 120))[:, owner.numpy()]
        far = max(abs(right(guess, labels) - 0.5) for guess in guesses)
        outside += [far > band for band in probes.chance_band(list(guesses), labels, seed)]
    return float(outside[0]) / runs, float(outside[1]) / runs


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "RESAMPLES", 300)


def test_the_simultaneous_band_holds_its_level_over_many_sites() -> None:
    pointwise, simultaneous = coverage(sites=8)
    assert simultaneous <= 0.10
    assert pointwise >= 0.15  # control: eight looks at a 5 % band are not one


def test_the_band_counts_prompts_and_not_their_tokens() -> None:
    assert coverage(sites=1, per_prompt=6)[1] <= 0.10


def test_the_band_detects_what_is_left() -> None:
    contrast, rows = planted(60)
    labels = Labels.of(rows, contrast)
    guess = np.random.default_rng(0).integers(0, 2, 120)
    weak = np.where(np.random.default_rng(1).random(120) < 0.5, labels.z, guess)  # right three times in four
    _, simultaneous = probes.chance_band([weak, guess], labels)
    assert abs(right(weak, labels) - 0.5) > simultaneous > abs(right(guess, labels) - 0.5)


def test_the_interval_covers_the_true_accuracy() -> None:
    contrast, rows = planted(80)
    labels = Labels.of(rows, contrast)
    covered = 0
    for seed in range(100):
        hit = np.repeat(np.random.default_rng(seed).random(80) < 0.7, 2)  # both members of a pair, or none
        a = probes.accuracy(np.where(hit, labels.z, 1 - labels.z), labels, seed)
        assert a.low <= a.value <= a.high
        covered += a.low <= 0.7 <= a.high
    assert covered >= 88
    exact = probes.accuracy(labels.z, labels)
    assert (exact.low, exact.value, exact.high) == (1.0, 1.0, 1.0)


def test_saying_everything_twice_does_not_narrow_the_interval() -> None:
    contrast, rows = planted(40)
    labels = Labels.of(rows, contrast)
    prediction = np.where(np.random.default_rng(0).random(80) < 0.7, labels.z, 1 - labels.z)
    double = Labels(*(np.repeat(getattr(labels, name), 2) for name in ("z", "cluster", "fold", "unit")))
    once, twice = (
        probes.accuracy(prediction, labels),
        probes.accuracy(np.repeat(prediction, 2), double),
    )
    assert (once.low, once.value, once.high) == (twice.low, twice.value, twice.high)
    naive = probes.accuracy(np.repeat(prediction, 2), replace(double, cluster=np.arange(160)))
    assert naive.high - naive.low < 0.85 * (once.high - once.low)  # control: copies taken for new evidence


def test_the_gap_has_a_floor_and_an_upper_end() -> None:
    contrast, rows = planted(100, strength=6.0)
    labels = Labels.of(rows, contrast)
    gap = probes.mean_gap(rows, labels)
    floor, high = probes.gap_interval(rows, labels)
    assert gap == pytest.approx(6.0, abs=0.3)
    assert gap < high < 6.6
    assert floor < 0.25 * gap  # labels that mean nothing leave a small gap, never none
    null = replace(rows, x=rows.x - 6.0 * rows.z[:, None] * direction(rows.x.shape[1]))
    floor, high = probes.gap_interval(null, labels)
    assert floor > 0
    assert 0.4 * floor < probes.mean_gap(null, labels) < high
    assert probes.mean_gap(null, labels) < 2 * floor
