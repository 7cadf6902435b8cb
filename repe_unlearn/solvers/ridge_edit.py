"""Ridge edit: change what one weight writes at some inputs, and as little as possible at others, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repe_unlearn.edit import Edit
from repe_unlearn.errors import InputError, NonFiniteError, NotEnoughDataError, ShapeError
from repe_unlearn.moments import Moments

from .linalg import positive_definite
from .targets import Target, usable


def ridge_edit(
    weight: Tensor,
    forget: Moments,
    retain: Moments | None,
    *,
    target: Target,
    alpha: float = 1.0,
    ridge: float = 1e-3,
    neighbour: Moments | None = None,
    beta: float = 1.0,
    null_space: float | None = None,
    rank: int | None = None,
) -> Edit:
    """Return the edit Δ that minimises, exactly, what is missed of the target plus what others get to see.

    ``J(Δ) = E_f ‖e - Δk‖² + alpha E_r ‖Δk‖² + beta E_n ‖Δk‖² + λ ‖Δ‖²`` with means over the positions of forget,
    retain and neighbour, and ``λ = ridge · E_r ‖k‖² / m``. Only this weight changes, so its inputs k stay what they
    are and the problem is linear least squares: ``Δ = S (C_f + alpha C_r + beta C_n + λI)⁻¹`` with ``S = E_f e kᵀ``
    and uncentred second moments C, by Cholesky in float64. With ``null_space`` it is the minimiser among the edits
    that read nothing outside the null space of the retain and neighbour keys, and then those keys give the outputs
    they gave, to rounding (AlphaEdit). With ``rank`` it is the minimiser of that rank.

    Leave attention-sink and padding positions out of the moments: their keys are huge, and an edit that moves them
    breaks the model.

    Args:
        weight: ``[d, m]``, outputs by inputs (a Conv1D weight transposed), any floating dtype; not changed.
        forget: moments of the inputs k [m] of the weight where knowledge is to go, with z as the target needs it:
            ``capture(model, tokenizer, forget_prompts, [Site(".. down_proj", "input")], target=Site(..))``.
        retain: the same where nothing is to change; None for none.
        target: what is wanted at forget positions, from ``targets``.
        alpha: weight of retain; RMU's alpha up to the ridge. 0 or more.
        ridge: weight of the size of Δ, relative to the mean square of a retain key (of a forget key without retain).
        neighbour: a second set to be kept, such as other facts about the same subjects.
        beta: its weight, 0 or more.
        null_space: a direction counts as null if its share of ``C_r + C_n`` is at most this share of the largest
            eigenvalue (1e-12 for what the keys do not span; 1e-4 to 1e-2 to leave a little). None: no constraint.
        rank: at most so many directions, 1 or more; default as many as the target has.

    Returns:
        Edit of shape [d, m], low-rank where the target or ``rank`` makes it so.

    Raises:
        ShapeError: widths that do not fit.
        NotEnoughDataError: no rows.
        NonFiniteError: NaN or infinity.
        InputError: a number out of range, no null space, or keys that do not determine Δ with ``ridge=0``.

    Reference:
        RMU (Li et al., arXiv 2403.03218) at its last layer; UCE (Gandikota et al., arXiv 2308.14761); MEMIT (Meng et
        al., arXiv 2210.07229); AlphaEdit (Fang et al., arXiv 2410.02355) for ``null_space``.

    Example:
        >>> from repe_unlearn.solvers import targets
        >>> g = torch.Generator().manual_seed(0)
        >>> w, keys, others = (torch.randn(n, 6, generator=g) for n in (4, 3, 40))
        >>> forget, retain = Moments.of(keys, keys @ w.T), Moments.of(others, others @ w.T)
        >>> edit = ridge_edit(w, forget, retain, target=targets.zero(), alpha=0.01)
        >>> after = w + edit.delta()
        >>> bool((keys @ after.float().T).norm() < 0.2 * (keys @ w.T).norm())
        True
    """
    weight = checked_weight(weight, forget)
    wanted = wanted_changes(weight, forget, retain, target)
    if rank is not None and rank < 1:
        raise InputError(f"got rank={rank}; needed 1 or more, or None for no limit.")
    kept, lam = penalty(forget, retain, alpha, ridge, neighbour, beta)
    metric = second_moment(forget) + kept
    cross = cross_moment(wanted)
    words = [target.name, f"alpha={alpha:g}", f"ridge={ridge:g}"]
    words += [] if neighbour is None else [f"beta={beta:g}"]
    null = None
    if null_space is not None:
        null = _null_basis(retain, neighbour, null_space)
        metric, cross = null.T @ metric @ null, cross @ null
        words.append(f"null space {null.shape[1]} of {forget.d}")
    metric.diagonal().add_(lam)
    lower = cholesky(metric)
    left = None
    if target.basis is not None:
        left = torch.linalg.qr(target.basis.to(weight)).Q
        cross = left.T @ cross
    if rank is not None and rank < min(cross.shape):
        # J(Δ) = J(Δ*) + ‖(Δ - Δ*) L‖² with metric L Lᵀ: the best of a rank is the truncated SVD of Δ* L = S L⁻ᵀ.
        whitened = torch.linalg.solve_triangular(lower, cross.T, upper=False).T
        top = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -rank:]
        left, cross = top if left is None else left @ top, top.T @ cross
        words.append(f"rank {rank}")
    right = torch.cholesky_solve(cross.T, lower).T
    if null is not None:
        right = right @ null.T
    rule = f"ridge edit: {', '.join(words)}"
    return Edit(right, None, rule) if left is None else Edit(left, right, rule)


@dataclass(frozen=True, slots=True, eq=False)
class RidgeFactor:
    """What is to be kept, factored once: later each request to forget costs O(m² n) for its n positions.

    Gives the edits of ``ridge_edit`` to rounding (Woodbury): with ``A = alpha C_r + beta C_n + λI`` and rows K [n, m]
    and E [n, d], ``Δ = Eᵀ (n I + K A⁻¹ Kᵀ)⁻¹ K A⁻¹``, of rank n. Made by ``RidgeFactor.of``.

    Attributes:
        lower: ``[m, m]`` Cholesky factor of A.
        rule: the settings in words.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> retain = Moments.of(torch.randn(50, 6, generator=g), torch.zeros(50, 1))
        >>> factor = RidgeFactor.of(retain, ridge=0.1)
        >>> keys, changes = torch.randn(2, 6, generator=g), torch.randn(2, 4, generator=g)
        >>> edit = factor.edit(keys, changes)
        >>> edit.shape, edit.rank
        ((4, 6), 2)
    """

    lower: Tensor
    rule: str

    @classmethod
    def of(
        cls,
        retain: Moments,
        *,
        alpha: float = 1.0,
        ridge: float = 1e-3,
        neighbour: Moments | None = None,
        beta: float = 1.0,
    ) -> RidgeFactor:
        """Factor the penalty; arguments as ``ridge_edit``.

        Raises:
            ShapeError, NotEnoughDataError, NonFiniteError, InputError: as ``ridge_edit``. ``ridge=0`` needs retain
                keys that span all m directions.
        """
        usable(retain, "retain")
        kept, lam = penalty(retain, retain, alpha, ridge, neighbour, beta)
        kept.diagonal().add_(lam)
        beside = "" if neighbour is None else f", beta={beta:g}"
        return cls(cholesky(kept), f"alpha={alpha:g}, ridge={ridge:g}{beside}")

    def edit(self, keys: Tensor, changes: Tensor, *, name: str = "given changes") -> Edit:
        """Return the edit for one request.

        Args:
            keys: ``[n, m]`` inputs of the weight at the positions to forget.
            changes: ``[n, d]`` wanted change of its output at each, such as ``mean - h``.
            name: of the target, for the rule.

        Raises:
            ShapeError, NotEnoughDataError, NonFiniteError: shapes that do not fit, no rows, NaN or infinity.
        """
        m = self.lower.shape[0]
        if keys.ndim != 2 or changes.ndim != 2 or keys.shape[1] != m or keys.shape[0] != changes.shape[0]:
            raise ShapeError(
                f"got keys {tuple(keys.shape)} and changes {tuple(changes.shape)}; needed [n, {m}] and [n, d]."
            )
        if keys.shape[0] == 0:
            raise NotEnoughDataError("got no rows to forget; needed at least one key.")
        if not (torch.isfinite(keys).all() and torch.isfinite(changes).all()):
            raise NonFiniteError("keys or changes hold NaN or infinite values; check where they come from.")
        keys, changes = keys.detach().to(self.lower), changes.detach().to(self.lower)
        whitened = torch.linalg.solve_triangular(self.lower, keys.T, upper=False)  # L⁻¹ Kᵀ [m, n]
        gram = whitened.T @ whitened
        gram.diagonal().add_(keys.shape[0])
        left = torch.cholesky_solve(changes, torch.linalg.cholesky(gram)).T
        right = torch.linalg.solve_triangular(self.lower.T, whitened, upper=True).T
        return Edit(left, right, f"ridge edit: {name}, {self.rule}")


def checked_weight(weight: Tensor, forget: Moments) -> Tensor:
    """Return the weight in float64 where the moments are, both checked.

    Raises:
        ShapeError, NonFiniteError, NotEnoughDataError: see ``ridge_edit``.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ShapeError(f"got a weight {got}; needed a floating-point matrix [d, m].")
    if not torch.isfinite(weight).all():
        raise NonFiniteError("the weight holds NaN or infinite values; load the checkpoint again.")
    usable(forget, "forget", d=weight.shape[1])
    return weight.detach().to(forget.mean_x)


def wanted_changes(weight: Tensor, forget: Moments, retain: Moments | None, target: Target) -> Moments:
    """Return the moments of the forget keys k and the wanted changes e [d].

    Raises:
        ShapeError, NotEnoughDataError, NonFiniteError: retain moments that do not fit; see ``ridge_edit``.
    """
    if retain is not None:
        usable(retain, "retain", d=weight.shape[1])
    return target.wanted(weight, forget, retain)


def penalty(
    forget: Moments,
    retain: Moments | None,
    alpha: float,
    ridge: float,
    neighbour: Moments | None,
    beta: float,
) -> tuple[Tensor, float]:
    """Return ``alpha C_r + beta C_n``, a tensor of its own, and λ.

    Raises:
        InputError: a number out of range.
        ShapeError, NotEnoughDataError, NonFiniteError: neighbour moments that do not fit.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("ridge", ridge)):
        if not 0 <= value < math.inf:
            raise InputError(f"got {name}={value}; needed a finite number, 0 or more.")
    kept = forget.m_xx.new_zeros(forget.d, forget.d)
    if retain is not None:
        kept += alpha * second_moment(retain)
    if neighbour is not None:
        usable(neighbour, "neighbour", d=forget.d)
        kept += beta * second_moment(neighbour)
    reference = forget if retain is None else retain
    return kept, ridge * float(reference.var_x.sum() + reference.mean_x.square().sum()) / forget.d


def second_moment(m: Moments) -> Tensor:
    """Return ``E k kᵀ``, not centred, [m, m]; a tensor of its own."""
    return (m.m_xx / m.n).addr_(m.mean_x, m.mean_x)


def cross_moment(m: Moments) -> Tensor:
    """Return ``E z kᵀ``, not centred, [d, m]; a tensor of its own."""
    return (m.m_xz.T / m.n).addr_(m.mean_z, m.mean_x)


def cholesky(metric: Tensor) -> Tensor:
    """Return the Cholesky factor of a positive definite matrix.

    Raises:
        InputError: it is singular to rounding, whatever the units of the coordinates.
    """
    lower, info = torch.linalg.cholesky_ex(metric)
    scale = metric.diagonal().clamp_min(torch.finfo(metric.dtype).tiny).sqrt()
    if not bool(positive_definite(lower / scale[:, None], info, metric.shape[0])):
        raise InputError(
            f"the keys do not determine the edit: their second moments of width {metric.shape[0]} are singular. "
            "Give ridge above 0 (1e-3 is usual), more retain rows, or null_space in place of a huge alpha."
        )
    return lower


def _null_basis(retain: Moments | None, neighbour: Moments | None, share: float) -> Tensor:
    """Return an orthonormal basis [m, q] of the directions that the keys to be kept do not use."""
    if not 0 < share < 1:
        raise InputError(f"got null_space={share}; needed a share of the largest eigenvalue, 0 to 1.")
    kept = [second_moment(m) for m in (retain, neighbour) if m is not None]
    if not kept:
        raise InputError("null_space needs retain or neighbour moments; got neither.")
    eigenvalues, vectors = torch.linalg.eigh(sum(kept[1:], kept[0]))
    null = eigenvalues <= share * eigenvalues[-1]
    if not bool(null.any()):
        raise InputError(
            f"the retain keys leave no null space at {share:g}: the smallest eigenvalue is "
            f"{float(eigenvalues[0] / eigenvalues[-1]):.1e} of the largest. Raise null_space, or use alpha instead."
        )
    return vectors[:, null]
