"""R-LACE: the projection that the best linear adversary likes least."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from repe_unlearn.eraser import Eraser
from repe_unlearn.errors import InputError, NoConceptWarning

from .linalg import correlation_factor, independent_columns, scales
from .logistic import Logistic, Probing
from .mean_difference import mean_difference
from .rows import Rows

_MEMORY = 10
_INNER = (
    1e-6,
    1e-3,
)  # tolerance of the adversary during the ascent: a thousandth of the slope, between these
_FLAT = 1e-5  # of a gradient without a unit; the loss is then exact to about 1e-10

Adversary: TypeAlias = Callable[[Tensor, Logistic | None, float], Logistic]  # of U, a start, the slope there


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """How the game between a projection and a linear adversary ended; losses are cross-entropies in nats.

    Attributes:
        eraser: the projection that was found.
        value: loss of the best adversary against it (with its penalty), the value of the game.
        ceiling: entropy of the labels, the loss of knowing nothing; no projection can do better.
        unerased: loss of the best adversary on x itself.
        steps: ascent steps made from the start that won; 0 where the solution is closed.
        slope: norm of the gradient at the end (no unit): 0 in the closed case, small where the ascent converged.
    """

    eraser: Eraser
    value: float
    ceiling: float
    unerased: float
    steps: int
    slope: float


def rlace(
    x: Tensor,
    z: Tensor,
    *,
    rank: int | None = None,
    ridge: float = 1e-2,
    steps: int = 30,
    affine: bool = True,
) -> Eraser:
    """Return the orthogonal projection of a given rank that leaves the best linear adversary the largest loss.

    At ``rank >= rank(Σxz)`` (the default) this is exact and closed, see ``rlace_game``; below, it is a local maximum
    reached from the best of three starts, and part of the concept stays readable. It works on rows, not on Moments:
    the adversary's logistic loss is not a function of second moments.

    Args, Raises, Reference: as ``rlace_game``. ``ridge`` and ``steps`` count only below full rank.

    Returns:
        Orthogonal eraser of rank ``min(rank, rank(Σxz))``; rank 0 with a NoConceptWarning without a concept.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(300, 5, generator=g), torch.arange(300) % 3
        >>> x[:, 0] += 4 * (z == 0)
        >>> x[:, 1] += 1 * (z == 1)
        >>> rlace(x, z).rank, rlace(x, z, rank=1).right[0].abs().argmax().item()
        (2, 0)
    """
    rows = Rows.of(x, z)
    closed = _closed(rows, rank, affine)
    if closed is not None:
        return closed
    return rlace_game(x, z, rank=rank, ridge=ridge, steps=steps, affine=affine).eraser


def rlace_game(
    x: Tensor,
    z: Tensor,
    *,
    rank: int | None = None,
    ridge: float = 1e-2,
    steps: int = 30,
    affine: bool = True,
) -> Game:
    """Play ``max over projections P of rank r, min over W, b, of CE(x (I - P) W + b, z)`` and report its value.

    Two facts replace the 75 000 steps of the original, each with an eigendecomposition:

    1. The adversary cannot beat the constant exactly when its gradient at W = 0 vanishes, i.e. ``(I - P) Σxz = 0``
       (the loss is convex in W). So for ``r >= rank(Σxz)`` the optimal projections are those whose range holds
       that of Σxz, the value is the entropy of z, and the smallest of them is ``mean_difference``.
    2. Without penalty the value depends on P only through the kernel of I - P, since W can undo any eigenvalue
       below 1. A P of the Fantope (0 ≼ P ≼ I, trace r) has at most r eigenvalues 1, so the relaxation gains
       nothing over projections ``P = U Uᵀ`` and the ascent can stay on these.

    For r < rank(Σxz) (three classes or more) nothing confines the optimum to a small span, so U is free in all d
    dimensions; but by Danskin's theorem the gradient by U is ``-W (xᵀ(p - y))ᵀ U``, of rank k - 1 and already
    tangent. An L-BFGS step costs one warm-started logistic fit and a thin QR. The game is not concave, so the ascent
    tries a third of its steps from three starts (the leading directions of Σxz, of ``leace``, and of the adversary
    on x itself) and goes on from the best: never worse than those starts, without proof of being the global maximum.

    Args:
        x: ``[n, d]`` activations, any floating dtype; computed in float64.
        z: ``[n]`` integer class ids.
        rank: r, from 1 to d; default rank(Σxz), which is k - 1 for classes in general position. More than that
            removes nothing that a linear adversary could use, so it is not removed.
        ridge: penalty of the adversary, as a share of the mean variance of x; keeps W finite on separable rows.
        steps: largest number of ascent steps on the way to the result; ``Game.slope`` says how flat its end is.
        affine: keep the mean of x.

    Raises:
        ShapeError: x or z of another shape, or real-valued z.
        InputError: rank, ridge or steps out of range.
        NotEnoughDataError: one class.
        NonFiniteError: NaN or infinity in x.

    Reference:
        Ravfogel, Twiton, Goldberg, Cotterell: Linear adversarial concept erasure, ICML 2022, arXiv 2201.12091.
        Fact 1 is Theorem 3.1 of Belrose et al., arXiv 2306.03819.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(300, 5, generator=g), torch.arange(300) % 2
        >>> x[:, 0] += 2 * z
        >>> game = rlace_game(x, z)
        >>> game.unerased < 0.5, round(game.value, 4), round(game.ceiling, 4)
        (True, 0.6931, 0.6931)
    """
    rows = Rows.of(x, z)
    m = rows.moments
    closed = _closed(rows, rank, affine)
    if steps < 0:
        raise InputError(f"got steps={steps}; needed at least 0.")
    probing = Probing.of(rows.x - m.mean_x, rows.z, m.cov_xx, ridge=ridge)

    def adversary(u: Tensor, start: Logistic | None, slope: float) -> Logistic:
        # Danskin's gradient needs an adversary that is better than its distance from flat, and no more.
        tolerance = min(max(1e-3 * slope, _INNER[0]), _INNER[1])
        return probing.without(u).fit(start=start, tolerance=tolerance)

    ceiling = float(-(rows.share * rows.share.log()).sum())
    whole = probing.fit()
    if closed is not None:
        return Game(closed, ceiling, ceiling, whole.loss, 0, 0.0)
    assert rank is not None
    trials = [_ascend(u, adversary, steps // 3) for u in _starts(rows, whole.weights, rank)]
    u, _, used, _ = max(trials, key=lambda one: one[1].loss)
    u, end, more, slope = _ascend(u, adversary, steps - used)
    end = probing.without(u).fit(start=end)
    shift = m.mean_x if affine else torch.zeros_like(m.mean_x)
    return Game(Eraser(u, u.T, shift), end.loss, ceiling, whole.loss, used + more, slope)


def _closed(rows: Rows, rank: int | None, affine: bool) -> Eraser | None:
    """Return the solution where it is closed, i.e. the rank covers all of Σxz; None elsewhere."""
    m = rows.moments
    if rank is not None and not 1 <= rank <= m.d:
        raise InputError(f"got rank={rank}; needed 1 <= rank <= d = {m.d}, or None for all of the concept.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoConceptWarning)
        everything = mean_difference(m, affine=affine)
    if everything.rank == 0:
        warnings.warn(
            f"x and z are uncorrelated to rounding over {m.n:g} samples: the eraser is the identity. "
            "If this is not expected, check labels and tokens.",
            NoConceptWarning,
            stacklevel=3,
        )
    return everything if rank is None or rank >= everything.rank else None


def _starts(rows: Rows, weights: Tensor, rank: int) -> list[Tensor]:
    """The leading directions of Σxz, of what ``leace`` moves, and of the adversary; [d, rank] each, orthonormal."""
    m = rows.moments
    std_x, std_z = scales(m)
    plain = torch.linalg.svd(m.cov_xz / std_z, full_matrices=False).U[:, :rank]
    factor = correlation_factor(m, std_x, "olse")
    white = factor.solve(independent_columns(m.cov_xz / std_x[:, None] / std_z))
    lead = torch.linalg.svd(white, full_matrices=False).U[:, :rank]
    moved = torch.linalg.qr(std_x[:, None] * factor.times(lead)).Q
    return [plain, moved, torch.linalg.svd(weights, full_matrices=False).U[:, :rank]]


def _ascend(u: Tensor, adversary: Adversary, steps: int) -> tuple[Tensor, Logistic, int, float]:
    """Return U [d, r] and the adversary at a local maximum over subspaces, with the steps made and the slope."""
    now = adversary(u, None, 0.0)
    tangent = _gradient(u, now)
    memory: list[tuple[Tensor, Tensor]] = []
    used = 0
    while used < steps and float(tangent.norm()) > _FLAT:
        found = _search(u, now, tangent, _uphill(tangent, memory), adversary)
        if found is None and memory:
            memory = []
            continue
        if found is None:
            break
        u_new, after, step = found
        # Tangents at U become tangents at the new subspace by projection; pairs without curvature are dropped.
        carry = lambda t, u=u_new: t - u @ (u.T @ t)  # noqa: E731
        tangent_new = _gradient(u_new, after)
        memory = [(carry(s), carry(y)) for s, y in memory[1 - _MEMORY :]]
        memory.append((carry(step), carry(tangent) - tangent_new))
        memory = [(s, y) for s, y in memory if float((s * y).sum()) > 1e-10 * float(s.norm() * y.norm())]
        gain = after.loss - now.loss
        u, now, tangent, used = u_new, after, tangent_new, used + 1
        if gain <= 1e-10 * abs(now.loss):
            break
    return u, now, used, float(tangent.norm())


def _uphill(tangent: Tensor, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The L-BFGS two-loop recursion: about the inverse of minus the curvature, times the gradient."""
    q, coefficients = tangent.clone(), []
    for s, y in reversed(memory):
        a = float((s * q).sum() / (s * y).sum())
        q, coefficients = q - a * y, [a, *coefficients]
    if memory:
        s, y = memory[-1]
        q = q * float((s * y).sum() / y.square().sum())
    for (s, y), a in zip(memory, coefficients, strict=True):
        q = q + (a - float((y * q).sum() / (s * y).sum())) * s
    return q


def _gradient(u: Tensor, fit: Logistic) -> Tensor:
    """Derivative of the adversary's loss by U [d, r]; its columns are orthogonal to U because Uᵀ W = 0."""
    return -fit.weights @ (fit.pull.T @ u)


def _search(
    u: Tensor,
    now: Logistic,
    tangent: Tensor,
    direction: Tensor,
    adversary: Adversary,
) -> tuple[Tensor, Logistic, Tensor] | None:
    """Halve the step until the loss rises enough (Armijo); None where it does not rise at all."""
    slope = float((tangent * direction).sum())
    # A step that turns the subspace by more than 45 degrees tells nothing about the slope here.
    step = direction * min(1.0, 1 / float(direction.norm()))
    slope *= float(step.norm() / direction.norm())
    for _ in range(25):
        q, r = torch.linalg.qr(u + step)
        candidate = q * r.diagonal().sign()  # the basis turns with the subspace instead of flipping
        after = adversary(candidate, now, float(tangent.norm()))
        if after.loss >= now.loss + 1e-4 * slope and slope > 0:
            return candidate, after, step
        step, slope = step / 2, slope / 2
    return None
