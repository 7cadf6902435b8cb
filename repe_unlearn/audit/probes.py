"""Probes: what can still be read off activations, with intervals and a chance band."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repe_unlearn.activations import Rows
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, MissingDependencyError, NotEnoughDataError
from repe_unlearn.sites import Site

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of a set of rows, and which rows belong together.

    Attributes:
        z: ``[m]`` class ids.
        cluster: ``[m]`` number of the pair (the unit of statistics).
        fold: ``[m]`` 0 or 1; content never crosses folds.
        unit: ``[m]`` number of what was labelled as a whole: the prompt, or the row itself for labels per token.
    """

    z: np.ndarray
    cluster: np.ndarray
    fold: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(cls, rows: Rows, contrast: Contrast, seed: int = 0) -> Labels:
        """Return the labels of rows that were gathered from a contrast; whole content groups go to one fold.

        Raises:
            InputError: the contrast has real-valued labels.
            NotEnoughDataError: fewer than two content groups, or a fold with one class.
        """
        if contrast.kind == "reals":
            raise InputError("probes need class labels; this contrast has real-valued ones.")
        owner = rows.owner.numpy()
        groups, pairs = np.array(contrast.groups), np.array(contrast.pairs)
        names = sorted(set(groups))
        if len(names) < 2:
            raise NotEnoughDataError(
                f"all {len(contrast)} held-out prompts share one content group; needed at least two."
            )
        np.random.default_rng(seed).shuffle(names)
        first = set(names[::2])
        z, fold = rows.z.numpy().astype(int), np.array([int(g in first) for g in groups])[owner]
        for side in (0, 1):
            if len(set(z[fold == side])) < 2:
                raise NotEnoughDataError(
                    "a fold of the held-out prompts has one class only; use more held-out content groups."
                )
        _, cluster = np.unique(pairs[owner], return_inverse=True)
        unit = np.arange(len(z)) if contrast.kind == "tokens" else np.unique(owner, return_inverse=True)[1]
        return cls(z, cluster, fold, unit)

    @property
    def chance(self) -> float:
        """Accuracy of always naming the most frequent class."""
        return float(np.bincount(self.z).max() / len(self.z))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy over test rows with a 95 % interval from a bootstrap over pairs."""

    value: float
    low: float
    high: float


def linear(train_x: Tensor, train_z: np.ndarray, test_x: Tensor) -> np.ndarray:
    """Return the predictions of an L2-regularised logistic regression (C = 0.01 on standardised features).

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("probes need scikit-learn: pip install 'repe-unlearn[verify]'") from None
    return _standardised(LogisticRegression(C=0.01, max_iter=300), train_x, train_z, test_x)


def _kernel(train_x: Tensor, train_z: np.ndarray, test_x: Tensor) -> np.ndarray:
    from sklearn.svm import SVC

    return _standardised(SVC(), train_x, train_z, test_x)


def _standardised(probe: Any, train_x: Tensor, train_z: np.ndarray, test_x: Tensor) -> np.ndarray:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x.numpy())
    return probe.fit(scaler.transform(train_x.numpy()), train_z).predict(scaler.transform(test_x.numpy()))


def transferred(fit: Mapping[Site, Rows], heldout: Mapping[Site, Rows]) -> dict[Site, np.ndarray]:
    """Return, for every site, predictions on held-out rows of a linear probe trained on the fitting rows."""
    return {site: linear(rows.x, rows.z.numpy(), heldout[site].x) for site, rows in fit.items()}


def refit(
    heldout: Mapping[Site, Rows], labels: Labels, *, shuffle: int | None = None
) -> dict[Site, np.ndarray]:
    """Return cross-fitted predictions of a linear probe that is trained and tested on held-out rows only.

    Each half of the content is predicted by a probe trained on the other half. With ``shuffle`` (a seed) the training
    labels are permuted within pairs, unrelated to the true ones: the control that must come out at chance.
    """
    z = labels.z if shuffle is None else unrelated(labels, np.random.default_rng(shuffle))
    return {site: _crossfitted(linear, rows.x, z, labels.fold) for site, rows in heldout.items()}


def rbf(heldout: Mapping[Site, Rows], labels: Labels) -> dict[Site, np.ndarray]:
    """Return cross-fitted predictions of a support vector machine with a Gaussian kernel (C = 1, standardised features)."""
    return {site: _crossfitted(_kernel, rows.x, labels.z, labels.fold) for site, rows in heldout.items()}


def _crossfitted(
    predict: Callable[[Tensor, np.ndarray, Tensor], np.ndarray], x: Tensor, z: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Return predictions of each fold by what was trained on the other."""
    out = np.empty(len(z), dtype=int)
    for side in (0, 1):
        out[fold == side] = predict(x[fold != side], z[fold != side], x[fold == side])
    return out


def mlp(
    heldout: Mapping[Site, Rows], labels: Labels, *, seed: int = 0, steps: int = 100, hidden: int = 32
) -> dict[Site, np.ndarray]:
    """Return cross-fitted predictions of a one-hidden-layer ReLU network per site, sites of a width side by side.

    Adam with step size 5e-3 and decoupled weight decay 0.01 on standardised features, full batches.
    """
    widths: dict[int, list[Site]] = {}
    for site, rows in heldout.items():
        widths.setdefault(rows.x.shape[1], []).append(site)
    found: dict[Site, np.ndarray] = {}
    for sites in widths.values():
        x = torch.stack([heldout[site].x.float() for site in sites])
        out = np.empty((len(sites), len(labels.z)), dtype=int)
        for side in (0, 1):
            train, test = torch.from_numpy(labels.fold != side), torch.from_numpy(labels.fold == side)
            mean = x[:, train].mean(1, keepdim=True)
            std = x[:, train].std(1, keepdim=True).clamp_min(1e-6 * x[:, train].abs().amax())
            logits = train_mlp(
                (x[:, train] - mean) / std,
                torch.from_numpy(labels.z)[train],
                (x[:, test] - mean) / std,
                seed,
                steps=steps,
                hidden=hidden,
            )
            out[:, test.numpy()] = logits.argmax(-1).numpy()
        found |= dict(zip(sites, out, strict=True))
    return {site: found[site] for site in heldout}


def train_mlp(
    x: Tensor,
    z: Tensor,
    test: Tensor,
    seed: int,
    *,
    steps: int = 100,
    hidden: int = 32,
    classes: int | None = None,
) -> Tensor:
    """Return logits ``[sites, m, classes]`` for ``test`` of networks trained on ``x`` ``[sites, n, d]``; see ``mlp``."""
    sites, n, d = x.shape
    classes = int(z.max()) + 1 if classes is None else classes
    generator = torch.Generator().manual_seed(seed)

    def layer(rows: int, columns: int) -> Tensor:
        # The same start for every site, so that differences between sites come from the activations alone.
        one = torch.randn(rows, columns, generator=generator) / rows**0.5
        return one.expand(sites, rows, columns).clone().requires_grad_()

    w1, w2 = layer(d, hidden), layer(hidden, classes)
    b1, b2 = (
        torch.zeros(sites, 1, hidden, requires_grad=True),
        torch.zeros(sites, 1, classes, requires_grad=True),
    )
    optimizer = torch.optim.AdamW([w1, b1, w2, b2], lr=5e-3, weight_decay=0.01)
    target = z.expand(sites, n).reshape(-1)
    with torch.enable_grad():
        for _ in range(steps):
            logits = torch.baddbmm(b2, torch.baddbmm(b1, x, w1).relu(), w2)
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, classes), target, reduction="sum") / n
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return torch.baddbmm(b2, torch.baddbmm(b1, test, w1).relu(), w2)


def accuracy(prediction: np.ndarray, labels: Labels, seed: int = 0) -> Accuracy:
    """Return the accuracy with a percentile bootstrap over pairs (1000 resamples, fixed seed)."""
    correct = prediction == labels.z
    hits = np.bincount(labels.cluster, weights=correct)
    sizes = np.bincount(labels.cluster)
    picks = np.random.default_rng(seed).multinomial(
        len(hits), np.full(len(hits), 1 / len(hits)), size=RESAMPLES
    )
    low, high = np.quantile((picks @ hits) / (picks @ sizes), [0.025, 0.975])
    value = float(correct.mean())
    return Accuracy(value, min(float(low), value), max(float(high), value))


def permuted(labels: Labels, rng: np.random.Generator) -> np.ndarray:
    """Return the labels permuted within pairs, and over all prompts whose pair shows one class only.

    Rows of one prompt keep a common label: they are not independent, and a band that took them so would be too narrow.
    """
    _, first = np.unique(labels.unit, return_index=True)
    z, cluster = labels.z[first], labels.cluster[first]
    stratum = np.where(_mixed(z, cluster), cluster, -1)
    result = np.empty_like(z)
    result[np.argsort(stratum, kind="stable")] = z[np.lexsort((rng.random(len(z)), stratum))]
    return result[labels.unit]


def _mixed(z: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """True where the pair of a prompt shows several classes."""
    low, high = np.full(cluster.max() + 1, z.max()), np.full(cluster.max() + 1, z.min())
    np.minimum.at(low, cluster, z)
    np.maximum.at(high, cluster, z)
    return (low < high)[cluster]


def unrelated(labels: Labels, rng: np.random.Generator, draws: int = 100) -> np.ndarray:
    """Return, fold by fold, the one of many permutations (see ``permuted``) that tells least about the true labels.

    A single permutation agrees with the truth by luck: of 50 pairs it swaps 25 give or take 4. Where the concept is
    plain to see a probe learns that excess (or its opposite) and lands anywhere between 0.2 and 0.8.
    """
    best, result = [np.inf, np.inf], labels.z.copy()
    for _ in range(draws):
        z = permuted(labels, rng)
        for side in (0, 1):
            here = labels.fold == side
            excess = _dependence(labels.z[here], z[here])
            if excess < best[side]:
                best[side], result[here] = excess, z[here]
    return result


def _dependence(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest deviation of the joint counts of two labelings from independence."""
    classes = int(max(a.max(), b.max())) + 1
    joint = np.bincount(a * classes + b, minlength=classes * classes).reshape(classes, classes)
    return float(np.abs(joint - np.outer(joint.sum(1), joint.sum(0)) / len(a)).max())


def chance_band(predictions: Sequence[np.ndarray], labels: Labels, seed: int = 0) -> tuple[float, float]:
    """Return (pointwise, simultaneous) 95 % half-widths around chance for the accuracies of several sites.

    Labels are permuted within pairs; the simultaneous width is the 95 % quantile over permutations of the largest
    deviation over all sites, so with no information anywhere one run in twenty has any site outside it.
    """
    rng = np.random.default_rng(seed)
    stacked = np.stack(predictions)
    deviations = np.empty((RESAMPLES, len(stacked)))
    for i in range(RESAMPLES):
        deviations[i] = (stacked == permuted(labels, rng)).mean(1)
    deviations = np.abs(deviations - deviations.mean(0))
    return float(np.median(np.quantile(deviations, 0.95, axis=0))), float(
        np.quantile(deviations.max(1), 0.95)
    )


def mean_gap(rows: Rows, labels: Labels) -> float:
    """Return the largest distance between two class means (Euclidean norm, in the activations' own unit)."""
    means = _class_means(rows.x.double(), labels.z)
    return float(torch.cdist(means, means).max())


def gap_interval(rows: Rows, labels: Labels, seed: int = 0, resamples: int = 200) -> tuple[float, float]:
    """Return (floor, high): the gap's mean under permuted labels, and its 97.5 % bootstrap quantile over pairs.

    A gap is never negative, so noise alone makes it positive: the floor says how large it is when labels mean nothing.
    """
    rng = np.random.default_rng(seed)
    x = rows.x.double()
    floor = [
        float(torch.cdist(m, m).max())
        for m in (_class_means(x, permuted(labels, rng)) for _ in range(max(20, resamples // 10)))
    ]
    classes = int(labels.z.max()) + 1
    onehot = np.eye(classes)[labels.z]
    pairs = int(labels.cluster.max()) + 1
    picks = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
    weights = torch.from_numpy(picks[:, labels.cluster]).double()
    means = []
    for c in range(classes):
        member = torch.from_numpy(onehot[:, c])
        w = weights * member
        means.append((w @ x) / w.sum(1, keepdim=True).clamp_min(1))
    stacked = torch.stack(means, 1)
    high = torch.cdist(stacked, stacked).flatten(1).amax(1)
    return float(np.mean(floor)), float(torch.quantile(high, 0.975))


def _class_means(x: Tensor, z: np.ndarray) -> Tensor:
    onehot = torch.nn.functional.one_hot(torch.from_numpy(np.asarray(z)).long()).double()
    return (onehot.T @ x) / onehot.sum(0)[:, None].clamp_min(1)
