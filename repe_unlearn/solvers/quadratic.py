"""Quadratic eraser: equal class means and equal class covariances, with labels at test time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from repe_unlearn.errors import (
    FileFormatError,
    InputError,
    NonFiniteError,
    NotEnoughDataError,
    NumericalWarning,
    ShapeError,
)
from repe_unlearn.moments import Moments
from repe_unlearn.tensorfile import read_tensors, write_tensors

from .linalg import Shrinkage, scales, shrink
from .subspace import check_x
from .transport import barycenter

_KIND = "quadratic eraser"
_VERSION = 1
_TENSORS = ("class_means", "mean", "maps")


@dataclass(frozen=True, slots=True, eq=False)
class QuadraticEraser:
    """The map ``(x, z) -> mean + maps[z] (x - class_means[z])``.

    The tensors are detached and cloned, so nothing that happens to the caller's tensors changes an eraser.

    Args:
        class_means: ``[k, d]``.
        mean: ``[d]``, the mean of all classes together.
        maps: ``[k, d, d]``, one linear map a class; act on column vectors.
        residual: how far the common covariance is from the optimal one: the relative size of the next step of
            the iteration that finds it. It costs change of x, never equality of the classes.
        gap: the largest relative difference between a class covariance after erasure and the common one, for
            the covariances that were solved with, in units of standard deviations.

    Raises:
        ShapeError: shapes or dtypes that do not fit together, or integer tensors.
        NonFiniteError: NaN or infinite entries.

    Example:
        >>> maps = torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> e = QuadraticEraser(torch.zeros(2, 2), torch.ones(2), maps)
        >>> e(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([0, 1])).tolist()
        [[4.0, 5.0], [7.0, 9.0]]
    """

    class_means: Tensor
    mean: Tensor
    maps: Tensor
    residual: float = 0.0
    gap: float = 0.0

    def __post_init__(self) -> None:
        for name in _TENSORS:
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ShapeError(f"QuadraticEraser.{name}: got {value!r}; needed a floating-point tensor.")
            object.__setattr__(self, name, value.detach().clone().contiguous())
        k, d = (*self.class_means.shape, 0, 0)[:2]
        if self.class_means.ndim != 2 or self.mean.shape != (d,) or self.maps.shape != (k, d, d):
            raise ShapeError(
                f"QuadraticEraser: got class_means {tuple(self.class_means.shape)}, mean {tuple(self.mean.shape)}, "
                f"maps {tuple(self.maps.shape)}; needed [k, d], [d] and [k, d, d]."
            )
        if not self.class_means.dtype == self.mean.dtype == self.maps.dtype:
            raise ShapeError("QuadraticEraser: got tensors of several dtypes; needed one.")
        for name in _TENSORS:
            if not torch.isfinite(getattr(self, name)).all():
                raise NonFiniteError(
                    f"QuadraticEraser.{name} holds NaN or infinite values; check the activations it was fit on."
                )

    @property
    def dim(self) -> int:
        """Width d of the activations."""
        return self.mean.shape[0]

    @property
    def k(self) -> int:
        """Number of classes."""
        return self.class_means.shape[0]

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the erased activations, same shape and dtype as ``x`` [..., d].

        The arithmetic is done in the wider of the two dtypes, at least float32, and cast once at the end.

        Args:
            x: ``[..., d]``.
            z: ``[...]`` integer class ids; classes may be absent.

        Raises:
            ShapeError: x or z does not fit the eraser.
            InputError: a class id outside 0..k-1.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(
                f"got activations {x.dtype} {tuple(x.shape)}; this eraser needs floating-point [..., {self.dim}]."
            )
        if z.shape != x.shape[:-1] or z.is_floating_point():
            raise ShapeError(
                f"got z {z.dtype} {tuple(z.shape)}; needed integer class ids {tuple(x.shape[:-1])}."
            )
        ids = z.detach().reshape(-1).to(x.device, torch.int64)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.k):
            raise InputError(
                f"got class ids from {int(ids.min())} to {int(ids.max())}; the eraser was fit on classes "
                f"0 to {self.k - 1}."
            )
        wide = torch.promote_types(torch.promote_types(x.dtype, self.mean.dtype), torch.float32)
        means, mean, maps = (getattr(self, name).to(x.device, wide) for name in _TENSORS)
        rows = x.reshape(-1, self.dim).to(wide)
        erased = torch.empty_like(rows)
        for c in range(self.k):
            here = ids == c
            erased[here] = mean + (rows[here] - means[c]) @ maps[c].T
        return erased.reshape(x.shape).to(x.dtype)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> QuadraticEraser:
        """Return the same map with its tensors on another device or in another floating dtype."""
        return replace(
            self, **{name: getattr(self, name).to(device=device, dtype=dtype) for name in _TENSORS}
        )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            OutputExistsError: the file exists and ``force`` is False.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {"residual": self.residual, "gap": self.gap}
        return write_tensors(path, tensors, kind=_KIND, version=_VERSION, header=header, force=force)

    @classmethod
    def load(cls, path: str | Path) -> QuadraticEraser:
        """Read what ``save`` wrote, bit by bit the same map.

        Raises:
            FileFormatError: truncated, foreign or newer file.
        """
        tensors, header = read_tensors(path, kind=_KIND, version=_VERSION)
        try:
            means, mean, maps = (tensors[name] for name in _TENSORS)
            return cls(means, mean, maps, float(header["residual"]), float(header["gap"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{path} is not a whole quadratic eraser ({error}); save it again."
            ) from error

    def __repr__(self) -> str:
        dtype = str(self.mean.dtype).removeprefix("torch.")
        return f"QuadraticEraser(d={self.dim}, k={self.k}, residual={self.residual:.0e}, {dtype})"


def quadratic(
    classes: Sequence[Moments] | Mapping[int, Moments],
    *,
    shrinkage: Shrinkage = None,
    metric: Literal["euclidean", "standardized"] = "euclidean",
    rtol: float = 1e-8,
    max_iterations: int = 100,
) -> QuadraticEraser:
    """Return the eraser after which all classes have the same mean and the same covariance.

    Exact for the samples behind ``classes`` when ``shrinkage=None``: then every polynomial of degree two in x
    has zero covariance with the class, so no quadratic predictor beats a constant. Predictors of higher order
    are not covered. Labels are needed at test time: where they may leak or be wrong, use ``leace``.

    Each class is moved by the optimal transport map of its covariance onto the Wasserstein barycenter of all
    class covariances (weighted by class size, like the mean that is kept). At the barycenter the mean-square
    change is the least that any map of (x, class) with this property can have; ``residual`` of the result
    says how close the iteration came. Equality of the classes does not depend on it.

    "Least" is measured in the units of x (``metric="euclidean"``) or in standard deviations within classes,
    coordinate by coordinate (``"standardized"``: does not depend on units; use it where a few coordinates
    are much larger than the others and would decide alone what is least).

    Args:
        classes: moments of x [d] of each class, in the order of the class ids (or by id); their z is not used.
        shrinkage: as ``leace``, on the correlation matrix of each class; the covariances are then equal only as
            far as the shrunk ones describe the sample. None by default, because the shrunk result is not
            exact; a class with fewer examples than d + 1 needs it.
        metric: in which units the change is measured.
        rtol: residual at which the iteration stops.
        max_iterations: limit of the iteration, 0 or more; stopping before ``rtol`` gives a NumericalWarning.

    Returns:
        QuadraticEraser of k maps of size [d, d] (k d² numbers). Directions in which no class varies are kept.

    Raises:
        InputError: fewer than two classes, ids that are not 0..k-1, or an unknown metric.
        ShapeError: the widths differ.
        NotEnoughDataError: a class with fewer than 2 samples, or whose covariance is singular where other
            classes vary.
        NonFiniteError: NaN or infinity in the moments.

    Reference:
        Álvarez-Esteban, del Barrio, Cuesta-Albertos, Matrán: A fixed-point approach to barycenters in
        Wasserstein space, 2016, arXiv 1511.05355, equation 7. For the predictors covered: Belrose et al.:
        LEACE, NeurIPS 2023, arXiv 2306.03819, applied to (x, x xᵀ).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z = torch.arange(400) % 2
        >>> x = torch.randn(400, 3) * (1 + z)[:, None] + z[:, None]
        >>> e = quadratic([Moments.of(x[z == c], z[z == c]) for c in (0, 1)])
        >>> y = e(x, z)
        >>> bool((y[z == 0].T.cov(correction=0) - y[z == 1].T.cov(correction=0)).abs().max() < 1e-5)
        True
    """
    parts = _parts(classes)
    if metric not in ("euclidean", "standardized"):
        raise InputError(f"got metric={metric!r}; needed 'euclidean' or 'standardized'.")
    sizes = parts[0].mean_x.new_tensor([m.n for m in parts])
    weights = sizes / sizes.sum()
    means = torch.stack([m.mean_x for m in parts])
    mean = weights @ means
    std = _within_std(parts, mean)
    corr = torch.stack([_correlation(m, std, shrinkage) for m in parts])
    seen = _directions_seen(corr, weights, parts)
    inner = seen.T @ corr @ seen
    roots = torch.linalg.cholesky(inner)
    # From here on in the units in which the change is measured; one unit for all is the Euclidean metric.
    unit = std if metric == "standardized" else torch.ones_like(std)
    tall = (std / unit)[:, None] * seen
    factors = tall @ roots
    start = tall @ torch.linalg.cholesky((weights[:, None, None] * inner).sum(0))
    centre, turns, residual = barycenter(start, factors, weights, rtol, max_iterations)
    if residual > rtol:
        warnings.warn(
            f"the barycenter of the class covariances was left at a residual of {residual:.1e} (rtol={rtol:g}): "
            "the classes are made equal all the same, at slightly more change than the least. Raise "
            "max_iterations, or use metric='standardized' if coordinates differ much in size.",
            NumericalWarning,
            stacklevel=2,
        )
    # Reads the coordinates of x in each factor; the part of x outside of what the sample shows is kept.
    reads = torch.linalg.solve_triangular(
        roots, (unit / std * seen.T).expand(len(parts), -1, -1), upper=False
    )
    maps = centre @ turns.mT @ reads
    if seen.shape[1] < len(std):
        maps = maps + torch.eye(len(std), dtype=std.dtype, device=std.device) - tall @ seen.T * (unit / std)
    gap = _gap(maps @ factors, centre)
    return QuadraticEraser(means, mean, unit[:, None] * maps / unit, residual, gap)


def _parts(classes: Sequence[Moments] | Mapping[int, Moments]) -> list[Moments]:
    """Check the classes and return their moments in order."""
    if isinstance(classes, Mapping):
        if sorted(classes) != list(range(len(classes))):
            raise InputError(
                f"got classes {sorted(classes)}; needed the ids 0 to {len(classes) - 1}, all of them."
            )
        classes = [classes[c] for c in range(len(classes))]
    parts = list(classes)
    if len(parts) < 2:
        raise InputError(f"got {len(parts)} classes; needed at least two, one Moments each.")
    for number, m in enumerate(parts):
        if m.d != parts[0].d:
            raise ShapeError(f"class {number}: got width d={m.d}; needed d={parts[0].d}, as class 0.")
        try:
            check_x(m)
        except (NonFiniteError, NotEnoughDataError) as error:
            raise type(error)(f"class {number}: {error}") from None
    return parts


def _within_std(parts: list[Moments], mean: Tensor) -> Tensor:
    """Return the standard deviation within classes [d]; 1 where a coordinate is constant to rounding."""
    nothing = mean[:0]
    within = torch.stack([m.m_xx for m in parts]).sum(0)
    pool = Moments(sum(m.n for m in parts), mean, nothing, within, within[:, :0], within[:0, :0])
    return scales(pool)[0]


def _correlation(m: Moments, std: Tensor, shrinkage: Shrinkage) -> Tensor:
    """Return the covariance of one class, shrunk as a correlation matrix of its own, in units of ``std``."""
    variance = m.cov_xx.diagonal()
    rounding = 64 * torch.finfo(std.dtype).eps * (std + m.mean_x.abs())
    own = torch.where(variance > rounding.square(), variance.clamp_min(0).sqrt(), std)
    corr = shrink(m.cov_xx / own[:, None] / own, m.n, shrinkage)
    return (own / std)[:, None] * corr * (own / std)


def _directions_seen(corr: Tensor, weights: Tensor, parts: list[Moments]) -> Tensor:
    """Return an orthonormal basis [d, r] of where the classes vary; all of them must vary in all of it."""
    d = corr.shape[-1]
    eps = torch.finfo(corr.dtype).eps
    values, vectors = torch.linalg.eigh((weights[:, None, None] * corr).sum(0))
    seen = vectors[:, values > 10 * d * eps * values[-1].clamp_min(0)]
    if seen.shape[1] == 0:
        raise NotEnoughDataError("x is constant within every class; there is no covariance to make equal.")
    for number, values in enumerate(torch.linalg.eigvalsh(seen.T @ corr @ seen)):
        missing = int((values <= 10 * d * eps * values[-1].clamp_min(eps)).sum())
        if missing:
            raise NotEnoughDataError(
                f"class {number} ({parts[number].n:g} samples, d={d}) has no variance in {missing} directions in "
                "which other classes vary, so no linear map makes them equal; needed more examples of it "
                "(at least d + 1), or shrinkage='olse'."
            )
    return seen


def _gap(moved: Tensor, centre: Tensor) -> float:
    """Return the largest difference of the moved covariances from the common one, as correlations."""
    common = centre @ centre.T
    size = common.diagonal().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return float(((moved @ moved.mT - common) / size[:, None] / size).abs().max())
