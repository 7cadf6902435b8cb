"""Spectrum: how far forget keys can be told from retain keys, and what an edit will do, without running the model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, ShapeError
from repe_unlearn.moments import Moments

from .ridge_edit import (
    checked_weight,
    cholesky,
    cross_moment,
    penalty,
    second_moment,
    wanted_changes,
)
from .targets import Target, energy, usable

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Directions of the key space, from those that only forget keys use to those that only retain keys use.

    Attributes:
        values: ``[m]`` σ, largest first: ``C_f v = σ (alpha C_r + beta C_n + λI) v``. Along v a ridge edit leaves
            ``1 / (1 + σ)`` of what is wanted.
        directions: ``[m, m]`` the v as columns, of length 1 in the metric of the right-hand side.
    """

    values: Tensor
    directions: Tensor

    @property
    def dof(self) -> float:
        """Degrees of freedom of the edit, ``Σ σ/(1+σ)``: the trace of the hat matrix, at most m and the positions."""
        return float((self.values / (1 + self.values)).sum())


def spectrum(
    forget: Moments,
    retain: Moments | None,
    *,
    alpha: float = 1.0,
    ridge: float = 1e-3,
    neighbour: Moments | None = None,
    beta: float = 1.0,
) -> Spectrum:
    """Return the separability spectrum of forget against retain keys; arguments as ``ridge_edit``.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``ridge_edit``.

    Example:
        >>> rows = torch.eye(4)
        >>> apart = Moments.of(rows[:1], rows[:1]), Moments.of(rows[1:], rows[1:])
        >>> tuple(round(v) for v in spectrum(*apart, ridge=0.01).values.tolist())
        (400, 0, 0, 0)
    """
    usable(forget, "forget")
    if retain is not None:
        usable(retain, "retain", d=forget.d)
    kept, lam = penalty(forget, retain, alpha, ridge, neighbour, beta)
    kept.diagonal().add_(lam)
    lower = cholesky(kept)
    eigenvalues, vectors = torch.linalg.eigh(_sandwich(lower, second_moment(forget)))
    directions = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return Spectrum(eigenvalues.flip(0).clamp_min(0), directions.flip(1))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a ridge edit will do on the positions it was solved from.

    Attributes:
        alpha: weight of retain.
        remaining: ``E_f ‖e - Δk‖² / E_f ‖e‖²``: 1 is no edit, 0 the target everywhere.
        distortion: ``E_r ‖Δk‖² / E_r ‖z‖²``: what is added to the output at retain positions, next to what is there.
        neighbour: the same at neighbour positions; NaN without.
        dof: degrees of freedom. Next to the number of forget positions it says how much of ``remaining`` is fit to
            these positions: where it is near that number, expect less from other prompts.
        relative: ``‖Δ‖ / ‖W‖``.
    """

    alpha: float
    remaining: float
    distortion: float
    neighbour: float
    dof: float
    relative: float


@dataclass(frozen=True, slots=True, eq=False)
class Tradeoff:
    """All ridge edits of one weight, for every alpha, from one eigendecomposition. Made by ``Tradeoff.of``.

    ``C_f + beta C_n + λI = L Lᵀ`` and ``L⁻¹ C_r L⁻ᵀ = Q Ω Qᵀ`` do not depend on alpha; with ``V = L⁻ᵀ Q``,
    ``Δ(alpha) = S V (I + alpha Ω)⁻¹ Vᵀ``. Memory: a few [m, m] matrices in float64.

    Example:
        ``edit = (t := Tradeoff.of(w, forget, retain, target=targets.mean_retain())).edit(t.alpha_at(0.01))``
    """

    _omega: Tensor  # [m]
    _vectors: Tensor  # V [m, m]
    _wanted: Tensor  # S V [d, m]
    _size: Tensor  # (SV)ᵀ(SV) ∘ VᵀV: its form in (I + alpha Ω)⁻¹ is ‖Δ‖²
    _beside: Tensor | None  # the same with Vᵀ C_n V: the cost at neighbour positions
    _hat: Tensor  # diagonal of Vᵀ C_f V
    _energies: tuple[float, float, float, float]  # E_f ‖e‖², E_r ‖z‖², E_n ‖z‖², ‖W‖²
    _lam: float
    _beta: float
    _rule: str

    @classmethod
    def of(
        cls,
        weight: Tensor,
        forget: Moments,
        retain: Moments,
        *,
        target: Target,
        ridge: float = 1e-3,
        neighbour: Moments | None = None,
        beta: float = 1.0,
    ) -> Tradeoff:
        """Decompose once; arguments as ``ridge_edit``, and z [d] of retain and neighbour as that of forget.

        Raises:
            ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``ridge_edit``; also where z of retain or
                neighbour is not of width d, or zero, or nothing is wanted (e is 0).
        """
        weight = checked_weight(weight, forget)
        wanted = wanted_changes(weight, forget, retain, target)
        kept, lam = penalty(forget, retain, 0.0, ridge, neighbour, beta)
        metric = second_moment(forget) + kept
        metric.diagonal().add_(lam)
        lower = cholesky(metric)
        omega, q = torch.linalg.eigh(_sandwich(lower, second_moment(retain)))
        vectors = torch.linalg.solve_triangular(lower.T, q, upper=True)
        along = cross_moment(wanted) @ vectors
        gram = along.T @ along
        beside = None
        if neighbour is not None:
            beside = gram * (vectors.T @ second_moment(neighbour) @ vectors)
        hat = (vectors * (second_moment(forget) @ vectors)).sum(0)
        energies = (
            _positive(energy(wanted), "nothing is wanted: e is 0 at every forget position"),
            _energy(retain, "retain", weight),
            math.nan if neighbour is None else _energy(neighbour, "neighbour", weight),
            float(weight.square().sum()),
        )
        words = f"{target.name}, ridge={ridge:g}" + ("" if neighbour is None else f", beta={beta:g}")
        size = gram * (vectors.T @ vectors)
        return cls(omega.clamp_min(0), vectors, along, size, beside, hat, energies, lam, beta, words)

    @property
    def wanted(self) -> float:
        """Energy of the wanted change, ``E_f ‖e‖²``."""
        return self._energies[0]

    def edit(self, alpha: float) -> Edit:
        """Return the edit that ``ridge_edit`` gives for this alpha, dense."""
        delta = (self._wanted * self._shrink(alpha)) @ self._vectors.T
        return Edit(delta, None, f"ridge edit: {self._rule}, alpha={alpha:g}")

    def at(self, alpha: float) -> Prediction:
        """Return what the edit for this alpha will do."""
        shrink = self._shrink(alpha)
        forget, _, near, weight = self._energies
        column = self._wanted.square().sum(0)
        size = float(shrink @ self._size @ shrink)
        beside = 0.0 if self._beside is None else float(shrink @ self._beside @ shrink)
        # tr(Δ C_f Δᵀ) is what is left of tr(Δ L Lᵀ Δᵀ) without the ridge and the neighbours.
        fitted = float((column * shrink.square()).sum()) - self._lam * size - self._beta * beside
        missed = forget - 2 * float((column * shrink).sum()) + fitted
        return Prediction(
            alpha,
            max(missed, 0.0) / forget,
            self._distortion(alpha),
            beside / near,
            float((self._hat * shrink).sum()),
            math.sqrt(max(size, 0.0) / weight) if weight else math.inf,
        )

    def alpha_at(self, distortion: float) -> float:
        """Return the smallest alpha, from 1e-8 to 1e8, whose distortion of retain is at most this.

        Distortion falls as alpha grows, so this is the strongest edit within the budget.

        Raises:
            InputError: distortion is not above 0, or no alpha reaches it.
        """
        if not distortion > 0:
            raise InputError(f"got distortion={distortion}; needed a share above 0, such as 0.01.")
        low, high = -8.0, 8.0
        if self._distortion(10**low) <= distortion:
            return 10**low
        if self._distortion(10**high) > distortion:
            raise InputError(
                f"no alpha up to 1e8 brings the distortion to {distortion:g} (it stays at "
                f"{self._distortion(10**high):.1e}); use null_space, another layer, or allow more."
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._distortion(10**middle) <= distortion else (middle, high)
        return 10**high

    def _shrink(self, alpha: float) -> Tensor:
        if not 0 <= alpha < math.inf:
            raise InputError(f"got alpha={alpha}; needed a finite number, 0 or more.")
        return 1 / (1 + alpha * self._omega)

    def _distortion(self, alpha: float) -> float:
        column = self._wanted.square().sum(0)
        return float((column * self._omega * self._shrink(alpha).square()).sum()) / self._energies[1]


def predict(
    weight: Tensor,
    forget: Moments,
    retain: Moments,
    *,
    target: Target,
    alphas: Iterable[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    ridge: float = 1e-3,
    neighbour: Moments | None = None,
    beta: float = 1.0,
) -> tuple[Prediction, ...]:
    """Return one row per alpha: what the edit of ``ridge_edit`` will do, exact on the given moments.

    For weights without a post-norm behind them, and before what later layers make of it.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``Tradeoff.of``.

    Example:
        ``best = min(predict(w, forget, retain, target=targets.zero()), key=lambda row: row.remaining)``
    """
    tradeoff = Tradeoff.of(weight, forget, retain, target=target, ridge=ridge, neighbour=neighbour, beta=beta)
    return tuple(tradeoff.at(alpha) for alpha in alphas)


def choose(
    predictions: Mapping[Key, Iterable[Prediction]], *, distortion: float, neighbour: float | None = None
) -> tuple[Key, Prediction]:
    """Return the place and the row with least ``remaining`` among those within the budget.

    Args:
        predictions: place (a layer, a site) -> rows of ``predict``.
        distortion: largest allowed share at retain positions.
        neighbour: largest allowed share at neighbour positions; default ``distortion``. Rows without neighbours pass.

    Raises:
        InputError: no row is within the budget, or there is none.

    Example:
        >>> row = Prediction(1.0, remaining=0.2, distortion=0.01, neighbour=math.nan, dof=3.0, relative=0.1)
        >>> choose({7: [row]}, distortion=0.02)[0]
        7
    """
    near = distortion if neighbour is None else neighbour
    rows = [(place, row) for place, found in predictions.items() for row in found]
    within = [
        (place, row) for place, row in rows if row.distortion <= distortion and not row.neighbour > near
    ]
    if not within:
        least = min((row.distortion for _, row in rows), default=math.nan)
        raise InputError(
            f"none of {len(rows)} rows is within distortion {distortion:g} and neighbour {near:g} (the least "
            f"distortion is {least:.2g}); add larger alphas, or allow more."
        )
    return min(within, key=lambda pair: pair[1].remaining)


def remaining(
    edit: Edit, weight: Tensor, forget: Moments, retain: Moments | None = None, *, target: Target
) -> float:
    """Return ``E ‖e - Δk‖² / E ‖e‖²`` of any edit on any moments, such as those of held-out prompts.

    Args:
        edit: of shape [d, m].
        weight: ``[d, m]`` before the edit.
        forget: moments of k and z where it is measured.
        retain: only for targets that need it.
        target: what was wanted; an adaptive ``rmu`` adapts to these moments.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``Tradeoff.of``.
    """
    weight = checked_weight(weight, forget)
    wanted = wanted_changes(weight, forget, retain, target)
    delta = _delta(edit, weight)
    total = _positive(energy(wanted), "nothing is wanted: e is 0 at every position")
    moved = float((delta @ second_moment(forget) * delta).sum())
    return (total - 2 * float((delta * cross_moment(wanted)).sum()) + moved) / total


def distortion(edit: Edit, m: Moments) -> float:
    """Return ``E ‖Δk‖² / E ‖z‖²`` of any edit on any moments: what it adds, next to what is there.

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``Tradeoff.of``.
    """
    usable(m, "moments")
    delta = edit.delta().to(m.mean_x)
    if delta.ndim != 2 or delta.shape[1] != m.d:
        raise ShapeError(f"got an edit of shape {edit.shape} and keys of width {m.d}; needed [d, {m.d}].")
    return float((delta @ second_moment(m) * delta).sum()) / _energy(m, "moments", delta)


def _sandwich(lower: Tensor, c: Tensor) -> Tensor:
    """Return ``L⁻¹ C L⁻ᵀ``, symmetric."""
    half = torch.linalg.solve_triangular(lower, c, upper=False)
    out = torch.linalg.solve_triangular(lower, half.T, upper=False)
    return (out + out.T) / 2


def _delta(edit: Edit, weight: Tensor) -> Tensor:
    if edit.shape != tuple(weight.shape):
        raise ShapeError(f"got an edit of shape {edit.shape}; the weight is {tuple(weight.shape)}.")
    return edit.delta().to(weight)


def _energy(m: Moments, name: str, weight: Tensor) -> float:
    if m.k != weight.shape[0]:
        raise ShapeError(
            f"{name}: got z of width {m.k}; the weight writes {weight.shape[0]}. Capture with target=Site(...)."
        )
    return _positive(energy(m), f"{name}: z is 0 at every position")


def _positive(value: float, what: str) -> float:
    if not value > 0:
        raise InputError(f"{what}; no share of it can be given.")
    return value
