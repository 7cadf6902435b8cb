"""Diagnostics: what an eraser does to rows that it has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .eraser import Eraser
from .errors import InputError, NotEnoughDataError, NumericalWarning, ShapeError
from .moments import Moments
from .solvers.linalg import correlation_factor, scales

_RESAMPLES = 1000
_OUTLIER = 100.0
_MOST = 0.5
_BLOCK = 4_000_000  # numbers per block of permuted labels: 32 MB
_CONSTANT = 1e-26  # (450 eps)²: a variance of this share of the mean square is rounding


@dataclass(frozen=True, slots=True)
class Leak:
    """How well a linear reader that was fit on one half of the clusters reads the concept in the other half.

    Attributes:
        correlation: cross-fitted first canonical correlation, -1 to 1, mean of both halves. Around 0 when
            nothing is left; negative values are chance too.
        low: 2.5 % quantile of a bootstrap over clusters (the reader is kept fixed).
        high: 97.5 % quantile.
        p_value: share of label permutations with at least this correlation, (1 + count) / (1 + draws).
    """

    correlation: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.correlation:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p_value:.3g}"


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis:
    """Numbers of one eraser on one set of rows; prints as a small table.

    Attributes:
        n: number of rows.
        clusters: number of clusters.
        d: width of x.
        rank: of the eraser.
        effective_rank: exponential of the entropy of the spectrum of Σxx (1 to d; depends on the units of x).
        energy: E‖r(x) - x‖² / E‖x - mean‖², the share of the variance that is moved (0 and up).
        outlier: standard deviation of the widest coordinate over that of the median one.
        before: the leak in x, the control: without one there is nothing to erase, or too few rows to see it.
        after: the leak in the erased x.
        warnings: what was also given as ``NumericalWarning``.
    """

    n: int
    clusters: int
    d: int
    rank: int
    effective_rank: float
    energy: float
    outlier: float
    before: Leak
    after: Leak
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [
            f"Diagnosis of an eraser of rank {self.rank} on {self.n} rows, {self.clusters} clusters, d = {self.d}",
            f"  correlation before   {self.before}",
            f"  correlation after    {self.after}",
            f"  variance moved       {100 * self.energy:.3g} %",
            f"  effective rank       {self.effective_rank:.1f} of {self.d}",
            f"  widest coordinate    {self.outlier:.3g} x the median one",
        ]
        return "\n".join(lines + [f"  warning: {text}" for text in self.warnings])


def diagnose(
    eraser: Eraser,
    x: Tensor | np.ndarray,
    z: Tensor | np.ndarray,
    *,
    clusters: Tensor | np.ndarray | Sequence[object] | None = None,
    seed: int = 0,
    permutations: int = 199,
) -> Diagnosis:
    """Return what is left of a concept in rows that the eraser was not fit on, with the same measure before.

    The residual correlation is honest for any n and d: the reader (the first canonical pair of x and z, on a
    shrunk correlation matrix) is fit on one half of the clusters and measured on the other, both ways. Without
    a concept it is around 0, while the canonical correlation of one sample is 1 as soon as n <= d. The p-value
    is exact at any sample size if clusters are exchangeable given the labels that are permuted: labels are
    shuffled inside clusters that show several (minimal pairs), and between clusters that show one (tokens of one
    prompt). On the rows that the eraser *was* fit on the correlation after is biased below 0: pass others.

    The test sees first canonical directions only and nothing non-linear; a large p-value is no proof of absence.

    Args:
        eraser: of width d.
        x: ``[n, d]`` activations, floating point.
        z: ``[n]`` class ids or reals, or ``[n, k]`` columns, as in ``Moments.of``.
        clusters: ``[n]`` which rows depend on each other (prompt, pair, document); default every row alone.
        seed: of the halves, the permutations and the bootstrap; the same seed gives the same result.
        permutations: draws for the p-value, >= 1; the smallest possible p-value is 1 / (1 + draws).

    Returns:
        Diagnosis. Its warnings are also given as ``NumericalWarning``: an eraser of rank 0, one that moves more
        than half of the variance, a coordinate more than 100 times the median one, n < 2 d.

    Raises:
        ShapeError: shapes that do not fit together.
        NonFiniteError: NaN or infinity.
        NotEnoughDataError: fewer than 4 clusters, or a half in which z is constant.
        InputError: permutations below 1.

    Reference:
        Effective rank: Roy, Vetterli: The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
        p-value: Phipson, Smyth: Permutation p-values should never be zero, 2010, arXiv 1603.05766.

    Example:
        >>> from repe_unlearn.solvers import leace
        >>> _ = torch.manual_seed(0)
        >>> z = torch.arange(2000) % 2
        >>> x = torch.randn(2000, 6) + z[:, None]
        >>> found = diagnose(leace(Moments.of(x[:1000], z[:1000])), x[1000:], z[1000:])
        >>> found.before.correlation > 0.7, found.after.low < 0.1, found.before.p_value
        (True, True, 0.005)
    """
    if permutations < 1:
        raise InputError(f"got permutations={permutations}; needed at least 1, usually 199 or more.")
    rows, labels = _tensor(x, "x"), _tensor(z, "z")
    if rows.ndim != 2 or rows.shape[1] != eraser.dim:
        raise ShapeError(f"got x {tuple(rows.shape)}; needed [n, d] with d = {eraser.dim}, as the eraser.")
    m = Moments.of(rows, labels)  # checks everything else about x and z
    erased = eraser(rows).to(rows.device, torch.float64)
    rows = rows.to(torch.float64)
    level, values = _levels(labels, m.k)
    cluster = _numbered(clusters, len(rows))
    halves = _halves(cluster, level, np.random.default_rng([seed, 0]))
    for half in halves:
        if len(np.unique(level[half])) < 2:
            raise NotEnoughDataError(
                f"z is constant over one half of the {cluster.max() + 1} clusters; needed at least two clusters "
                "with each of at least two labels (or clusters with several labels)."
            )
    leaks = [_leak(t, level, values, cluster, halves, seed, permutations) for t in (rows, erased)]
    centred = rows - m.mean_x
    total = float(centred.square().sum())
    energy = float((erased - rows).square().sum()) / total if total else 0.0
    std = m.cov_xx.diagonal().sqrt()
    median = float(std[std > 0].median()) if bool((std > 0).any()) else 1.0
    outlier = float(std.max()) / median
    found = _warnings(eraser, len(rows), energy, outlier, int(std.argmax()))
    for text in found:
        warnings.warn(text, NumericalWarning, stacklevel=2)
    return Diagnosis(
        n=len(rows),
        clusters=int(cluster.max()) + 1,
        d=eraser.dim,
        rank=eraser.rank,
        effective_rank=_effective_rank(centred),
        energy=energy,
        outlier=outlier,
        before=leaks[0],
        after=leaks[1],
        warnings=found,
    )


def _tensor(value: Tensor | np.ndarray, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise ShapeError(
            f"got {name} of dtype {array.dtype}; needed numbers. Of labels in words take the ids, "
            "numpy.unique(z, return_inverse=True)[1]."
        )
    return torch.from_numpy(np.array(array))  # a copy: PyTorch has no read-only tensors and warns about them


def _warnings(eraser: Eraser, n: int, energy: float, outlier: float, widest: int) -> tuple[str, ...]:
    found = []
    if eraser.rank == 0:
        found.append(
            "the eraser has rank 0 and changes nothing: its fitting rows held no linear trace of the concept. "
            "Check labels and tokens, or fit at another site."
        )
    if energy > _MOST:
        found.append(
            f"the eraser moves {100 * energy:.0f} % of the variance: it takes much more than a concept. "
            "Fit with shrinkage='olse' and more rows, and leave out attention sinks and special tokens."
        )
    if outlier > _OUTLIER:
        found.append(
            f"coordinate {widest} is {outlier:.0f} times as wide as the median one, so the shares of variance "
            "here are about that coordinate alone. Leave out attention sinks and special tokens, or divide each "
            "coordinate by its standard deviation."
        )
    if n < 2 * eraser.dim:
        found.append(
            f"{n} rows for d = {eraser.dim}: fewer than 2 d rows hardly determine a covariance, and a concept "
            "can hide from the test. Use more prompts or more tokens of each."
        )
    return tuple(found)


def _effective_rank(centred: Tensor) -> float:
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    gram = centred.T @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.T
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = spectrum.sum()
    return float(torch.special.entr(spectrum / total).sum().exp()) if bool(total > 0) else 0.0


def _levels(z: Tensor, k: int) -> tuple[np.ndarray, Tensor]:
    """Return the number of every row's label [n], in sorted order, and the columns of each label [levels, k]."""
    if z.ndim == 1 and not z.is_floating_point():
        return z.cpu().long().numpy(), torch.eye(k, dtype=torch.float64, device=z.device)
    values, level = torch.unique(z.to(torch.float64).reshape(len(z), k), dim=0, return_inverse=True)
    return level.cpu().numpy(), values


def _numbered(clusters: Tensor | np.ndarray | Sequence[object] | None, n: int) -> np.ndarray:
    if clusters is None:
        number = np.arange(n)
    else:
        names = clusters.detach().cpu().numpy() if isinstance(clusters, Tensor) else np.asarray(clusters)
        if names.shape != (n,):
            raise ShapeError(f"got clusters {names.shape}; needed ({n},), one entry per row.")
        _, number = np.unique(names, return_inverse=True)
    if n == 0 or int(number.max()) < 3:
        raise NotEnoughDataError(
            f"got {len(np.unique(number))} clusters; needed at least 4, two for each half of the cross-fit."
        )
    return number


def _halves(
    cluster: np.ndarray, level: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of two halves of the clusters, in which every label is about as frequent."""
    count = int(cluster.max()) + 1
    mean = np.bincount(cluster, weights=level) / np.bincount(cluster)
    order = np.lexsort((rng.random(count), mean))
    # In each couple of neighbours one goes left and one goes right, by lot.
    side = np.empty(count, dtype=bool)
    lots = rng.integers(0, 2, size=(count + 1) // 2).astype(bool)
    side[order] = np.stack([lots, ~lots], axis=1).reshape(-1)[:count]
    return np.flatnonzero(side[cluster]), np.flatnonzero(~side[cluster])


def _leak(
    x: Tensor,
    level: np.ndarray,
    values: Tensor,
    cluster: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
    seed: int,
    permutations: int,
) -> Leak:
    readers = [(_Reader(x, a, b), a, b) for a, b in (halves, halves[::-1])]

    def scores(levels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        z = values.to(x.device)[torch.from_numpy(levels).to(x.device)]  # [draws, n, k]
        return [reader(z[:, a], z[:, b]) for reader, a, b in readers]

    def agreement(levels: np.ndarray) -> np.ndarray:
        return np.mean([_correlation(s, t) for s, t in scores(levels)], axis=0)

    observed = float(agreement(level[None])[0])
    rng, count, left = np.random.default_rng([seed, 1]), 0, permutations
    block = max(1, _BLOCK // (len(x) * (values.shape[1] + 1)))
    while left > 0:
        drawn = agreement(_permuted(level, cluster, halves, rng, min(block, left)))
        count += int((drawn >= observed - 1e-12).sum())  # the same labeling counts, whatever its rounding
        left -= block
    rng, resampled = np.random.default_rng([seed, 2]), []
    for (s, t), (_, _, b) in zip(scores(level[None]), readers, strict=True):
        resampled.append(_resampled_correlation(s[0], t[0], cluster[b], rng))
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    return Leak(
        observed, min(float(low), observed), max(float(high), observed), (1 + count) / (1 + permutations)
    )


class _Reader:
    """Fits the first canonical pair of x and z on rows a and reads it off rows b, for many draws of z at once."""

    def __init__(self, x: Tensor, a: np.ndarray, b: np.ndarray):
        rows, others = x[torch.from_numpy(a).to(x.device)], x[torch.from_numpy(b).to(x.device)]
        m = Moments.of(rows, torch.zeros(len(rows), dtype=x.dtype, device=x.device))
        std, _ = scales(m)
        with warnings.catch_warnings():
            # An erased covariance is singular on purpose.
            warnings.simplefilter("ignore", NumericalWarning)
            factor = correlation_factor(m, std, "olse")
        # All that x alone decides: with K = whitened @ z the reading of the others is othersᵀ K v.
        self._whitened = factor.solve(((rows - m.mean_x) / std).T)  # [d, a]
        self._others = factor.solve(((others - m.mean_x) / std).T)  # [d, b]

    def __call__(self, z: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return what is read off the others and their labels, both [draws, b]; z [draws, a, k] is fit on."""
        mean = z.mean(1, keepdim=True)
        white = _whitener(z - mean)
        cross = self._whitened @ (z - mean) @ white  # [draws, d, k]
        _, vectors = torch.linalg.eigh(cross.mT @ cross)
        first = vectors[:, :, -1:]
        read, label = cross @ first, white @ first
        return (self._others.T @ read)[..., 0].cpu().numpy(), ((others - mean) @ label)[..., 0].cpu().numpy()


def _whitener(z: Tensor) -> Tensor:
    """Return W [draws, k, k] with Wᵀ zᵀz W = I on the range of centred z [draws, n, k], else 0; any units."""
    std = z.square().sum(1).sqrt()
    scale = torch.where(std > 0, std, torch.ones_like(std))[:, None]
    values, vectors = torch.linalg.eigh((z / scale).mT @ (z / scale))
    keep = values > values[:, -1:] * 10 * max(z.shape[1:]) * torch.finfo(z.dtype).eps
    roots = torch.where(keep, values, torch.ones_like(values)).rsqrt() * keep
    return vectors * roots[:, None] / scale.mT


def _permuted(
    level: np.ndarray,
    cluster: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    draws: int,
) -> np.ndarray:
    """Return labels [draws, n] shuffled inside clusters that show several, and half by half between the others."""
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(cluster[order]) > 0])
    low, high = (f.reduceat(level[order], starts) for f in (np.minimum, np.maximum))
    side = np.zeros(len(starts), dtype=int)
    side[cluster[halves[1]]] = 1
    whole = np.flatnonzero(low == high)
    label = np.tile(low, (draws, 1))
    label[:, whole] = _shuffled(low[whole], side[whole], rng, draws)
    result = label[:, cluster]
    inside = np.flatnonzero((low < high)[cluster])
    result[:, inside] = _shuffled(level[inside], cluster[inside], rng, draws)
    return result


def _shuffled(values: np.ndarray, stratum: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Return values [draws, m] in random order inside every stratum."""
    # Sorted by stratum and, inside, by lot: the i-th place of a stratum gets a random one of its values.
    keys = stratum + rng.random((draws, len(values)))
    result = np.empty(keys.shape, dtype=values.dtype)
    result[:, np.argsort(stratum, kind="stable")] = values[np.argsort(keys, axis=1)]
    return result


def _correlation(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the correlation of s and t [draws, m] in every draw, 0 where one of them is constant."""
    a, b = s - s.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    aa, bb, ab = (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)
    told = (aa > _CONSTANT * (s * s).sum(1)) & (bb > _CONSTANT * (t * t).sum(1))
    return np.where(told, ab / np.sqrt(np.where(told, aa * bb, 1.0)), 0.0)


def _resampled_correlation(
    s: np.ndarray, t: np.ndarray, cluster: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the correlation of s and t [m] in every resample of the clusters, [resamples]."""
    _, number = np.unique(cluster, return_inverse=True)
    count = int(number.max()) + 1
    picks = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    # Centred first, so that the sums below lose nothing to a common mean.
    a, b = s - s.mean(), t - t.mean()
    columns = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    n, sa, sb, saa, sbb, sab = (picks @ np.stack([np.bincount(number, c) for c in columns.T], axis=1)).T
    aa, bb = saa - sa * sa / n, sbb - sb * sb / n
    told = (aa > _CONSTANT * (s @ s)) & (bb > _CONSTANT * (t @ t))
    return np.where(told, (sab - sa * sb / n) / np.sqrt(np.where(told, aa * bb, 1.0)), 0.0)
