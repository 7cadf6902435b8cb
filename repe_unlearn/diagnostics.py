"""Diagnostics: what an eraser does to the sample it was fit on, and to rows that it has not seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .eraser import Eraser
from .errors import InputError, NotEnoughDataError, NumericalWarning, ShapeError
from .moments import Moments
from .sites import Site
from .solvers.linalg import AnyMoments, correlation_factor, scales

_RESAMPLES = 1000
_OUTLIER = 100.0
_MOST = 0.5
_BLOCK = 4_000_000  # numbers per block of permuted labels: 32 MB
_CONSTANT = 1e-26  # (450 eps)²: a variance of this share of the mean square is rounding


@dataclass(frozen=True, slots=True)
class FitSummary:
    """Numbers of one eraser on the moments that it was fit on; a plan keeps one per site.

    Attributes:
        n: total weight of the rows.
        d: width of x.
        rank: of the eraser.
        effective_rank: ``(tr Σxx)² / tr Σxx²``, 1 to d: over how many directions the variance of x is spread. It
            depends on the units of x.
        energy: E‖r(x) - x‖² / E‖x - mean‖², the share of the variance that is moved (0 and up).
        outlier: standard deviation of the widest coordinate over that of the median one.
        widest: number of the widest coordinate.
        residual: ``|P Σxz| / |Σxz|``, the share of the cross-covariance with the concept that is left.

    Raises:
        InputError: a value that is no finite number.
    """

    n: float
    d: int
    rank: int
    effective_rank: float
    energy: float
    outlier: float
    widest: int
    residual: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"FitSummary.{each.name}: got {value!r}; needed a finite number.")


def summarize(eraser: Eraser, m: AnyMoments) -> FitSummary:
    """Return the numbers of an eraser on moments, in closed form: exact for the sample behind them, no rows needed.

    Costs two passes over Σxx at most (with ``ThinMoments`` one product of the rows), little beside a solve.

    Args:
        eraser: of width d.
        m: moments of x [d] and z [k]; usually those that the eraser was fit on.

    Raises:
        ShapeError: the widths differ.
        InputError: moments so large that the numbers overflow.

    Reference:
        Effective rank: Bartlett, Long, Lugosi, Tsigler: Benign overfitting in linear regression, PNAS 2020,
        arXiv 1906.11300, definition 3, R_0.

    Example:
        >>> from repe_unlearn.solvers import leace
        >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
        >>> m = Moments.of(x, torch.tensor([0, 0, 1, 1]))
        >>> found = summarize(leace(m), m)
        >>> round(found.energy, 6), round(found.effective_rank, 6), found.rank
        (0.5, 2.0, 1)
    """
    if eraser.dim != m.d:
        raise ShapeError(f"got an eraser of width {eraser.dim} and moments of width {m.d}; needed the same.")
    left, right = eraser.left.to(m.mean_x), eraser.right.to(m.mean_x)
    if isinstance(m, Moments):
        size, read = float(m.m_xx.norm()) / m.n, right @ m.m_xx @ right.T / m.n
    else:
        y = m.standardised(torch.ones_like(m.mean_x))
        size = float((y @ y.T if len(y) < m.d else y.T @ y).norm())
        read = (y @ right.T).T @ (y @ right.T)
    offset = right @ (m.mean_x - eraser.shift.to(m.mean_x))
    moved = float(((left.T @ left) * (read + torch.outer(offset, offset))).sum())
    total = float(m.var_x.sum())
    std, _ = scales(m)
    moving = m.var_x > 0.5 * std.square()  # not constant to rounding
    std = torch.where(moving, std, torch.zeros_like(std))
    widest = int(std.argmax())
    before = m.m_xz
    after = before - left @ (right @ before)
    return FitSummary(
        n=m.n,
        d=m.d,
        rank=eraser.rank,
        effective_rank=(total / size) ** 2 if size else 0.0,
        energy=max(moved, 0.0) / total if total else 0.0,
        outlier=float(std[widest] / std[moving].median()) if bool(moving.any()) else 1.0,
        widest=widest,
        residual=float(after.norm() / before.norm()) if eraser.rank and bool(before.any()) else 0.0,
    )


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
        effective_rank, energy, outlier, widest: as in ``FitSummary``, of these rows.
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
    widest: int
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
    numbers = summarize(eraser, m)
    found = tuple(text for _, text in found_weak(numbers).values())
    for text in found:
        warnings.warn(text, NumericalWarning, stacklevel=2)
    return Diagnosis(
        n=len(rows),
        clusters=int(cluster.max()) + 1,
        d=eraser.dim,
        rank=eraser.rank,
        effective_rank=numbers.effective_rank,
        energy=numbers.energy,
        outlier=numbers.outlier,
        widest=numbers.widest,
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


def found_weak(numbers: FitSummary | Diagnosis) -> dict[str, tuple[float, str]]:
    """Return what rests on weak numerics: kind of weakness -> how bad it is, and a text that says what to do."""
    found = {}
    if numbers.rank == 0:
        found["rank"] = (
            1.0,
            (
                "the eraser has rank 0 and changes nothing: its fitting rows held no linear trace of the concept. "
                "Check labels and tokens, or fit at another site."
            ),
        )
    if numbers.energy > _MOST:
        found["energy"] = (
            numbers.energy,
            (
                f"the eraser moves {100 * numbers.energy:.0f} % of the variance: the rows differ in little but the concept, or "
                "it takes much more than that. Use more varied prompts, affine=True and shrinkage='olse', and leave out "
                "attention sinks and special tokens."
            ),
        )
    if numbers.outlier > _OUTLIER:
        found["outlier"] = (
            numbers.outlier,
            (
                f"coordinate {numbers.widest} is {numbers.outlier:.0f} times as wide as the median one, so the shares of "
                "variance here are about that coordinate alone. Leave out attention sinks and special tokens, or divide "
                "each coordinate by its standard deviation."
            ),
        )
    if numbers.n < 2 * numbers.d:
        found["rows"] = (
            numbers.d / max(numbers.n, 1.0),
            (
                f"{numbers.n:g} rows for d = {numbers.d}: fewer than 2 d rows hardly determine a covariance, so neither an "
                "eraser nor a test of it is sure to hold for other rows. Use more prompts or more tokens of each."
            ),
        )
    return found


def warn_weak(
    numbers: Mapping[Site, FitSummary | Diagnosis], *, skip: Iterable[str] = (), stacklevel: int = 3
) -> None:
    """Give one ``NumericalWarning`` per kind of weakness, with the number of sites and the worst of them.

    Args:
        numbers: of every site.
        skip: kinds that are said elsewhere, see ``found_weak``.
        stacklevel: of the warnings; 3 is the caller of the function that calls this one.
    """
    found = {site: found_weak(value) for site, value in numbers.items()}
    for kind in dict.fromkeys(kind for kinds in found.values() for kind in kinds if kind not in skip):
        hit = [site for site, kinds in found.items() if kind in kinds]
        worst = max(hit, key=lambda site: found[site][kind][0])
        where = f"at {len(hit)} of {len(found)} sites" + (
            f", worst at {worst}" if len(hit) > 1 else f" ({worst})"
        )
        text = found[worst][kind][1]
        warnings.warn(f"{where}: {text}" if len(found) > 1 else text, NumericalWarning, stacklevel=stacklevel)


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
